"""Does the softmax of attention need float32?

    glmjax sweep experiments/softmax_precision.py

Changed: the type of attention scores and weights, float32 or bfloat16, and the learning rate, the usual
one and ten times it.

Published: GLM-130B section 2.3 computes the softmax in float32, since scores leave the range of
float16. bfloat16 has float32's range and a precision of three digits: what is asked here is whether
the precision alone matters.
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import STABILITY_METRICS, Trend, cross, rates, report
from glmjax.sweep.trials import Scale, Sweep, vary

METRICS = STABILITY_METRICS
SOURCE = "GLM-130B section 2.3: the softmax in float32, for stability"
TRENDS = tuple(
    Trend(f"float32, {rate}", f"bfloat16, {rate}", SOURCE) for rate in ("usual rate", "10 x rate")
)


def sweep(scale: Scale) -> Sweep:
    types = {dtype: {"model.softmax_dtype": dtype} for dtype in ("float32", "bfloat16")}
    variants = cross(types, rates(base(scale)))
    trials = vary(base(scale), variants, "softmax", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("softmax_precision", trials, say)
