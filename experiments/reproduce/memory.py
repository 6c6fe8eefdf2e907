"""Bytes: of checkpoints, of weights as floats and integers, and on which GPUs they fit."""

import math
from typing import Literal, get_args

import jax
import numpy as np

from experiments.reproduce.number import Number
from experiments.reproduce.parameters import linear_parameters
from glmjax.config import GLMConfig, Quantization, replace
from glmjax.interop.names import family_of
from glmjax.interop.places import find_places, tensor_shapes
from glmjax.model.attention import KVCache
from glmjax.model.layers import rotary_frequencies
from glmjax.model.params import abstract_params, specs
from glmjax.presets import get_config

TOPIC = "Checkpoints and memory"
Weights = Literal["FP16", "INT8", "INT4"]
GIB = 2**30
INDEX = "THUDM/chatglm-6b pytorch_model.bin.index.json"
README_130B = "THUDM/GLM-130B README"

WEIGHTS: tuple[tuple[str, Weights, str, str], ...] = (
    # model, weights, bytes, source
    ("glm-130b", "FP16", "2.6e11", f"{README_130B}, 260 GB"),
    ("glm-130b", "INT4", "7e10", "GLM-130B section 4, about 70 GB"),
    ("chatglm-6b", "FP16", "12346572800", "THUDM/chatglm-6b, embedding tied"),
    ("chatglm-6b", "INT8", "6711492608", "THUDM/chatglm-6b-int8, embedding tied"),
    ("chatglm-6b", "INT4", "3892920320", "THUDM/chatglm-6b-int4, embedding tied"),
)
RANK_SHAPES = (
    # tensor of one of 8 ranks, shape
    ("transformer.word_embeddings.weight", "18816 12288"),
    ("transformer.layers.0.attention.query_key_value.weight", "4608 12288"),
    ("transformer.layers.0.attention.dense.weight", "12288 1536"),
    ("transformer.layers.0.mlp.dense_h_to_4h.weight", "8192 12288"),
    ("transformer.layers.0.mlp.dense_4h_to_h.weight", "12288 4096"),
)
INT4_SHAPES = (
    ("transformer.layers.0.attention.query_key_value.weight", "12288 2048"),
    ("transformer.layers.0.attention.dense.weight", "4096 2048"),
    ("transformer.layers.0.mlp.dense_h_to_4h.weight", "16384 2048"),
    ("transformer.layers.0.mlp.dense_4h_to_h.weight", "4096 8192"),
)
CHATGLM2_SHAPES = (
    ("transformer.encoder.layers.0.self_attention.query_key_value.weight", "4608 4096"),
    ("transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", "27392 4096"),
)
GPU_MEMORY = {"A100-40G": 40, "V100-32G": 32, "RTX 3090": 24, "RTX 2080 Ti": 11}
"""GiB, as their data sheets have it."""
GPU_BANDWIDTH = {"A100-40G": 1555e9, "RTX 3090": 936e9, "RTX 2080 Ti": 616e9}
"""Bytes per second, the same."""
HARDWARE: tuple[tuple[int, str, Weights, str], ...] = (
    # GPUs, their kind, weights, whether GLM-130B fits
    (8, "A100-40G", "FP16", "fits"),
    (8, "V100-32G", "FP16", "needs offloading"),
    (8, "V100-32G", "INT8", "fits"),
    (8, "RTX 3090", "INT8", "fits"),
    (4, "RTX 3090", "INT4", "fits"),
    (8, "RTX 2080 Ti", "INT4", "fits"),
)
CHATGLM_MEMORY: tuple[tuple[Weights, int], ...] = (
    # weights, GB for answering
    ("FP16", 13), ("INT8", 8), ("INT4", 6),
)  # fmt: skip
DECODING: tuple[tuple[int, str, Weights, float], ...] = (
    # GPUs, their kind, weights, seconds for 512 tokens
    (8, "A100-40G", "FP16", 18.77),
    (8, "A100-40G", "INT4", 17.7),
    (4, "RTX 3090", "INT4", 32.3),
    (8, "RTX 2080 Ti", "INT4", 27.29),
)


def numbers() -> list[Number]:
    return [
        *_checkpoint(), *_weights(), *_shapes(), *map(_fits, HARDWARE),
        *map(_chatglm_fits, CHATGLM_MEMORY), *map(_decoding, DECODING),
    ]  # fmt: skip


def _checkpoint() -> list[Number]:
    config = get_config("chatglm-6b-v0", tied_embeddings=False)
    shapes = tensor_shapes(find_places(config, family_of(config)))
    frequencies = rotary_frequencies(config).astype(np.float16)
    stored = sum(
        math.prod(shape) * (4 if "layernorm" in name else 2) for name, shape in shapes.items()
    )
    slim = get_config("chatglm-6b", tied_embeddings=False)
    output = tensor_shapes(find_places(slim, family_of(slim)))["lm_head.weight"]
    ranks = get_config("glm-130b")
    of_a_rank = tensor_shapes(find_places(ranks, family_of(ranks), 8))
    on_disk = 8 * 2 * sum(map(math.prod, of_a_rank.values()))
    return [
        Number(
            TOPIC, "ChatGLM-6B v0, tensors", "13744473856",
            stored + config.num_layers * frequencies.nbytes, "bytes",
            "shapes of interop.places, norms in float32, with rotary frequencies", INDEX,
        ),
        Number(
            TOPIC, "ChatGLM-6B, number of tensors", "368", len(shapes) + config.num_layers, "",
            "interop.places, with rotary frequencies of each layer", INDEX,
        ),
        Number(
            TOPIC, "ChatGLM-6B, tensors of its eight files", "368",
            sum((25, 63, 61, 63, 60, 63, 32, 1)), "", "their sum", INDEX,
        ),
        Number(
            TOPIC, "ChatGLM-6B, last file", "1069286123", 2 * math.prod(output), "bytes",
            "lm_head.weight in float16", "THUDM/chatglm-6b pytorch_model-00008-of-00008.bin",
            known="1069285376", explanation="the other 747 bytes are the zip archive around it",
        ),
        Number(
            TOPIC, "GLM-130B, files of 8 ranks", "2.6e11", float(on_disk), "bytes",
            "shapes of interop.places on 8 ranks, float16", README_130B,
        ),
    ]  # fmt: skip


def weight_bytes(model: str, weights: Weights) -> int:
    """Bytes of a model's weights: floats and scales in float16, integers packed."""
    config = quantized(model, weights)
    return sum(
        leaf.size * min(leaf.dtype.itemsize, 2) for leaf in jax.tree.leaves(abstract_params(config))
    )


def quantized(model: str, weights: Weights) -> GLMConfig:
    """A model whose weights are of this kind."""
    config = get_config(model)
    if weights == "FP16":
        return config
    return replace(config, quantization=Quantization(4 if weights == "INT4" else 8))


def cache_bytes(model: str, length: int = 2048) -> int:
    """Bytes of the keys and values of one text in 16 bits."""
    config = get_config(model, cache_dtype="bfloat16")
    cache = jax.eval_shape(lambda: KVCache.empty(config, 1, length))
    return sum(leaf.size * 2 for leaf in (cache.k_NBHSK, cache.v_NBHSK))


def _weights() -> list[Number]:
    found = [
        Number(
            TOPIC, f"{model}, {weights} weights", printed, weight_bytes(model, weights), "bytes",
            "abstract_params of the quantised model", source,
        )
        for model, weights, printed, source in WEIGHTS
    ]  # fmt: skip
    config = get_config("glm-130b")
    words = 2 * math.prod(specs(config).word_embedding.shape)
    how = "shapes of interop.places, half a byte each"
    found += [
        Number(
            TOPIC, "glm-130b, matrices of all blocks in INT4", "63.4",
            linear_parameters(config) / 2 / 1e9, "GB", how, "GLM-130B section 4",
        ),
        Number(
            TOPIC, "glm-130b, word embedding in FP16", "3.7", words / 1e9, "GB",
            "specs(config).word_embedding, two bytes each", "GLM-130B section 4",
        ),
    ]  # fmt: skip
    for model in ("glm-130b", "chatglm-6b"):
        found.append(
            Number(
                TOPIC, f"{model}, cache of 2048 tokens", "", cache_bytes(model), "bytes",
                "KVCache.empty, 16 bits, one text", "",
            )
        )  # fmt: skip
    for weights in get_args(Weights):
        found.append(
            Number(
                TOPIC, f"glm-130b, {weights} weights, exact", "", weight_bytes("glm-130b", weights),
                "bytes", "abstract_params of the quantised model", "",
            )
        )  # fmt: skip
    return found


def _shapes() -> list[Number]:
    config, int4 = get_config("glm-130b"), quantized("chatglm-6b", "INT4")
    of_a_rank = tensor_shapes(find_places(config, family_of(config), 8))
    found = [
        Number(
            TOPIC, f"GLM-130B, rank of 8, {_short(name)}", printed, of_a_rank[name], "",
            "interop.places on 8 ranks", "THUDM/GLM-130B tools/convert_tp.py",
        )
        for name, printed in RANK_SHAPES
    ]  # fmt: skip
    shapes = tensor_shapes(find_places(int4, family_of(int4)))
    found += [
        Number(
            TOPIC, f"chatglm-6b-int4, {_short(name)}", printed, shapes[name], "",
            "interop.places", "THUDM/chatglm-6b-int4 quantization.py",
        )
        for name, printed in INT4_SHAPES
    ]  # fmt: skip
    shapes = tensor_shapes(find_places(get_config("chatglm2-6b"), "chatglm2-6b"))
    found += [
        Number(
            TOPIC, f"ChatGLM2-6B, {_short(name)}", printed, shapes[name], "", "interop.places",
            "THUDM/chatglm2-6b modeling_chatglm.py",
        )
        for name, printed in CHATGLM2_SHAPES
    ]  # fmt: skip
    return found


def _short(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("encoder.").removeprefix("layers.0.")


def _fits(claim: tuple[int, str, Weights, str]) -> Number:
    """Weights and the cache of one text of 2048 tokens, split evenly; nothing else is counted."""
    gpus, kind, weights, printed = claim
    needed = (weight_bytes("glm-130b", weights) + cache_bytes("glm-130b")) / gpus / GIB
    room = GPU_MEMORY[kind]
    known, explanation = "", ""
    if printed == "needs offloading":
        known = "fits"
        explanation = (
            f"by weights and cache alone {room - needed:.1f} GiB of each GPU are left; CUDA itself, "
            "communication buffers and activations are not counted and take more"
        )
    return Number(
        TOPIC, f"GLM-130B in {weights} on {gpus} x {kind}", printed,
        "fits" if needed <= room else "does not fit", "",
        f"weights and cache take {needed:.2f} of {room} GiB of each",
        f"{README_130B}, minimum hardware", known=known, explanation=explanation,
    )  # fmt: skip


def _chatglm_fits(claim: tuple[Weights, int]) -> Number:
    weights, room = claim
    needed = (weight_bytes("chatglm-6b", weights) + cache_bytes("chatglm-6b")) / GIB
    return Number(
        TOPIC, f"ChatGLM-6B in {weights} on a GPU of {room} GB", "fits",
        "fits" if needed <= room else "does not fit", "",
        f"weights and cache of 2048 tokens take {needed:.2f} of {room} GiB",
        "THUDM/ChatGLM-6B README, GPU memory",
    )  # fmt: skip


def _decoding(measured: tuple[int, str, Weights, float]) -> Number:
    gpus, kind, weights, seconds = measured
    token = seconds / 512
    least = weight_bytes("glm-130b", weights) / gpus / GPU_BANDWIDTH[kind]
    return Number(
        TOPIC, f"GLM-130B in {weights} on {gpus} x {kind}: share of the memory's speed", "",
        100 * least / token, "%",
        f"{1e3 * token:.1f} ms a token, {1e3 * least:.1f} ms to read its weights once",
        "THUDM/GLM-130B docs, FasterTransformer, 512 tokens",
    )  # fmt: skip
