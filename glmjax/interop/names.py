"""Official names: one table per family, name -> parameter and layout.

`{n}` in a name stands for the layer. Sources: THUDM/GLM `model/modeling_glm.py` and
`mpu/transformer.py`, SwissArmyTransformer `sat/model/official/glm130B_model.py`, Hugging Face
THUDM/chatglm-6b `modeling_chatglm.py`.
"""

from typing import NamedTuple

from glmjax.config import GLMConfig

INPUT = "transformer.word_embeddings.weight"
OUTPUT = "lm_head.weight"
PREFIX = "transformer.prefix_encoder."
SCALE = "_scale"
# Rotary frequencies follow from the configuration; the official code ignores stored ones too.
INV_FREQ = ".rotary_emb.inv_freq"


class Weight(NamedTuple):
    """A parameter by its dotted name, and the layout of its official array."""

    parameter: str
    layout: str


def _layers(qkv: str, ffn: str) -> dict[str, Weight]:
    """The blocks, which differ only in how rows of the two input projections are ordered."""
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
    return {
        f"transformer.layers.{{n}}.{name}": Weight(f"blocks.{parameter}", layout)
        for name, (parameter, layout) in block.items()
    }


_FINAL_NORM = {
    "transformer.final_layernorm.weight": Weight("final_norm.scale", "stream"),
    "transformer.final_layernorm.bias": Weight("final_norm.bias", "stream"),
}

GLM = {
    "word_embeddings.weight": Weight("word_embedding", "vocab embed"),
    "transformer.position_embeddings.weight": Weight("position_embedding", "position embed"),
    "transformer.block_position_embeddings.weight": Weight(
        "block_position_embedding", "position embed"
    ),
    **_layers(qkv="(qkv heads head)", ffn="mlp"),
    **_FINAL_NORM,
}
GLM_130B = {
    INPUT: Weight("word_embedding", "vocab embed"),
    **_layers(qkv="(heads qkv head)", ffn="(gate mlp)"),
    **_FINAL_NORM,
}
CHATGLM_6B = {
    INPUT: Weight("word_embedding", "vocab embed"),
    **_layers(qkv="(heads qkv head)", ffn="mlp"),
    **_FINAL_NORM,
    OUTPUT: Weight("output_embedding", "vocab embed"),
}
# P-tuning v2 of ChatGLM-6B; the last four exist only with prefix_projection.
PREFIX_ENCODER = {
    f"{PREFIX}embedding.weight": Weight("embedding", "position embed"),
    f"{PREFIX}trans.0.weight": Weight("hidden.kernel", "embed stream"),
    f"{PREFIX}trans.0.bias": Weight("hidden.bias", "stream"),
    f"{PREFIX}trans.2.weight": Weight("out.kernel", "stream embed"),
    f"{PREFIX}trans.2.bias": Weight("out.bias", "stream"),
}

_FAMILIES = {
    ("learned_2d", "pre", "gelu"): GLM,
    ("rope_1d", "deepnorm", "geglu"): GLM_130B,
    ("rope_2d", "deepnorm", "gelu"): CHATGLM_6B,
}


def family(config: GLMConfig) -> dict[str, Weight]:
    """The table of the family that a model belongs to.

    Raises:
        ValueError: no official model has this combination of positions, norm, ffn and tying.
    """
    table = _FAMILIES.get((config.positions, config.norm, config.ffn))
    if table is None or not (config.tied_embeddings or OUTPUT in table):
        raise ValueError(
            f"no official format holds a model with positions = {config.positions!r}, norm = "
            f"{config.norm!r}, ffn = {config.ffn!r}, tied_embeddings = {config.tied_embeddings}"
        )
    return table
