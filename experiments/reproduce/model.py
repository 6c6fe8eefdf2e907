"""Constants and test vectors of the model: DeepNorm, initial values, rotations, masks, positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reproduce.number import Number
from glmjax.config import GLMConfig
from glmjax.inference.prompts import lay_out
from glmjax.model.attention import BlankMask
from glmjax.model.layers import rotary, rotary_frequencies, rotate
from glmjax.model.params import ParamSpec, specs
from glmjax.presets import CHATGLM_V0_TOKENS, get_config

DEEPNORM = "DeepNorm and initial values"
ROTARY = "Rotary positions"
MASKS = "Masks and positions"
SAT = "SwissArmyTransformer glm130B_model.py"
HUGGING_FACE = "THUDM/chatglm-6b modeling_chatglm.py"
INIT_SOURCE = "GLM-130B section 2.2 and table 11, THUDM/LargeScale megatron/model/transformer.py"
DRAWS = 2**16
"""Initial values drawn to measure a standard deviation."""


def numbers() -> list[Number]:
    return [*_deepnorm(), *_rotary(), *_frequencies(), *_masks(), _gelu()]


def _deepnorm() -> list[Number]:
    model, chat = get_config("glm-130b"), get_config("chatglm-6b")
    params = specs(model)
    block = params.blocks
    q, k, v = initial_scales(block.qkv.kernel, 3)
    (out,), (ffn_in,), (ffn_out,), (words,) = (
        initial_scales(spec, 1)
        for spec in (
            block.attention_out.kernel, block.ffn_in.kernel, block.ffn_out.kernel,
            params.word_embedding,
        )
    )  # fmt: skip
    exact = "the initialiser of specs(config), over the normal numbers it scales"
    found = [
        Number(
            DEEPNORM, "GLM-130B, alpha", "11.832159566199232", model.residual_scale, "",
            "config.residual_scale", "sqrt(2 N), GLM-130B section 2.2",
        ),
        Number(
            DEEPNORM, "ChatGLM-6B, alpha", "7.483314773547883", chat.residual_scale, "",
            "config.residual_scale", f"sqrt(2 N), {HUGGING_FACE}",
        ),
        Number(
            DEEPNORM, "GLM-130B, beta", "0.0845154", v / q, "",
            "initial scale of values over that of queries", "(2 N)^-1/2, GLM-130B section 2.2",
        ),
        Number(
            DEEPNORM, "GLM-130B, initial scale of queries and keys", "9.0211e-3 9.0211e-3", (q, k),
            "", exact, INIT_SOURCE,
        ),
        Number(
            DEEPNORM, "GLM-130B, initial scale of values and attention output",
            "7.6242e-4 7.6242e-4", (v, out), "", exact, INIT_SOURCE,
        ),
        Number(
            DEEPNORM, "GLM-130B, initial scale of the feed-forward layer", "5.6309e-4 5.6309e-4",
            (ffn_in, ffn_out), "", exact, INIT_SOURCE,
        ),
        Number(
            DEEPNORM, "GLM-130B, initial scale of the word embedding", "0.0052", words, "", exact,
            INIT_SOURCE,
        ),
    ]  # fmt: skip
    for name, spec, printed in (
        ("attention output", block.attention_out.kernel, "7.6242e-4"),
        ("feed-forward layer", block.ffn_out.kernel, "5.6309e-4"),
        ("word embedding", params.word_embedding, "0.0052"),
    ):
        drawn = np.asarray(spec.init(jax.random.key(0), (DRAWS,)), np.float64)
        measured = _digits(float(drawn.std()), 5)
        found.append(
            Number(
                DEEPNORM, f"GLM-130B, standard deviation of the initial {name}", printed, measured,
                "", f"{DRAWS:,} initial values, key 0", INIT_SOURCE,
                uncertainty=4 * measured / math.sqrt(2 * DRAWS),
            )
        )  # fmt: skip
    large = get_config("glm-large")
    (out,) = initial_scales(specs(large).blocks.ffn_out.kernel, 1)
    found.append(
        Number(
            DEEPNORM, "GLM-Large, initial scale of output projections", "2.887e-3", out, "", exact,
            "0.02 / sqrt(2 N), THUDM/GLM mpu/transformer.py",
        )
    )  # fmt: skip
    return found


def initial_scales(spec: ParamSpec, parts: int) -> tuple[float, ...]:
    """Standard deviations of an initialiser, one for each part of a kernel [D, parts, 1, 1]."""
    key, shape = jax.random.key(0), (8, parts, 1, 1)
    scaled, normal = spec.init(key, shape), jax.random.normal(key, shape, jnp.float32)
    ratio = np.asarray(scaled, np.float64) / np.asarray(normal, np.float64)
    return tuple(_digits(float(x), 6) for x in ratio.mean((0, 2, 3)))


def _digits(number: float, count: int) -> float:
    """float32 results, to the digits that do not depend on who computed them."""
    return float(f"{number:.{count}g}")


def _rotary() -> list[Number]:
    whole = GLMConfig(
        num_layers=1, hidden_size=4, num_heads=1, ffn_size=8, positions="rope_1d",
        norm="deepnorm", ffn="geglu", rope_frequencies="float32",
    )  # fmt: skip
    half = GLMConfig(
        num_layers=1, hidden_size=8, num_heads=1, ffn_size=8, positions="rope_half",
        norm="rmsnorm", ffn="swiglu", rope_frequencies="float32",
    )  # fmt: skip
    return [
        Number(
            ROTARY, "(1, 2, 3, 4) at position 3, halves as pairs",
            "-1.413353 1.879118 -2.828857 4.058191", _rotated(whole), "",
            "layers.rotary and layers.rotate, rope_1d, to four decimals", SAT, uncertainty=5e-5,
        ),
        Number(
            ROTARY, "(1, 2, 3, 4) at position 3, neighbours as pairs",
            "-1.272233 -1.838865 2.878668 4.088187", _rotated(half), "",
            "layers.rotary and layers.rotate, rope_half, to four decimals", "transformers models/glm",
            uncertainty=5e-5,
        ),
    ]  # fmt: skip


def _rotated(config: GLMConfig) -> tuple[float, ...]:
    """The first four dimensions of a head that starts with 1, 2, 3, 4. Further decimals depend on how
    a machine rounds float32."""
    x_BTHK = jnp.arange(1.0, config.head_size + 1)[None, None, None]
    angles = rotary(config, jnp.full((1, 2, 1), 3))
    assert angles is not None
    rotated = np.asarray(rotate(config, x_BTHK, *angles), np.float64)
    return tuple(round(x, 4) for x in rotated.ravel()[:4].tolist())


def _frequencies() -> list[Number]:
    config = get_config("chatglm-6b")
    rounded = [float(x) for x in rotary_frequencies(config)]
    exact = float(rotary_frequencies(get_config("chatglm-6b", rope_frequencies="float32"))[1])
    return [
        Number(
            ROTARY, "ChatGLM-6B, first frequencies", "1 0.75 0.5625 0.4216 0.3162 0.2372",
            tuple(_digits(x, 6) for x in rounded[:6]), "", "layers.rotary_frequencies, float16",
            HUGGING_FACE,
        ),
        Number(
            ROTARY, "ChatGLM-6B, second frequency, not rounded", "0.74989", _digits(exact, 6), "",
            "layers.rotary_frequencies, float32", HUGGING_FACE,
        ),
        Number(
            ROTARY, "ChatGLM-6B, its angle at position 1000, float16 and exact", "750 749.894",
            (1000 * rounded[1], _digits(1000 * exact, 6)), "", "position x frequency", HUGGING_FACE,
        ),
        Number(
            ROTARY, "ChatGLM-6B, cosine of both", "-0.667 -0.585",
            tuple(round(math.cos(1000 * x), 4) for x in (rounded[1], exact)), "",
            "position x frequency", HUGGING_FACE,
        ),
        Number(
            ROTARY, "ChatGLM-6B, its angle at position 1999, float16 and exact", "1499 1499.04",
            (float(np.float16(1999 * rounded[1])), _digits(1999 * exact, 6)), "",
            "position x frequency, the first rounded to float16", HUGGING_FACE,
        ),
        Number(
            ROTARY, "distance of float16 angles in [1024, 2048)", "1.0",
            float(np.spacing(np.float16(1024))), "rad", "numpy.spacing", SAT,
        ),
        Number(
            ROTARY, "GLM-130B, frequencies of a head", "64",
            len(rotary_frequencies(get_config("glm-130b"))), "", "layers.rotary_frequencies", SAT,
        ),
    ]  # fmt: skip


def _masks() -> list[Number]:
    """The text `a b d [gMASK] <sop> x1 x2` of the official test vectors."""
    mask = BlankMask.from_context(jnp.array([4]), length=6)
    key_S = np.arange(6)
    start, end = (np.asarray(x)[0][:, None] for x in (mask.k_start_BT, mask.k_end_BT))
    hidden = ((key_S < start) | (key_S >= end)).astype(int)
    config = get_config("chatglm-6b")
    tokens = config.special_tokens
    assert tokens is not None and tokens.gmask is not None
    ids = [11, 12, 13, tokens.gmask, tokens.sop, 14, 15]
    row = lay_out(config, ids, [3], num_open=0)
    old = CHATGLM_V0_TOKENS
    return [
        Number(
            MASKS, "ChatGLM-6B, hidden keys of 6 tokens behind a context of 4",
            "0 0 0 0 1 1 " * 4 + "0 0 0 0 0 1 0 0 0 0 0 0", tuple(hidden.ravel().tolist()), "",
            "BlankMask.from_context", HUGGING_FACE,
        ),
        Number(
            MASKS, "ChatGLM-6B, positions of 3 tokens, [gMASK], <sop> and 2 tokens",
            "0 1 2 3 3 3 3", tuple(row.positions_2T[0].tolist()), "", "prompts.lay_out",
            HUGGING_FACE,
        ),
        Number(
            MASKS, "ChatGLM-6B, block positions of the same", "0 0 0 0 1 2 3",
            tuple(row.positions_2T[1].tolist()), "", "prompts.lay_out", HUGGING_FACE,
        ),
        Number(
            MASKS, "ChatGLM-6B, [MASK] [gMASK] [sMASK] <sop> <eop>",
            "130000 130001 130002 130004 130005",
            tuple(x - 20_000 for x in (*old.masks[::2], *old.masks[1:2], old.sop, old.eop)), "",
            "those of v0 less 20,000 image tokens", "THUDM/chatglm-6b config.json",
        ),
    ]  # fmt: skip


def _gelu() -> Number:
    x = np.linspace(-6, 6, 24_001, dtype=np.float32)
    tanh, erf = (jax.nn.gelu(x, approximate=approximate) for approximate in (True, False))
    largest = float(np.abs(np.asarray(tanh) - np.asarray(erf)).max())
    return Number(
        MASKS, "largest difference of GELU's two forms", "5e-4", _digits(largest, 3), "",
        "jax.nn.gelu on [-6, 6]", "THUDM/GLM mpu/transformer.py (tanh), THUDM/glm-10b (erf)",
    )  # fmt: skip
