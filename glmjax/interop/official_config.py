"""What model an official checkpoint holds: its config.json, or else its tensors, as a `GLMConfig`.

Tensors win where both speak: tied embeddings, quantisation, a prefix and the length of position
tables are read from them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glmjax.config import GLMConfig, Quantization, SpecialTokens, replace
from glmjax.interop.names import INPUT, INV_FREQ, PREFIX, SCALE, Family
from glmjax.presets import CHINESE_ORIGINAL_TOKENS, PRESETS


class Tensor(Protocol):
    """A tensor of a checkpoint: in a file, or in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


Tensors = Mapping[str, Tensor]

_ARCHITECTURES: dict[Family, dict[str, Any]] = {
    "glm": {"positions": "learned_2d", "norm": "pre", "ffn": "gelu"},
    "glm-130b": {"positions": "rope_1d", "norm": "deepnorm", "ffn": "geglu"},
    "chatglm-6b": {"positions": "rope_2d", "norm": "deepnorm", "ffn": "gelu"},
    "chatglm2-6b": {"positions": "rope_half", "norm": "rmsnorm", "ffn": "swiglu", "biases": "qkv"},
    "glm-4": {"positions": "rope_half", "norm": "rmsnorm", "ffn": "swiglu", "biases": "qkv"},
}
# Options of the official code that no published model uses and that would change the model.
_FIXED: dict[Family, dict[str, Any]] = {
    "glm": {"block_position_encoding": True, "relative_encoding": False, "attention_scale": 1.0},
    "glm-130b": {"position_encoding_2d": False},
    "chatglm-6b": {"position_encoding_2d": True},
    "chatglm2-6b": {
        "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
    },
    "glm-4": {"hidden_act": "silu", "attention_bias": True, "partial_rotary_factor": 0.5},
}  # fmt: skip
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_positions",
}
_SIZES_OF: dict[Family, dict[str, str]] = {
    "glm": _SIZES,
    "glm-130b": _SIZES | {"inner_hidden_size": "ffn_size"},
    "chatglm-6b": _SIZES | {"inner_hidden_size": "ffn_size"},
    "chatglm2-6b": {
        "num_layers": "num_layers", "hidden_size": "hidden_size",
        "num_attention_heads": "num_heads", "multi_query_group_num": "num_kv_heads",
        "ffn_hidden_size": "ffn_size", "padded_vocab_size": "vocab_size",
        "seq_length": "max_positions",
    },
    "glm-4": {
        "num_hidden_layers": "num_layers", "hidden_size": "hidden_size",
        "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_size", "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
    },
}  # fmt: skip
_OPTIONS = {
    "layernorm_epsilon": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
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
_CODE = "THUDM/chatglm-6b--"


def read_config(
    fields: Mapping[str, Any] | None, tensors: Tensors, num_ranks: int, source: Path
) -> tuple[Family, GLMConfig]:
    """The family and configuration of a checkpoint whose ranks hold tensors like these.

    Without a config.json (`fields` None) sizes come from the tensors, and what these do not show
    from the preset of the same sizes. Tied embeddings are left as the preset has them.

    Raises:
        ValueError: the model is of another family, lacks a field, or uses an option that no
            published model has; `source` is named.
    """
    try:
        if fields is None:
            family, shape, base = _from_tensors(tensors, num_ranks)
            options: dict[str, Any] = {}
            tokens = base.special_tokens
            if base.name == "glm-10b-chinese":
                tokens = CHINESE_ORIGINAL_TOKENS
        else:
            family, shape = _from_fields(fields)
            base = _preset(shape)
            options = _numbers(fields, _OPTIONS, (int, float)) | _rotary(family, fields)
            tokens = _special_tokens(family, base, fields)
        if family == "glm" and (table := tensors.get("transformer.position_embeddings.weight")):
            shape["max_positions"] = table.shape[0] - 1
        config = replace(base, **shape, **options, special_tokens=tokens)
        config = replace(config, **prefix_settings(tensors))
        return family, replace(config, quantization=_quantization(config, tensors, num_ranks))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def official_fields(family: Family, config: GLMConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model in the words of its family; `read_config` gives the model back."""
    fields: dict[str, Any] = {
        theirs: getattr(config, ours) for theirs, ours in _SIZES_OF[family].items()
    }
    tokens = {
        name: id
        for name, id in dataclasses.asdict(config.special_tokens).items()
        if id is not None
    } if config.special_tokens else {}  # fmt: skip
    if family == "glm":
        fields |= {
            "model_type": "glm", "architectures": ["GLMModel"], "block_position_encoding": True,
            "attention_scale": 1.0, "layernorm_epsilon": config.layer_norm_epsilon,
            "embedding_dropout_prob": config.embedding_dropout,
            "attention_dropout_prob": config.attention_dropout,
            "output_dropout_prob": config.hidden_dropout,
        }  # fmt: skip
    elif family == "glm-130b":
        fields |= {
            "model_class": "GLM130B", "layernorm_order": "post", "position_encoding_2d": False,
            "layernorm_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
    elif family == "chatglm-6b":
        fields |= {
            "model_type": "chatglm", "architectures": ["ChatGLMModel"],
            "auto_map": {
                "AutoConfig": f"{_CODE}configuration_chatglm.ChatGLMConfig",
                "AutoModel": f"{_CODE}modeling_chatglm.ChatGLMForConditionalGeneration",
                "AutoModelForSeq2SeqLM": f"{_CODE}modeling_chatglm.ChatGLMForConditionalGeneration",
            },
            "position_encoding_2d": True, "layernorm_epsilon": config.layer_norm_epsilon,
            "quantization_bit": config.quantization.bits if config.quantization else 0,
            "pre_seq_len": config.prefix_length or None,
            "prefix_projection": config.prefix_projection, "use_cache": True,
        }  # fmt: skip
        fields |= {
            name: tokens[ours] for name, ours in _TOKENS.items() if ours in tokens
        }  # fmt: skip
    else:
        fields |= {
            "model_type": "glm", "architectures": ["GlmForCausalLM"], "hidden_act": "silu",
            "attention_bias": True, "partial_rotary_factor": 0.5, "head_dim": config.head_size,
            "rope_theta": config.rope_base, "rms_norm_eps": config.layer_norm_epsilon,
            "num_key_value_heads": config.kv_heads,
            "tie_word_embeddings": config.tied_embeddings, "use_cache": True,
        }  # fmt: skip
        if tokens:
            fields |= {"eos_token_id": tokens["eos"], "pad_token_id": tokens["pad"]}
    if family in ("glm", "glm-130b") and tokens:
        names = {ours: theirs for theirs, ours in _COMMAND_TOKENS.items()}
        fields["command_tokens"] = {names[name]: id for name, id in tokens.items()}
    return fields | {"torch_dtype": dtype}


def _from_fields(fields: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    kind = fields.get("model_type", fields.get("model_class"))
    family: Family
    if kind == "glm":
        family = "glm-4" if "num_hidden_layers" in fields else "glm"
    elif kind == "chatglm":
        family = "chatglm2-6b" if "ffn_hidden_size" in fields else "chatglm-6b"
    elif kind == "GLM130B":
        family = "glm-130b"
    else:
        raise ValueError(f"it describes a {kind!r} model; known: glm, chatglm, GLM130B")
    names = _SIZES_OF[family]
    missing = [name for name in names if fields.get(name) is None and name != "inner_hidden_size"]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name, value in _FIXED[family].items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} = {fields[name]!r}, only {value} is supported")
    sizes = _numbers(fields, names, int)
    for theirs, ours in names.items():
        if ours in sizes and not 0 < sizes[ours] < 2**31:
            raise ValueError(f"{theirs} = {sizes[ours]} is not a positive number")
    sizes.setdefault("ffn_size", 4 * sizes["hidden_size"])
    return family, _ARCHITECTURES[family] | sizes


def _numbers(
    fields: Mapping[str, Any], names: Mapping[str, str], kind: type | tuple[type, ...]
) -> dict[str, Any]:
    """The fields of these names that are given, under ours."""
    given = {theirs: fields[theirs] for theirs in names if fields.get(theirs) is not None}
    for theirs, value in given.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{theirs} must be a number, got {value!r}")
    return {names[theirs]: value for theirs, value in given.items()}


def _from_tensors(tensors: Tensors, num_ranks: int) -> tuple[Family, dict[str, Any], GLMConfig]:
    """Family and sizes by what the tensors show, and the preset of these sizes."""
    layer = "transformer.layers.0."
    words = tensors.get("word_embeddings.weight", tensors.get(INPUT))
    matrices = [words] + [
        tensors.get(f"{layer}{name}.weight")
        for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense")
    ]
    shapes = [matrix.shape for matrix in matrices if matrix is not None and len(matrix.shape) == 2]
    if len(shapes) < 4 or 0 in sum(shapes, ()):
        raise ValueError("there is no config.json, and the tensors are not of a GLM")
    (rows, width), (inner, _), (_, columns), (_, heads) = shapes
    packed = 2 if heads * num_ranks < width else 1
    ffn_size = columns * num_ranks * packed
    family: Family = "chatglm-6b"
    if "word_embeddings.weight" in tensors:
        family = "glm"
    elif inner * num_ranks == 2 * ffn_size:
        family = "glm-130b"
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.layers.")}
    shape = _ARCHITECTURES[family] | {
        "num_layers": len(layers), "hidden_size": width, "vocab_size": rows * num_ranks,
        "ffn_size": ffn_size,
    }  # fmt: skip
    base = _preset(shape)
    frequencies = tensors.get(f"{layer}attention.rotary_emb.{INV_FREQ}")
    if base.special_tokens is None:
        if frequencies is None or 0 in (frequencies.shape or (0,)):
            raise ValueError(
                f"no published model has num_layers = {len(layers)}, hidden_size = {width}, "
                f"vocab_size = {rows * num_ranks}, so its number of heads is unknown: put a "
                "config.json beside it"
            )
        parts = 2 if family == "glm-130b" else 4
        shape |= {"num_heads": width // (parts * frequencies.shape[0]), "max_positions": 2048}
    return family, shape, base


def _preset(shape: Mapping[str, Any]) -> GLMConfig:
    """The published model of that shape, or the default configuration."""
    for preset in PRESETS.values():
        if all(getattr(preset, name) == value for name, value in shape.items()):
            return preset
    return GLMConfig()


def _rotary(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Base of the rotary frequencies of the later relatives, and their precision."""
    if family == "chatglm2-6b":
        base = 10000 * fields.get("rope_ratio", 1)
    elif family == "glm-4":
        rope = fields.get("rope_parameters") or fields  # where transformers 5 keeps it
        base = rope.get("rope_theta", 10000)
        scaling = fields.get("rope_scaling") or rope.get("rope_type", "default")
        if (scaling, rope.get("partial_rotary_factor", 0.5)) != ("default", 0.5):
            raise ValueError(f"rotary parameters {dict(rope)} other than default are not supported")
    else:
        return {}
    return {"rope_base": float(base), "rope_frequencies": "float32"}


def _special_tokens(
    family: Family, base: GLMConfig, fields: Mapping[str, Any]
) -> SpecialTokens | None:
    """The preset's tokens with those that the file names put in their place."""
    if family in ("chatglm2-6b", "glm-4"):
        return base.special_tokens
    ids = _numbers(fields, _TOKENS if family == "chatglm-6b" else {}, int)
    if "eop" in ids:  # ChatGLM-6B ends a document by the token that ends a piece
        ids["eos"] = ids["eop"]
    if base.special_tokens is not None:  # padding is not seen, and files differ in it
        ids.pop("pad", None)
    commands = fields.get("command_tokens", {})
    if not isinstance(commands, Mapping):
        raise TypeError(f"command_tokens must be an object, got {commands!r}")
    names = {name: name.strip("[]") for name in commands}
    ids |= _numbers(
        commands,
        {name: _COMMAND_TOKENS[bare] for name, bare in names.items() if bare in _COMMAND_TOKENS},
        int,
    )
    if base.special_tokens is not None:
        return replace(base.special_tokens, **ids)
    ids.setdefault("pad", 0)
    return SpecialTokens(**ids) if {"mask", "sop", "eop", "eos"} <= ids.keys() else None


def prefix_settings(tensors: Tensors) -> dict[str, Any]:
    """Length and kind of the P-tuning v2 prefix among tensors; length 0 where there is none."""
    embedding = tensors.get(f"{PREFIX}embedding.weight")
    return {
        "prefix_length": 0 if embedding is None else embedding.shape[0],
        "prefix_projection": embedding is not None and f"{PREFIX}trans.0.weight" in tensors,
    }


def _quantization(config: GLMConfig, tensors: Tensors, num_ranks: int) -> Quantization | None:
    """How matrices with scales are stored: two columns in a byte or one."""
    name = next(
        (name for name in tensors if name + SCALE in tensors and ".dense.weight" in name), ""
    )
    if not name or len(tensors[name].shape) != 2:
        return None
    packed = tensors[name].shape[1] * num_ranks < config.num_heads * config.head_size
    return Quantization(4 if packed else 8, num_ranks)
