"""Parameter counts: by the names of the models, exact, and of their parts."""

import math
from typing import Any

import jax

from experiments.reproduce.number import Number
from glmjax.config import GLMConfig, replace
from glmjax.interop.names import family_of
from glmjax.interop.places import find_places, tensor_shapes
from glmjax.model.params import count_params, specs
from glmjax.presets import get_config

TOPIC = "Parameters"

NOMINAL = {
    # model: as its name or paper has it
    "glm-base": ("1.1e8", "GLM paper, 110M"),
    "glm-large": ("3.35e8", "THUDM/GLM README, 335M"),
    "glm-410m": ("4.10e8", "GLM paper, 410M"),
    "glm-515m": ("5.15e8", "GLM paper, 515M"),
    "glm-2b": ("2e9", "THUDM/GLM README, 2B"),
    "glm-10b": ("1.0e10", "THUDM/GLM README, 10B"),
    "glm-130b": ("1.3e11", "GLM-130B paper, 130B"),
    "chatglm-6b": ("6.2e9", "THUDM/ChatGLM-6B README, 6.2 billion"),
}
EXACT = {
    # model: total, one block, word embedding, both position tables
    "glm-base": ("109338624", "7087872", "23494656", "787968"),
    "glm-large": ("334688256", "12596224", "31326208", "1050624"),
    "glm-410m": ("410265600", "12596224", "31326208", "1050624"),
    "glm-515m": ("514632960", "15940224", "35241984", "1181952"),
    "glm-roberta-large": ("354873344", "12596224", "51511296", "1050624"),
    "glm-2b": ("1920122880", "50358272", "103022592", "4198400"),
    "glm-10b": ("9880682496", "201379840", "206045184", "8396800"),
    "glm-large-chinese": ("355659776", "12596224", "51249152", "2099200"),
    "glm-10b-chinese": ("9879633920", "201379840", "204996608", "8396800"),
    "glm-130b": ("128697794560", "1812115456", "1849688064", ""),
    "chatglm-6b": ("6173286400", "201379840", "534642688", ""),
}
EXACT_SOURCE = {
    "glm": "V D + 2 (P + 1) D + N (12 D^2 + 13 D) + 2 D, THUDM/GLM mpu/transformer.py",
    "glm-130b": "V D + N (4 D^2 + 3 D F + 9 D + 2 F) + 2 D, SwissArmyTransformer glm130B_model.py",
    "chatglm-6b": "V D + N (12 D^2 + 13 D) + 2 D, THUDM/chatglm-6b modeling_chatglm.py",
}
OTHER_TOTALS = (
    # model, output layer apart, total, source
    ("chatglm-6b", True, "6707929088", "THUDM/chatglm-6b, both matrices of words"),
    ("chatglm-6b-v0", False, "6255206400", "THUDM/chatglm-6b before April 2023, tied"),
    ("chatglm-6b-v0", True, "6871769088", "THUDM/chatglm-6b before April 2023, both matrices"),
    ("chatglm2-6b", True, "6243584000", "THUDM/chatglm2-6b"),
    ("glm-4-9b", True, "9399951360", "THUDM/glm-4-9b"),
)
PREFIXES = (
    # with the two layers, parameters
    (False, "29360128"),
    (True, "957059072"),
)
PADDED = (
    # vocabulary, tokens, a multiple of, rows, models
    ("BERT", 30524, 128, "30592", "glm-base"),
    ("RoBERTa", 50267, 128, "50304", "glm-roberta-large"),
    ("GPT-2", 50266, 128, "50304", "glm-10b"),
    ("Chinese", 50011, 128, "50048", "glm-large-chinese"),
    ("icetk", 150344, 768, "150528", "glm-130b"),
)
LINEAR = {"glm-130b": "126835752960", "chatglm-6b": "5637144576"}


def numbers() -> list[Number]:
    return [
        *(_nominal(model, *facts) for model, facts in NOMINAL.items()),
        *(number for model, printed in EXACT.items() for number in _exact(model, *printed)),
        *(_other_total(*facts) for facts in OTHER_TOTALS),
        *(_prefix(*facts) for facts in PREFIXES),
        _prefix_parts(),
        *(_linear(model, printed) for model, printed in LINEAR.items()),
        *(_padded(*facts) for facts in PADDED),
        _slim_vocabulary(),
        _feed_forward_ratio(),
        _model_card(),
    ]  # fmt: skip


def _nominal(model: str, printed: str, source: str) -> Number:
    total = count_params(get_config(model))
    return Number(TOPIC, f"{model}, by its name", printed, total, "", "count_params", source)


def _exact(model: str, total: str, block: str, words: str, positions: str) -> list[Number]:
    config = get_config(model)
    tree, source = specs(config), EXACT_SOURCE[family_of(config)]
    parts = (
        ("one block", block, count(tree.blocks) // config.num_layers),
        ("word embedding", words, count(tree.word_embedding)),
        (
            "both position tables", positions,
            count((tree.position_embedding, tree.block_position_embedding)),
        ),
    )  # fmt: skip
    return [
        Number(TOPIC, f"{model}, exact", total, count_params(config), "", "count_params", source),
        *(
            Number(TOPIC, f"{model}, {part}", printed, ours, "", "specs", "a term of the same")
            for part, printed, ours in parts
            if printed
        ),
    ]


def count(tree: Any) -> int:
    """Weights in a part of a tree of specs."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(tree))


def _other_total(model: str, apart: bool, printed: str, source: str) -> Number:
    config = get_config(model, tied_embeddings=not apart)
    words = "output layer apart" if apart else "tied"
    return Number(
        TOPIC, f"{model}, {words}", printed, count_params(config), "", "count_params", source
    )


def _prefix(projection: bool, printed: str) -> Number:
    plain = get_config("chatglm-6b")
    config = replace(plain, prefix_length=128, prefix_projection=projection)
    return Number(
        TOPIC, f"P-tuning v2 prefix of 128, {'projected' if projection else 'direct'}", printed,
        count_params(config) - count_params(plain), "", "count_params with and without",
        "THUDM/ChatGLM-6B ptuning/train.sh, modeling_chatglm.py PrefixEncoder",
    )  # fmt: skip


def _prefix_parts() -> Number:
    config = get_config("chatglm-6b", prefix_length=128, prefix_projection=True)
    prefix = specs(config).prefix
    assert prefix is not None
    return Number(
        TOPIC, "P-tuning v2 prefix of 128, its embedding and two layers",
        "524288 16781312 939753472",
        tuple(count(part) for part in (prefix.embedding, prefix.hidden, prefix.out)), "",
        "specs(config).prefix", "THUDM/chatglm-6b modeling_chatglm.py PrefixEncoder",
    )  # fmt: skip


def linear_parameters(config: GLMConfig) -> int:
    """Weights of the four matrices of all blocks: what is quantised."""
    shapes = tensor_shapes(find_places(config, family_of(config)))
    return sum(
        math.prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2
    )


def _linear(model: str, printed: str) -> Number:
    return Number(
        TOPIC, f"{model}, matrices of all blocks", printed, linear_parameters(get_config(model)),
        "", "shapes of interop.places", "THUDM/GLM-130B quantization/layers.py says which they are",
    )  # fmt: skip


def _padded(vocabulary: str, tokens: int, multiple: int, printed: str, model: str) -> Number:
    rows = -(-tokens // multiple) * multiple
    return Number(
        TOPIC, f"{vocabulary} vocabulary of {tokens:,}, padded", printed, rows, "rows",
        f"next multiple of {multiple}; the preset {model} has {get_config(model).vocab_size:,}",
        "THUDM/GLM configure_data.py" if multiple == 128
        else "GLM-130B table 11 make_vocab_size_divisible_by",
    )  # fmt: skip


def _slim_vocabulary() -> Number:
    return Number(
        TOPIC, "ChatGLM-6B vocabulary without image tokens", "130528",
        get_config("chatglm-6b-v0").vocab_size - 20_000, "rows",
        "chatglm-6b-v0's rows less 20,000", "THUDM/chatglm-6b config.json after April 2023",
    )  # fmt: skip


def _feed_forward_ratio() -> Number:
    config = get_config("glm-130b")
    return Number(
        TOPIC, "GLM-130B feed-forward width over model width", "2.667",
        config.ffn_size / config.hidden_size, "", "get_config", "GLM-130B section 2.2, 8/3",
    )  # fmt: skip


def _model_card() -> Number:
    card = get_config("glm-2b", hidden_size=4096, num_heads=64, ffn_size=4 * 4096)
    return Number(
        TOPIC, "GLM-2B with the dimensions of its model card", "2e9", count_params(card), "",
        "count_params with width 4096 and 64 heads", "Hugging Face THUDM/glm-2b README",
        known="7.5e9",
        explanation="the card repeats GLM-10B's width; THUDM/GLM model_blocklm_2B.sh has 2048 and "
        "32 heads, which gives 1.92e9",
    )  # fmt: skip
