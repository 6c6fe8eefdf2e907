"""Official names: one table per family, name -> parameter and layout.

`{n}` in a name stands for the layer. Sources: THUDM/GLM `model/modeling_glm.py` and
`mpu/transformer.py`, SwissArmyTransformer `sat/model/official/glm130B_model.py`, Hugging Face
THUDM/chatglm-6b and THUDM/chatglm2-6b `modeling_chatglm.py`, transformers `models/glm`.
"""

from typing import Literal, NamedTuple

from glmjax.config import GLMConfig

Family = Literal["glm", "glm-130b", "chatglm-6b", "chatglm2-6b", "glm-4"]

INPUT = "transformer.word_embeddings.weight"
OUTPUT = "lm_head.weight"
PREFIX = "transformer.prefix_encoder."
SCALE = "_scale"
# Rotary frequencies follow from the configuration; the official code ignores stored ones too.
INV_FREQ = "inv_freq"


class Weight(NamedTuple):
    """A parameter by its dotted name, and the layout of its official array."""

    parameter: str
    layout: str
    entry: int | None = None
    """The official array holds only this one of a parameter's keys (0) and values (1)."""


Table = dict[str, tuple[Weight, ...]]
"""Official name -> the parameters that it holds, one below the other in its rows."""


def _table(prefix: str, rows: dict[str, Weight | tuple[Weight, ...]]) -> Table:
    return {
        prefix + name: (weights,) if isinstance(weights, Weight) else weights
        for name, weights in rows.items()
    }


def _blocks(qkv: str, ffn: str) -> Table:
    """The blocks of the three old families, which differ only in how rows of the two input
    projections are ordered."""
    block = {
        "input_layernorm.weight": Weight("attention_norm.scale", "stream"),
        "input_layernorm.bias": Weight("attention_norm.bias", "stream"),
        "attention.query_key_value.weight": Weight("qkv.kernel", f"{qkv} embed"),
        "attention.query_key_value.bias": Weight("qkv.bias", qkv),
        "attention.dense.weight": Weight("attention_out.kernel", "embed (heads head)"),
        "attention.dense.bias": Weight("attention_out.bias", "stream"),
        "post_attention_layernorm.weight": Weight("ffn_norm.scale", "stream"),
        "post_attention_layernorm.bias": Weight("ffn_norm.bias", "stream"),
        "mlp.dense_h_to_4h.weight": Weight("ffn_in.kernel", f"{ffn} embed"),
        "mlp.dense_h_to_4h.bias": Weight("ffn_in.bias", ffn),
        "mlp.dense_4h_to_h.weight": Weight("ffn_out.kernel", "embed mlp"),
        "mlp.dense_4h_to_h.bias": Weight("ffn_out.bias", "stream"),
    }
    return _table(
        "transformer.layers.{n}.",
        {
            name: weight._replace(parameter=f"blocks.{weight.parameter}")
            for name, weight in block.items()
        },
    )


_FINAL_NORM = _table(
    "transformer.final_layernorm.",
    {"weight": Weight("final_norm.scale", "stream"), "bias": Weight("final_norm.bias", "stream")},
)
_WORDS = Weight("word_embedding", "vocab embed")
_OUTPUT = Weight("output_embedding", "vocab embed")
# P-tuning v2 of ChatGLM-6B; the last four exist only with prefix_projection.
_PREFIX_ENCODER = _table(
    PREFIX,
    {
        "embedding.weight": Weight("prefix.embedding", "position embed"),
        "trans.0.weight": Weight("prefix.hidden.kernel", "embed stream"),
        "trans.0.bias": Weight("prefix.hidden.bias", "stream"),
        "trans.2.weight": Weight("prefix.out.kernel", "stream embed"),
        "trans.2.bias": Weight("prefix.out.bias", "stream"),
    },
)

_HEADS, _KV_HEADS = "(heads head)", "(qkv heads head)"

_TABLES: dict[Family, Table] = {
    "glm": {
        "word_embeddings.weight": (_WORDS,),
        **_table(
            "transformer.",
            {
                "position_embeddings.weight": Weight("position_embedding", "position embed"),
                "block_position_embeddings.weight": Weight(
                    "block_position_embedding", "position embed"
                ),
            },
        ),
        **_blocks(qkv="(qkv heads head)", ffn="mlp"),
        **_FINAL_NORM,
    },
    "glm-130b": {
        INPUT: (_WORDS,),
        **_blocks(qkv="(heads qkv head)", ffn="(gate mlp)"),
        **_FINAL_NORM,
    },
    "chatglm-6b": {
        INPUT: (_WORDS,),
        **_PREFIX_ENCODER,
        **_blocks(qkv="(heads qkv head)", ffn="mlp"),
        **_FINAL_NORM,
        OUTPUT: (_OUTPUT,),
    },
    "chatglm2-6b": {
        "transformer.embedding.word_embeddings.weight": (_WORDS,),
        **_table(
            "transformer.encoder.layers.{n}.",
            {
                "input_layernorm.weight": Weight("blocks.attention_norm.scale", "stream"),
                "self_attention.query_key_value.weight": (
                    Weight("blocks.q.kernel", f"{_HEADS} embed"),
                    Weight("blocks.kv.kernel", f"{_KV_HEADS} embed"),
                ),
                "self_attention.query_key_value.bias": (
                    Weight("blocks.q.bias", _HEADS),
                    Weight("blocks.kv.bias", _KV_HEADS),
                ),
                "self_attention.dense.weight": Weight(
                    "blocks.attention_out.kernel", "embed (heads head)"
                ),
                "post_attention_layernorm.weight": Weight("blocks.ffn_norm.scale", "stream"),
                "mlp.dense_h_to_4h.weight": Weight("blocks.ffn_in.kernel", "(gate mlp) embed"),
                "mlp.dense_4h_to_h.weight": Weight("blocks.ffn_out.kernel", "embed mlp"),
            },
        ),
        "transformer.encoder.final_layernorm.weight": (Weight("final_norm.scale", "stream"),),
        "transformer.output_layer.weight": (_OUTPUT,),
    },
    "glm-4": {
        "model.embed_tokens.weight": (_WORDS,),
        **_table(
            "model.layers.{n}.",
            {
                "input_layernorm.weight": Weight("blocks.attention_norm.scale", "stream"),
                "self_attn.q_proj.weight": Weight("blocks.q.kernel", f"{_HEADS} embed"),
                "self_attn.q_proj.bias": Weight("blocks.q.bias", _HEADS),
                "self_attn.k_proj.weight": Weight("blocks.kv.kernel", f"{_HEADS} embed", 0),
                "self_attn.k_proj.bias": Weight("blocks.kv.bias", _HEADS, 0),
                "self_attn.v_proj.weight": Weight("blocks.kv.kernel", f"{_HEADS} embed", 1),
                "self_attn.v_proj.bias": Weight("blocks.kv.bias", _HEADS, 1),
                "self_attn.o_proj.weight": Weight(
                    "blocks.attention_out.kernel", "embed (heads head)"
                ),
                "post_attention_layernorm.weight": Weight("blocks.ffn_norm.scale", "stream"),
                "mlp.gate_up_proj.weight": Weight("blocks.ffn_in.kernel", "(gate mlp) embed"),
                "mlp.down_proj.weight": Weight("blocks.ffn_out.kernel", "embed mlp"),
            },
        ),
        "model.norm.weight": (Weight("final_norm.scale", "stream"),),
        OUTPUT: (_OUTPUT,),
    },
}

_FAMILIES: dict[tuple[str, str, str], Family] = {
    ("learned_2d", "pre", "gelu"): "glm",
    ("rope_1d", "deepnorm", "geglu"): "glm-130b",
    ("rope_2d", "deepnorm", "gelu"): "chatglm-6b",
    ("rope_half", "rmsnorm", "swiglu"): "glm-4",
}


def table(family: Family) -> Table:
    """The table of a family."""
    return _TABLES[family]


def name_of(family: Family, parameter: str) -> str | None:
    """The official name of a parameter that has a tensor to itself; None where there is none."""
    weights = ((name, weight.parameter) for name, (weight, *_) in _TABLES[family].items())
    return next((name for name, own in weights if own == parameter), None)


def family_of(config: GLMConfig) -> Family:
    """The family in whose names a model is written.

    Raises:
        ValueError: no official model has this combination of positions, norm, ffn and tying.
    """
    family = _FAMILIES.get((config.positions, config.norm, config.ffn))
    if family is None or not (config.tied_embeddings or name_of(family, "output_embedding")):
        raise ValueError(
            f"no official format holds a model with positions = {config.positions!r}, norm = "
            f"{config.norm!r}, ffn = {config.ffn!r}, tied_embeddings = {config.tied_embeddings}"
        )
    return family
