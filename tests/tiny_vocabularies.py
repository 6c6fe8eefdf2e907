"""Stand-ins for the official vocabulary files: as large, special tokens at their ids, few real pieces."""

import json
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import pre_tokenizers

MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    "\u0120 w",
    "o r",
    "\u0120w or",
    "l d",
    "\u0120wor ld",
    "1 2",
]
WORDS = ["hello", "world", "cafe", "##s", "##o", "is", "1", "##2", ".", ",", "!", "?", ";"]
SENTENCES = ["hello world. the café is open", "12 worlds and one more hello; why not?"] * 20
ICE_MARKS = {7: ".", 31: "?", 35: "!", 27: ";", 12: ":", 63823: "\u3002", 125670: "\u2581..."}
SPECIAL_PIECES = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<unused_0>",
    "<sop>",
    "<eop>",
    "<ENC>",
    "<dBLOCK>",
]


def write_byte_pairs(folder: Path, kind: str, prefix: str = "") -> Path:
    """vocab.json and merges.txt as of "gpt2" or "roberta"; the path of the first."""
    first, last, size = {
        "gpt2": ([], "<|endoftext|>", 50257),
        "roberta": (["<s>", "<pad>", "</s>", "<unk>"], "<mask>", 50265),
    }[kind]
    pieces = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [merge.replace(" ", "") for merge in MERGES]
    pieces += [f"filler{id}" for id in range(len(pieces), size - 1)] + [last]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{prefix}vocab.json"
    file.write_text(json.dumps({piece: id for id, piece in enumerate(pieces)}))
    (folder / f"{prefix}merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return file


def write_word_pieces(folder: Path) -> Path:
    """vocab.txt as of BERT."""
    pieces = ["[PAD]", *(f"[unused{id}]" for id in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += WORDS
    pieces += [f"filler{id}" for id in range(len(pieces), 30522)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(pieces) + "\n")
    return file


def write_chinese(folder: Path) -> Path:
    """cog-pretrain.model as of GLM-Chinese."""
    model = _train(user_defined_symbols=["<n>"])
    _fill(model, 50000)
    return _write(folder / "cog-pretrain.model", model)


def write_ice_text(folder: Path, **config) -> Path:
    """ice_text.model of GLM-130B and ChatGLM-6B; tokenizer_config.json if there are fields for it."""
    model = _train(pad_id=3, user_defined_symbols=["<n>"], byte_fallback=True)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = [piece for piece in model.pieces if piece.type != kinds.BYTE]
    space = next(piece for piece in pieces if piece.piece == "\u2581")
    pieces.remove(space)
    pieces.insert(5, space)
    del model.pieces[:]
    model.pieces.extend(pieces)
    _fill(model, 130000)
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    for id, mark in ICE_MARKS.items():
        if mark in ids:
            model.pieces[ids[mark]].CopyFrom(model.pieces[id])
        model.pieces[id].CopyFrom(model.SentencePiece(piece=mark, score=-5.0))
    blanks = ["<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
    _append(model, SPECIAL_PIECES, kinds.CONTROL)
    _append(model, blanks, kinds.USER_DEFINED)
    _append(model, [f"<0x{byte:02X}>" for byte in range(256)], kinds.BYTE)
    if config:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return _write(folder / "ice_text.model", model)


def _train(**settings) -> sentencepiece_model_pb2.ModelProto:
    content = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=content, minloglevel=2,
        vocab_size=320 if settings.get("byte_fallback") else 60, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    return sentencepiece_model_pb2.ModelProto.FromString(content.getvalue())


def _fill(model, size: int) -> None:
    _append(model, [f"filler{id}" for id in range(len(model.pieces), size)], 1)


def _append(model, pieces: list[str], kind: int) -> None:
    model.pieces.extend(
        model.SentencePiece(piece=piece, score=-100.0, type=kind) for piece in pieces
    )


def _write(file: Path, model) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.SerializeToString())
    return file
