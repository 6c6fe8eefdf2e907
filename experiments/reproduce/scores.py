"""Scores that follow from published scores, and how they change with size."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.reproduce.number import Number
from glmjax.interop.quantization import Integers, dequantize, pack_int4, quantize, unpack_int4
from glmjax.model.params import count_params
from glmjax.presets import get_config

QUANTIZATION = "Quantisation"
SCORES = "Scores"
TABLE_10 = "GLM-130B table 10"

GLM_MODELS = ("glm-base", "glm-large", "glm-2b", "glm-10b", "glm-130b")
GLM_LAMBADA = {
    # accuracy in percent by weights, for the models above
    "FP16": (29.36, 48.51, 68.19, 72.35, 80.21),
    "absmax INT8": (29.25, 48.69, 68.12, 72.37, 80.21),
    "absmax INT4": (3.26, 38.25, 62.62, 71.03, 79.47),
    "zero-point INT4": (5.45, 42.64, 64.74, 70.50, 80.63),
}
BLOOM_SIZES = (5.6e8, 1.1e9, 3e9, 7.1e9, 1.76e11)
"""By the models' names: 560M, 1B1, 3B, 7B1, 176B."""
BLOOM_LAMBADA = {
    "FP16": (31.40, 40.68, 48.30, 54.91, 64.37),
    "absmax INT8": (26.12, 40.69, 48.83, 55.33, 65.03),
    "absmax INT4": (21.37, 35.80, 40.95, 46.75, math.nan),
    "zero-point INT4": (11.51, 26.51, 41.65, 46.63, 48.26),
}

PILE = {
    # part: bits per byte of GLM-130B (its table of the Pile), weight in percent (Pile paper, table 1)
    "Pile-CC": (0.771, 18.11), "PubMed Central": (0.510, 14.40), "Books3": (0.803, 12.07),
    "ArXiv": (0.570, 8.96), "Github": (0.329, 7.59), "FreeLaw": (0.499, 6.12),
    "StackExchange": (0.611, 5.13), "USPTO": (0.537, 3.65), "PubMed Abstracts": (0.610, 3.07),
    "Gutenberg": (0.821, 2.17), "OpenSubtitles": (0.889, 1.55), "DM Mathematics": (0.786, 1.24),
    "Ubuntu IRC": (0.977, 0.88), "HackerNews": (0.873, 0.62), "YoutubeSubtitles": (0.746, 0.60),
    "PhilPapers": (0.766, 0.38), "NIH ExPorter": (0.614, 0.30), "Enron Emails": (0.604, 0.14),
}  # fmt: skip


class Fit(NamedTuple):
    """y = intercept + slope x by least squares."""

    slope: float
    intercept: float
    r_squared: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The line through points, and the share of their variance that it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    total = np.asarray(y) - np.mean(y)
    return Fit(float(slope), float(intercept), float(1 - (residual**2).sum() / (total**2).sum()))


def glm_sizes() -> tuple[int, ...]:
    """Parameters of GLM_MODELS."""
    return tuple(count_params(get_config(model)) for model in GLM_MODELS)


def gaps(accuracy: Mapping[str, tuple[float, ...]], weights: str) -> tuple[float, ...]:
    """Percentage points of accuracy that weights lose against FP16, to the digits of the table."""
    pairs = zip(accuracy["FP16"], accuracy[weights], strict=True)
    return tuple(round(floats - integers, 2) for floats, integers in pairs)


def power_law(sizes: Sequence[float], gap: Sequence[float]) -> Fit:
    """log10 gap over log10 parameters, where there is a gap: a model that loses nothing, or for which
    nothing was published, has no logarithm and is left out."""
    points = [(math.log10(n), math.log10(g)) for n, g in zip(sizes, gap, strict=True) if g > 0]
    return fit_line(*zip(*points, strict=True))


def numbers() -> list[Number]:
    return [*_vectors(), *_differences(), *_power_laws(), *_lambada(), *_pile(), *_headlines()]


def _vectors() -> list[Number]:
    source = "THUDM/GLM-130B quantization/, cuda/quantization.cu"
    packed = [np.array(q, np.int8) for q in ([1, -2, 7, -7], [-3, 5])]
    row = np.array([[3.5, -7.0, 1.0, 0.5]], np.float16)
    integers = quantize(row, 1, 4)
    zero_point = quantize(np.array([[-1.0, 0.0, 0.75, 2.5]], np.float32), 1, 4, scheme="zeropoint")
    restored = dequantize(Integers(integers.values, integers.scale, None), 1, 4, np.float16)
    assert zero_point.zero is not None
    return [
        Number(
            QUANTIZATION, "1, -2, 7, -7 in bytes", "30 121", _ints(pack_int4(packed[0])), "",
            "interop.quantization.pack_int4", source,
        ),
        Number(
            QUANTIZATION, "-3, 5 in a byte", "-43", _ints(pack_int4(packed[1])), "",
            "interop.quantization.pack_int4", source,
        ),
        Number(
            QUANTIZATION, "bytes 30, 121 unpacked", "1 -2 7 -7",
            _ints(unpack_int4(np.array([30, 121], np.int8))), "",
            "interop.quantization.unpack_int4", source,
        ),
        Number(
            QUANTIZATION, "3.5, -7, 1, 0.5 in INT4: scale and integers", "1 4 -7 1 0",
            (float(integers.scale[0, 0]), *_ints(unpack_int4(integers.values))), "",
            "interop.quantization.quantize, ties to even",
            f"max |w| / 7, round(w / scale), {source}",
        ),
        Number(
            QUANTIZATION, "the same as floats again", "4 -7 1 0", tuple(restored.ravel().tolist()),
            "", "interop.quantization.dequantize", source,
        ),
        Number(
            QUANTIZATION, "-1, 0, 0.75, 2.5 in zero-point INT4: scale, zero and integers",
            "0.25 3 -7 -3 0 7",
            (
                float(zero_point.scale[0, 0]), float(zero_point.zero[0, 0]),
                *_ints(unpack_int4(zero_point.values)),
            ),
            "", "interop.quantization.quantize", "equations 9 to 11 of GLM-130B by hand",
        ),
    ]  # fmt: skip


def _ints(array: np.ndarray) -> tuple[float, ...]:
    return tuple(int(x) for x in array.ravel())


def _differences() -> list[Number]:
    source = "GLM-130B section 4, from THUDM/GLM-130B docs/quantization.md"
    return [
        Number(
            QUANTIZATION, "GLM-130B, LAMBADA, INT4 less FP16", "-0.74", 79.468 - 80.206, "points",
            "79.468 - 80.206", source,
        ),
        Number(
            QUANTIZATION, "GLM-130B, MMLU, INT4 less FP16", "0.05", 44.801 - 44.751, "points",
            "44.801 - 44.751", source,
        ),
        Number(
            QUANTIZATION, "GLM-130B, LAMBADA, two tables in INT4", "79.47", 79.468, "%",
            "docs/quantization.md", TABLE_10,
        ),
    ]  # fmt: skip


def _power_laws() -> list[Number]:
    found = []
    for family, sizes, accuracy in (
        ("GLM", glm_sizes(), GLM_LAMBADA),
        ("BLOOM", BLOOM_SIZES, BLOOM_LAMBADA),
    ):
        for weights in ("absmax INT4", "zero-point INT4"):
            gap = gaps(accuracy, weights)
            law = power_law(sizes, gap)
            used = sum(g > 0 for g in gap)
            how = f"least squares of log gap over log parameters, {used} of {len(gap)} sizes"
            if used < len(gap):
                left_out = [g for g in gap if not g > 0]
                what = ", ".join("none published" if math.isnan(g) else f"{g}" for g in left_out)
                how += f" (the largest has no gap to take the logarithm of: {what})"
            name = f"{family}, {weights}"
            found += [
                Number(
                    QUANTIZATION, f"{name}: gap in LAMBADA over size, exponent", "", law.slope, "",
                    how, TABLE_10,
                ),
                Number(QUANTIZATION, f"{name}: R^2", "", law.r_squared, "", how, TABLE_10),
            ]  # fmt: skip
    sizes = glm_sizes()
    for weights in ("absmax INT4", "zero-point INT4"):
        gap = gaps(GLM_LAMBADA, weights)
        law = power_law(sizes[:4], gap[:4])
        found.append(
            Number(
                QUANTIZATION, f"GLM, {weights}: gap at 130B foretold by the four smaller", "",
                10 ** (law.intercept + law.slope * math.log10(sizes[-1])), "points",
                f"the power law of 110M to 10B; published: {gap[-1]}", TABLE_10,
            )
        )  # fmt: skip
    return found


def _lambada() -> list[Number]:
    found = []
    for family, sizes, accuracy in (
        ("GLM", glm_sizes(), GLM_LAMBADA),
        ("BLOOM", BLOOM_SIZES, BLOOM_LAMBADA),
    ):
        line = fit_line([math.log10(n) for n in sizes], accuracy["FP16"])
        how = "least squares of accuracy over log10 parameters, five sizes"
        found += [
            Number(
                SCORES, f"{family}, LAMBADA: points for ten times the size", "", line.slope,
                "points", how, TABLE_10,
            ),
            Number(SCORES, f"{family}, LAMBADA over size: R^2", "", line.r_squared, "", how, TABLE_10),
        ]  # fmt: skip
    return found


def _pile() -> list[Number]:
    bits, weights = zip(*PILE.values(), strict=True)
    return [
        Number(
            SCORES, "GLM-130B, weighted bits per byte on the Pile", "0.634",
            float(np.average(bits, weights=weights)), "bits/byte",
            "published bits per byte of 18 parts, weights of the Pile paper's table 1",
            "GLM-130B, Pile test sets",
        ),
        Number(
            SCORES, "GLM-130B, bits per byte on the Pile, parts weighted equally", "",
            float(np.mean(bits)), "bits/byte", "mean of the same 18", "",
        ),
    ]  # fmt: skip


def _headlines() -> list[Number]:
    return [
        Number(
            SCORES, "LAMBADA, GLM-130B less GPT-3 (README)", "4.0", round(80.2 - 76.2, 1),
            "points", "80.2 - 76.2", "THUDM/GLM-130B README",
        ),
        Number(
            SCORES, "LAMBADA, GLM-130B less GPT-3 (paper)", "5.0", round(80.2 - 76.2, 1), "points",
            "80.2 - 76.2", "GLM-130B paper, arXiv version 2", known="4.0",
            question="the paper's text has +5.0, its own scores and the README +4.0",
        ),
        Number(
            SCORES, "MMLU, GLM-130B less GPT-3", "0.9", round(44.8 - 43.9, 1), "points",
            "44.8 - 43.9", "GLM-130B section 5",
        ),
        Number(
            SCORES, "LAMBADA, GLM-130B in two tables", "80.2", 80.206, "%",
            "docs/quantization.md", "GLM-130B section 1",
        ),
    ]  # fmt: skip
