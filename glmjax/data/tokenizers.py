"""SentencePiece vocabularies: training, loading, and text that holds blanks.

Special tokens are control pieces: no text encodes to them, so a document that spells "[MASK]" cannot
open a blank. Only `encode_prompt`, which reads what a user typed, turns the words into blanks.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from glmjax.config import GLMConfig, SpecialTokens
from glmjax.data.cache import hash_rank, write_whole
from glmjax.presets import TRAINED_TOKENS

UNKNOWN = 1
PIECES = {
    "pad": "[PAD]", "eos": "<|endoftext|>", "cls": "[CLS]", "mask": "[MASK]", "smask": "[sMASK]",
    "gmask": "[gMASK]", "sop": "<|startofpiece|>", "eop": "<|endofpiece|>", "dblock": "[dBLOCK]",
}  # fmt: skip
"""How special tokens are spelled, in order of their ids in a trained vocabulary."""
SENTENCE_ENDS = frozenset(".?!;:\u3002\uff1f\uff01\uff1b\u2026\n")
SAMPLE_SIZE = 4_000_000
"""Characters of text that a vocabulary is trained on."""
# SentencePiece writes a space as U+2581 and cannot tell it from the character itself.
SPACE_SIGN = "\u2581"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back; `decode(encode(text)) == text` for a trained vocabulary."""

    processor: SentencePieceProcessor
    special_tokens: SpecialTokens
    is_sentence_end: np.ndarray
    """bool [V]: tokens whose text holds a mark that ends a sentence (THUDM/GLM, blocklm_utils.py)."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens (V), special tokens included."""
        return self.processor.get_piece_size()

    @property
    def digest(self) -> str:
        """A name for the vocabulary that changes with its content."""
        return hashlib.sha256(self.processor.serialized_model_proto()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Special tokens spelled in it are ordinary text."""
        first, *rest = self.processor.encode(text.split(SPACE_SIGN))
        spelled = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        return first + [id for ids in rest for id in spelled + ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Special tokens and ids past the vocabulary have none."""
        return self.processor.decode([int(id) for id in ids if id < self.vocab_size])

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a text in which [MASK], [sMASK] and [gMASK] are blanks.

        White space before a blank is dropped, as in THUDM/GLM (data_utils/tokenization.py).
        """
        masks = {
            PIECES[name]: getattr(self.special_tokens, name) for name in ("mask", "smask", "gmask")
        }
        ids: list[int] = []
        for part in re.split(r"\s*(\[[sg]?MASK\])", text):
            ids += [masks[part]] if part in masks else self.encode(part)
        return ids

    def save(self, path: Path) -> None:
        """Writes the SentencePiece model file, whole or not at all."""
        write_whole(path, self.processor.serialized_model_proto())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a SentencePiece model file that `train_tokenizer` made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a SentencePiece model, or its special tokens are not ours.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        processor = SentencePieceProcessor(model_proto=path.read_bytes())
        size = processor.get_piece_size()
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model") from None
    for name, piece in PIECES.items():
        id = getattr(TRAINED_TOKENS, name)
        found = processor.id_to_piece(id) if id < size else "nothing"
        if found != piece:
            raise ValueError(
                f"{path} was not trained by glmjax: token {id} is {found!r} instead of {piece!r}"
            )
    return _tokenizer(processor)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A unigram vocabulary with byte fallback, the same for the same documents.

    Raises:
        ValueError: the documents support no vocabulary of that size.
    """
    sample = _sample(documents, SAMPLE_SIZE)
    lines = [line for text in sample for line in text.split("\n") if line]
    if not lines:
        raise ValueError(
            f"there is no text to train a vocabulary of data.vocab_size = {vocab_size} on"
        )
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            pad_id=TRAINED_TOKENS.pad,
            unk_id=UNKNOWN,
            eos_id=TRAINED_TOKENS.eos,
            bos_id=TRAINED_TOKENS.cls,
            pad_piece=PIECES["pad"],
            unk_piece="[UNK]",
            eos_piece=PIECES["eos"],
            bos_piece=PIECES["cls"],
            control_symbols=[PIECES[name] for name in PIECES if name not in ("pad", "eos", "cls")],
            user_defined_symbols=["\n"],
            # Every character survives: no Unicode normalisation, no trimming of white space.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SAMPLE_SIZE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size, sum(map(len, lines)))) from None
    return _tokenizer(SentencePieceProcessor(model_proto=model.getvalue()))


def check_vocabulary(model: GLMConfig, tokenizer: Tokenizer) -> None:
    """Checks that the model has a row for every token.

    Raises:
        ValueError: its vocabulary is smaller than the tokenizer's.
    """
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}"
        )


def _tokenizer(processor: SentencePieceProcessor) -> Tokenizer:
    texts = (processor.decode([id]) for id in range(processor.get_piece_size()))
    ends = np.array([not SENTENCE_ENDS.isdisjoint(text) for text in texts])
    return Tokenizer(processor, TRAINED_TOKENS, ends)


def _sample(documents: Iterable[str], size: int) -> list[str]:
    """Documents of `size` characters in all, those of the lowest hash rank, whatever their order."""
    kept: list[tuple[float, str]] = []
    total = 0
    for text in documents:
        text = text[:size]
        heapq.heappush(kept, (-hash_rank(text), text))
        total += len(text)
        while total > size:
            total -= len(heapq.heappop(kept)[1])
    return [text for _, text in sorted(kept)]


def _explain(message: str, vocab_size: int, characters: int) -> str:
    """SentencePiece's complaint about the size of a vocabulary, in the words of our settings."""
    if found := re.search(r"too high .* <= (\d+)", message):
        return (
            f"a corpus of {characters} characters is too small for data.vocab_size = {vocab_size}; "
            f"it supports at most {found[1]}"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"data.vocab_size = {vocab_size} is too small: special tokens, bytes and the characters "
            f"of the corpus need {found[1]}"
        )
    return f"SentencePiece could not train a vocabulary of {vocab_size}: {message}"
