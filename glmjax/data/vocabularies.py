"""The vocabularies of the family: how each turns text into token ids and back.

    vocabulary           encode(text)                                  decode(ids)
    glmjax's own         text only: nothing in it is a special token   the very same text
    GLM 110M-10B         special tokens spelled in it are recognised   special tokens spelled out
    GLM-130B             text only; line breaks are spaces             special tokens left out
    ChatGLM-6B           text only; keeps line breaks, tabs, spaces    special tokens left out

That is what the official code of each does. `encode_prompt` reads what a user typed: there [MASK],
[sMASK] and [gMASK] are blanks in every vocabulary that has them.
"""

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from glmjax.config import SpecialTokens
from glmjax.data.cache import write_whole
from glmjax.presets import TRAINED_TOKENS

SPELLED = {
    "pad": "[PAD]", "eos": "<|endoftext|>", "cls": "[CLS]", "mask": "[MASK]", "smask": "[sMASK]",
    "gmask": "[gMASK]", "sop": "<|startofpiece|>", "eop": "<|endofpiece|>", "dblock": "[dBLOCK]",
}  # fmt: skip
"""How special tokens are spelled, in order of their ids in a trained vocabulary."""
SENTENCE_ENDS = frozenset(".?!;:\u3002\uff1f\uff01\uff1b\u2026\n")
"""Marks that end a sentence (THUDM/GLM, blocklm_utils.py)."""
# SentencePiece writes a space as U+2581 and cannot tell it from the character itself.
SPACE_SIGN = "\u2581"


@dataclass(frozen=True, eq=False)
class Tokenizer(ABC):
    """Text to token ids and back."""

    files: Mapping[str, bytes]
    """What `save` writes: the content of each file under its official name."""
    special_tokens: SpecialTokens
    is_sentence_end: np.ndarray
    """bool [V]: the tokens that end a sentence, as the official code of the model decides."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens (V), special tokens included."""
        return len(self.is_sentence_end)

    @property
    def digest(self) -> str:
        """A name for the vocabulary that changes with its content."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()[:16]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int], /) -> str:
        """The text of token ids. Ids that the vocabulary lacks have none."""

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a text in which [MASK], [sMASK] and [gMASK] are blanks.

        White space before a blank is dropped, as in THUDM/GLM (data_utils/tokenization.py).
        """
        masks = {
            SPELLED[name]: id
            for name in ("mask", "smask", "gmask")
            if (id := getattr(self.special_tokens, name)) is not None
        }
        ids: list[int] = []
        for part in split(text, masks):
            ids += [masks[part]] if part in masks else self.encode(part)
        return ids

    def save(self, folder: Path) -> None:
        """Writes the files of the vocabulary, each whole or not at all."""
        for name, content in self.files.items():
            write_whole(folder / name, content)


def split(text: str, spelled: Mapping[str, int]) -> list[str]:
    """The text between special tokens and those, in turn; masks take the white space before them."""
    text = re.sub(r"\s+(?=\[[sg]?MASK\])", "", text)
    return [part for part in re.split(f"({'|'.join(map(re.escape, spelled))})", text) if part]


def ends_of_sentences(pieces: Sequence[str]) -> np.ndarray:
    """bool [V]: the pieces that hold a mark that ends a sentence."""
    return np.array([not SENTENCE_ENDS.isdisjoint(piece) for piece in pieces])


@dataclass(frozen=True, eq=False)
class TrainedTokenizer(Tokenizer):
    """A SentencePiece vocabulary trained by glmjax; `decode(encode(text)) == text`.

    Special tokens are control pieces: no text encodes to them, so a document that spells "[MASK]"
    cannot open a blank.
    """

    processor: SentencePieceProcessor

    def encode(self, text: str) -> list[int]:
        first, *rest = self.processor.encode(text.split(SPACE_SIGN))
        spelled = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        return first + [id for ids in rest for id in spelled + ids]

    def decode(self, ids: Sequence[int], /) -> str:
        return self.processor.decode([int(id) for id in ids if 0 <= id < self.vocab_size])


def trained_tokenizer(processor: SentencePieceProcessor) -> TrainedTokenizer:
    """The vocabulary of a SentencePiece model that glmjax trained."""
    texts = [processor.decode([id]) for id in range(processor.get_piece_size())]
    files = {"tokenizer.model": processor.serialized_model_proto()}
    return TrainedTokenizer(files, TRAINED_TOKENS, ends_of_sentences(texts), processor)


@dataclass(frozen=True, eq=False)
class SpellingTokenizer(Tokenizer):
    """A vocabulary of GLM 110M-10B, in whose texts special tokens may be spelled.

    Source: THUDM/GLM, data_utils/tokenization.py.
    """

    commands: Mapping[str, int]
    """The special tokens by spelling. Where two share an id, it decodes to the last."""

    def encode(self, text: str) -> list[int]:
        if not text.strip():
            return []
        ids: list[int] = []
        for part in split(text, self.commands):
            ids += [self.commands[part]] if part in self.commands else self.encode_text(part)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int], /) -> str:
        spelled = {id: token for token, id in self.commands.items()}
        text, run = "", list[int]()
        for id in map(int, ids):
            if id in spelled:
                text += self.decode_text(run) + spelled[id]
                run = []
            elif 0 <= id < self.vocab_size:
                run.append(id)
        return text + self.decode_text(run)

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text that spells no special token."""

    @abstractmethod
    def decode_text(self, ids: list[int]) -> str:
        """The text of ids without special tokens."""


@dataclass(frozen=True, eq=False)
class BytePairTokenizer(SpellingTokenizer):
    """Byte-level BPE of GPT-2 (GLM-2B, GLM-10B) and of RoBERTa."""

    model: tokenizers.Tokenizer

    def encode_text(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def decode_text(self, ids: list[int]) -> str:
        return self.model.decode(ids)


@dataclass(frozen=True, eq=False)
class WordPieceTokenizer(SpellingTokenizer):
    """Lower-cased word pieces of BERT (GLM Base, Large, 410M, 515M). White space is not kept."""

    model: tokenizers.Tokenizer
    pieces: Sequence[str]
    """All tokens by id, special ones included."""

    def encode_text(self, text: str) -> list[int]:
        # Python knows the lower case of a final sigma and which characters Unicode lacks; the
        # library that does the rest knows neither.
        kept = (char for char in text if char in "\t\n\r" or unicodedata.category(char)[0] != "C")
        return self.model.encode("".join(kept).lower()).ids

    def decode(self, ids: Sequence[int], /) -> str:
        return self.decode_text([int(id) for id in ids if 0 <= id < self.vocab_size])

    def decode_text(self, ids: list[int]) -> str:
        return " ".join(self.pieces[id] for id in ids).replace(" ##", "")


@dataclass(frozen=True, eq=False)
class ChineseTokenizer(SpellingTokenizer):
    """SentencePiece of GLM-Large-Chinese and GLM-10B-Chinese; a line break is a space."""

    processor: SentencePieceProcessor

    def encode_text(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode_text(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


@dataclass(frozen=True, eq=False)
class IceTokenizer(Tokenizer):
    """SentencePiece of GLM-130B and ChatGLM-6B, which share the file ice_text.model.

    An id is that of the piece plus `image_tokens`, the ids of pictures that come before.
    Sources: THUDM/icetk; Hugging Face THUDM/chatglm-6b, tokenization_chatglm.py.
    """

    processor: SentencePieceProcessor
    image_tokens: int
    keeps_layout: bool
    """ChatGLM-6B: line breaks, tabs and runs of 2 to 80 spaces are tokens of their own."""

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        """The token ids of a text, as of the beginning of a line unless dummy_prefix is False."""
        if self.keeps_layout:
            text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        pieces = self.processor.encode(text if dummy_prefix else f"<n>{text}")
        return [piece + self.image_tokens for piece in pieces[0 if dummy_prefix else 2 :]]

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of token ids. ChatGLM-6B closes the space before marks, as its official code."""
        known = range(self.image_tokens, self.vocab_size)
        pieces = [int(id) for id in ids if id in known and id != self.special_tokens.pad]
        text = self.processor.decode([piece - self.image_tokens for piece in pieces])
        text = text.replace("<n>", "\n")
        if self.keeps_layout:
            text = text.replace("<|tab|>", "\t")
            text = re.sub(
                r"<\|blank_(\d+)\|>",
                lambda run: " " * int(run[1]) if 2 <= int(run[1]) <= 80 else run[0],
                text,
            )
            text = close_spaces(text)
        return text


def close_spaces(text: str) -> str:
    """What `transformers` does to decoded text: no space before marks and contractions."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text
