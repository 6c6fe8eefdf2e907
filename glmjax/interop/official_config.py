"""The config.json of an official model as a `GLMConfig`."""

import json
from pathlib import Path
from typing import Any

from glmjax.config import GLMConfig, SpecialTokens, replace
from glmjax.presets import PRESETS

# By model_type (Hugging Face) or model_class (SwissArmyTransformer).
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "glm": {"positions": "learned_2d", "norm": "pre", "ffn": "gelu"},
    "GLM130B": {"positions": "rope_1d", "norm": "deepnorm", "ffn": "geglu"},
    "chatglm": {"positions": "rope_2d", "norm": "deepnorm", "ffn": "gelu"},
}
# Options of the official code that no published model uses and that would change the model.
_FIXED = {
    "glm": {"block_position_encoding": True, "relative_encoding": False},
    "GLM130B": {"position_encoding_2d": False},
    "chatglm": {"position_encoding_2d": True},
}
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_positions",
}
_OPTIONS = {
    "layernorm_epsilon": "layer_norm_epsilon",
    "embedding_dropout_prob": "embedding_dropout",
    "attention_dropout_prob": "attention_dropout",
    "output_dropout_prob": "hidden_dropout",
}
_TOKENS = {
    "mask_token_id": "mask", "gmask_token_id": "gmask", "bos_token_id": "sop",
    "eos_token_id": "eop", "pad_token_id": "pad",
}  # fmt: skip
_COMMAND_TOKENS = {
    "MASK": "mask", "sMASK": "smask", "gMASK": "gmask", "dBLOCK": "dblock", "ENC": "cls",
    "sop": "sop", "eop": "eop", "eos": "eos", "pad": "pad",
}  # fmt: skip


def read_config(path: str | Path) -> GLMConfig:
    """The configuration in a folder's config.json.

    A model with the sizes of a preset takes from it what the file does not say.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the model is of another family, lacks a field, or uses an option that no
            published model has.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json")
    fields = json.loads(file.read_text(encoding="utf-8"))
    kind = fields.get("model_type", fields.get("model_class"))
    if kind not in _ARCHITECTURES:
        raise ValueError(f"{file} describes a {kind!r} model; known: {', '.join(_ARCHITECTURES)}")
    missing = [name for name in _SIZES if name not in fields]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    for name, value in _FIXED[kind].items():
        if fields.get(name, value) != value:
            raise ValueError(f"{file} has {name} = {fields[name]}, only {value} is supported")

    shape = _ARCHITECTURES[kind] | {ours: fields[name] for name, ours in _SIZES.items()}
    shape["ffn_size"] = fields.get("inner_hidden_size") or 4 * fields["hidden_size"]
    base = _preset(shape)
    options = {ours: fields[name] for name, ours in _OPTIONS.items() if name in fields}
    return replace(base, **shape, **options, special_tokens=_special_tokens(base, fields))


def _preset(shape: dict[str, Any]) -> GLMConfig:
    """The published model of that shape, or the default configuration."""
    for preset in PRESETS.values():
        if all(getattr(preset, name) == value for name, value in shape.items()):
            return preset
    return GLMConfig()


def _special_tokens(base: GLMConfig, fields: dict[str, Any]) -> SpecialTokens | None:
    """The preset's tokens with those that the file names put in their place."""
    ids = {ours: fields[name] for name, ours in _TOKENS.items() if fields.get(name) is not None}
    if "eop" in ids:  # ChatGLM-6B ends a document by the token that ends a piece
        ids["eos"] = ids["eop"]
    for name, id in fields.get("command_tokens", {}).items():
        if name.strip("[]") in _COMMAND_TOKENS:
            ids[_COMMAND_TOKENS[name.strip("[]")]] = id
    if base.special_tokens is not None:
        return replace(base.special_tokens, **ids)
    ids.setdefault("pad", 0)
    return SpecialTokens(**ids) if {"mask", "sop", "eop", "eos"} <= ids.keys() else None
