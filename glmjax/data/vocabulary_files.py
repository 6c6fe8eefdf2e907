"""Vocabulary files: which there are, where they come from, and what tells them apart."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from glmjax.config import SpecialTokens
from glmjax.data.vocabularies import (
    SPACE_SIGN,
    SPELLED,
    BytePairTokenizer,
    ChineseTokenizer,
    IceTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    ends_of_sentences,
    trained_tokenizer,
)
from glmjax.presets import (
    BERT_TOKENS,
    CHATGLM_TOKENS,
    CHATGLM_V0_TOKENS,
    CHINESE_ORIGINAL_TOKENS,
    CHINESE_TOKENS,
    GPT2_TOKENS,
    ICETK_TOKENS,
    ROBERTA_TOKENS,
    TRAINED_TOKENS,
)

logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Where the vocabulary of a model comes from."""

    models: str
    files: tuple[str, ...]
    """Names that its first file goes by."""
    source: str


_BERT_FILES = ("vocab.txt", "bert-base-uncased-vocab.txt", "bert-large-uncased-vocab.txt")
_CHINESE_FILES = ("cog-pretrain.model",)
_CHINESE = "github.com/THUDM/GLM, folder chinese_sentencepiece"
_ICE_FILES = ("ice_text.model",)
_GLM = "github.com/THUDM/GLM, folder .pytorch_pretrained_bert"
_CHATGLM = "Hugging Face THUDM/chatglm-6b"
ORIGINS = {
    TRAINED_TOKENS: Origin("glmjax", ("tokenizer.model",), "a run of glmjax train"),
    BERT_TOKENS: Origin("GLM Base, Large, 410M and 515M", _BERT_FILES, _GLM),
    ROBERTA_TOKENS: Origin("GLM-RoBERTa", ("vocab.json", "roberta-vocab.json"), _GLM),
    GPT2_TOKENS: Origin("GLM 2B and 10B", ("vocab.json", "gpt2-vocab.json"), _GLM),
    CHINESE_TOKENS: Origin("GLM-Chinese", _CHINESE_FILES, _CHINESE),
    CHINESE_ORIGINAL_TOKENS: Origin("GLM-10B-Chinese of THUDM/GLM", _CHINESE_FILES, _CHINESE),
    ICETK_TOKENS: Origin("GLM-130B", _ICE_FILES, _CHATGLM),
    CHATGLM_TOKENS: Origin("ChatGLM-6B", _ICE_FILES, _CHATGLM),
    CHATGLM_V0_TOKENS: Origin("ChatGLM-6B of before April 2023", _ICE_FILES, _CHATGLM),
}

ICE_TEXT_SHA256 = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
# Pieces of ice_text.model that end a sentence for GLM-130B.
_ICE_SENTENCE_ENDS = {
    7: ".", 12: ":", 27: ";", 31: "?", 35: "!", 63823: "\u3002", 125670: "\u2581...",
}  # fmt: skip

_ICE_KINDS = {
    ("ChatGLMTokenizer", "0"): CHATGLM_TOKENS,
    ("ChatGLMTokenizer", "20000"): CHATGLM_V0_TOKENS,
    ("icetk-glm-130B", "20000"): ICETK_TOKENS,
}
"""By tokenizer_class and num_image_tokens of tokenizer_config.json."""

# What tells a vocabulary by its content: tokens by id; None is behind the last.
_TRAINED_PIECES = {getattr(TRAINED_TOKENS, name): piece for name, piece in SPELLED.items()}
_BERT_PIECES = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 30522: None}
_GPT2_PIECES = {50256: "<|endoftext|>", 50257: None}
_ROBERTA_PIECES = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", 50264: "<mask>", 50265: None}
_CHINESE_PIECES = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<n>", 50000: None}
_ICE_PIECES = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "<pad>", 4: "<n>", 5: SPACE_SIGN,
    130000: "[MASK]", 130001: "[gMASK]", 130002: "[sMASK]", 130004: "<sop>", 130005: "<eop>",
    130006: "<ENC>", 130007: "<dBLOCK>", 130008: "<|tab|>",
    **{130007 + length: f"<|blank_{length}|>" for length in range(2, 81)},
    **{130088 + byte: f"<0x{byte:02X}>" for byte in range(256)},
    **_ICE_SENTENCE_ENDS, 130344: None,
}  # fmt: skip


def find_vocabularies(folder: Path, special_tokens: SpecialTokens | None = None) -> list[Path]:
    """The vocabulary files in a folder; given special_tokens, those that their model may have."""
    origins = [ORIGINS[special_tokens]] if special_tokens in ORIGINS else ORIGINS.values()
    names = dict.fromkeys(name for origin in origins for name in origin.files)
    return [folder / name for name in names if (folder / name).is_file()]


def find_vocabulary(folder: Path, special_tokens: SpecialTokens | None) -> Path:
    """The vocabulary file in a folder, for a model with special_tokens if given.

    Raises:
        FileNotFoundError: there is none; says where it comes from.
        ValueError: there are several.
    """
    found = find_vocabularies(folder, special_tokens)
    if not found and special_tokens in ORIGINS:
        models, files, source = ORIGINS[special_tokens]
        raise FileNotFoundError(
            f"{folder} has no {' or '.join(files)}, the vocabulary of {models}; it comes from {source}"
        )
    if not found:
        known = (f"{origin.files[0]} of {origin.models}" for origin in ORIGINS.values())
        raise FileNotFoundError(f"{folder} has no vocabulary; known are {', '.join(known)}")
    if len(found) > 1 and special_tokens not in ORIGINS:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder} has several vocabularies, {names}; name one of these files")
    return found[0]


def read_sentencepiece(file: Path, special_tokens: SpecialTokens | None) -> Tokenizer:
    """A SentencePiece model: glmjax's own, cog-pretrain.model or ice_text.model."""
    content = file.read_bytes()
    try:
        processor = SentencePieceProcessor(model_proto=content)
        pieces = [processor.id_to_piece(id) for id in range(processor.get_piece_size())]
    except RuntimeError:
        raise ValueError(f"{file} is not a SentencePiece model") from None
    kinds: dict[str, Mapping[int, str | None]] = {
        "glmjax's own": _TRAINED_PIECES,
        "cog-pretrain.model": _CHINESE_PIECES,
        "ice_text.model": _ICE_PIECES,
    }
    kind = _recognise(file, pieces, kinds)
    if kind == "glmjax's own":
        return trained_tokenizer(processor)
    if kind == "ice_text.model":
        return _ice_tokenizer(file, processor, _ice_tokens(file, special_tokens))
    original = special_tokens == CHINESE_ORIGINAL_TOKENS
    tokens = CHINESE_ORIGINAL_TOKENS if original else CHINESE_TOKENS
    commands = _commands(tokens, unknown=50004, separator=50001)
    ends = ends_of_sentences(_with_commands(pieces, commands))
    return ChineseTokenizer({kind: content}, tokens, ends, commands, processor)


def read_byte_pairs(file: Path) -> Tokenizer:
    """A byte-level BPE vocabulary in JSON and its merges beside it: GPT-2's or RoBERTa's."""
    ids = _read_json(file)
    pieces = list(ids)
    if list(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{file} does not number its tokens 0, 1, 2, ...")
    kind = _recognise(file, pieces, {"GPT-2's": _GPT2_PIECES, "RoBERTa's": _ROBERTA_PIECES})
    if kind == "GPT-2's":
        tokens, commands = GPT2_TOKENS, _commands(GPT2_TOKENS, unknown=50262, separator=50261)
    else:
        tokens, commands = ROBERTA_TOKENS, _commands(ROBERTA_TOKENS, unknown=3, separator=2)

    merges = file.with_name(file.name.removesuffix("vocab.json") + "merges.txt")
    if not merges.is_file():
        raise FileNotFoundError(
            f"{file} has no {merges.name} beside it; both come from {ORIGINS[tokens].source}"
        )
    lines = [line for line in _read_lines(merges) if line and not line.startswith("#version")]
    pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    needed = {piece for pair in pairs for piece in (*pair, "".join(pair))}
    needed |= set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if missing := needed - ids.keys():
        raise ValueError(f"{file} has no token {min(missing)!r}, which bytes or {merges.name} need")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    files = {"vocab.json": file.read_bytes(), "merges.txt": merges.read_bytes()}
    ends = ends_of_sentences(_with_commands(pieces, commands))
    return BytePairTokenizer(files, tokens, ends, commands, model)


def read_word_pieces(file: Path) -> Tokenizer:
    """BERT's lower-cased word pieces, one a line."""
    pieces = _read_lines(file)
    _recognise(file, pieces, {"BERT's": _BERT_PIECES})
    ids = {piece: id for id, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    model.normalizer = tokenizers.normalizers.BertNormalizer(strip_accents=True, lowercase=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    commands = _commands(BERT_TOKENS, unknown=100, separator=102)
    # The end of a document is the padding, and is spelled so.
    commands[SPELLED["pad"]] = commands.pop(SPELLED["eos"])
    pieces = _with_commands(pieces, commands)
    return WordPieceTokenizer(
        {"vocab.txt": file.read_bytes()}, BERT_TOKENS, ends_of_sentences(pieces), commands,
        model, pieces,
    )  # fmt: skip


def _ice_tokenizer(
    file: Path, processor: SentencePieceProcessor, tokens: SpecialTokens
) -> IceTokenizer:
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != ICE_TEXT_SHA256:
        logger.info("%s is not the official file, but its special tokens are the same", file)
    image_tokens = tokens.mask - 130000
    ends = np.zeros(image_tokens + processor.get_piece_size(), bool)
    ends[[image_tokens + piece for piece in _ICE_SENTENCE_ENDS]] = True
    name = next(name for name, kind in _ICE_KINDS.items() if kind == tokens)
    config = {"tokenizer_class": name[0], "num_image_tokens": image_tokens}
    files = {"tokenizer_config.json": json.dumps(config).encode(), "ice_text.model": content}
    return IceTokenizer(files, tokens, ends, processor, image_tokens, tokens != ICETK_TOKENS)


def _ice_tokens(file: Path, special_tokens: SpecialTokens | None) -> SpecialTokens:
    """The special tokens of the model that ice_text.model serves here."""
    # GLM-130B has no such file of its own; its users find ChatGLM-6B's beside ice_text.model.
    if special_tokens == ICETK_TOKENS:
        return ICETK_TOKENS
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        fields = _read_json(config)
        # 20000 is what the official class counts where the file does not say.
        name = str(fields.get("tokenizer_class")), str(fields.get("num_image_tokens", 20000))
        if name not in _ICE_KINDS:
            raise ValueError(
                f"{config} has tokenizer_class = {name[0]} and num_image_tokens = {name[1]}; "
                f"known are {', '.join(map(' and '.join, _ICE_KINDS))}"
            )
        return _ICE_KINDS[name]
    if special_tokens is None or special_tokens not in _ICE_KINDS.values():
        raise ValueError(
            f"{file} serves GLM-130B and both ChatGLM-6B vocabularies, with other ids in each; put "
            "the tokenizer_config.json of the model beside it"
        )
    return special_tokens


def _recognise(
    file: Path, pieces: Sequence[str], kinds: Mapping[str, Mapping[int, str | None]]
) -> str:
    """The kind of vocabulary whose pieces stand where they should."""
    differences = []
    for kind, expected in kinds.items():
        found = {id: pieces[id] if id < len(pieces) else None for id in expected}
        wrong = next((id for id in expected if found[id] != expected[id]), None)
        if wrong is None:
            return kind
        differences.append(
            f"{kind} (token {wrong} is {found[wrong]!r} instead of {expected[wrong]!r})"
        )
    raise ValueError(f"{file} is no known vocabulary: not {', not '.join(differences)}")


def _commands(tokens: SpecialTokens, *, unknown: int, separator: int) -> dict[str, int]:
    """Special tokens by spelling."""
    named = {SPELLED[name]: getattr(tokens, name) for name in SPELLED if name != "pad"}
    known = {token: id for token, id in named.items() if id is not None}
    return known | {"[UNK]": unknown, "[SEP]": separator}


def _with_commands(pieces: Sequence[str], commands: Mapping[str, int]) -> list[str]:
    """All tokens by id."""
    spelled = {id: token for token, id in commands.items()}
    size = max(len(pieces), 1 + max(spelled))
    return [spelled.get(id, pieces[id] if id < len(pieces) else "") for id in range(size)]


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads("\n".join(_read_lines(file)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if type(fields) is not dict:
        raise ValueError(f"{file} is not a JSON object")
    return fields
