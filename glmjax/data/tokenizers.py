"""Vocabularies: loading any of the family, training one's own."""

import heapq
import io
import re
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from glmjax.config import GLMConfig, SpecialTokens
from glmjax.data.cache import hash_rank
from glmjax.data.vocabularies import SPELLED, Tokenizer, TrainedTokenizer, trained_tokenizer
from glmjax.data.vocabulary_files import (
    ORIGINS,
    find_vocabulary,
    read_byte_pairs,
    read_sentencepiece,
    read_word_pieces,
)
from glmjax.presets import TRAINED_TOKENS

UNKNOWN = 1
SAMPLE_SIZE = 4_000_000
"""Characters of text that a vocabulary is trained on."""


def load_tokenizer(path: str | Path, special_tokens: SpecialTokens | None = None) -> Tokenizer:
    """Reads a vocabulary of the family: its file, or the folder that holds it.

    Content tells what it is: tokenizer.model of glmjax, vocab.json beside merges.txt (GPT-2 or
    RoBERTa), vocab.txt (BERT), cog-pretrain.model (GLM-Chinese) or ice_text.model. The last serves
    three models with other ids in each; `special_tokens`, those of the model, say which one, or the
    tokenizer_config.json of ChatGLM-6B beside it.

    Raises:
        FileNotFoundError: a file is missing; says which, and where it comes from.
        ValueError: it is none of these, or not the vocabulary of a model with special_tokens.
    """
    path = Path(path).expanduser()
    file = find_vocabulary(path, special_tokens) if path.is_dir() else path
    if not file.is_file():
        origins = [origin for origin in ORIGINS.values() if file.name in origin.files]
        source = f"; it comes from {origins[0].source}" if origins else ""
        raise FileNotFoundError(f"there is no tokenizer file {file}{source}")
    if file.suffix == ".model":
        tokenizer = read_sentencepiece(file, special_tokens)
    elif file.suffix == ".json":
        tokenizer = read_byte_pairs(file)
    elif file.suffix == ".txt":
        tokenizer = read_word_pieces(file)
    else:
        raise ValueError(f"{file} is no vocabulary: its name ends in none of .model, .json, .txt")
    if special_tokens not in (None, tokenizer.special_tokens):
        raise ValueError(
            f"{file} is the vocabulary of {ORIGINS[tokenizer.special_tokens].models} with "
            f"{tokenizer.special_tokens}, but the model has {special_tokens}"
        )
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> TrainedTokenizer:
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
            pad_piece=SPELLED["pad"],
            unk_piece="[UNK]",
            eos_piece=SPELLED["eos"],
            bos_piece=SPELLED["cls"],
            control_symbols=[
                SPELLED[name] for name in SPELLED if name not in ("pad", "eos", "cls")
            ],
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
    return trained_tokenizer(SentencePieceProcessor(model_proto=model.getvalue()))


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
