"""Is GeGLU better than GELU when both have the same number of parameters?

    glmjax sweep experiments/feed_forward.py

Changed: the feed-forward layer. A gate is a third matrix, so GeGLU is two thirds as wide: 8/3 D in
place of 4 D, rounded to where the parameters, biases included, come closest. Both with 1D rotary
positions, as in the published comparison.

Published: GLM-130B appendix B, table 8, GLM-Base on 50 GB of English and Chinese text: perplexity
22.95 with RoPE and GELU, 22.31 with RoPE and GeGLU.
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import METRICS, Trend, report
from glmjax.sweep.trials import Scale, Sweep, vary

TRENDS = (Trend("geglu", "gelu", "GLM-130B table 8: perplexity 22.31 against 22.95"),)


def sweep(scale: Scale) -> Sweep:
    rotary = base(scale, **{"model.positions": "rope_1d", "objective.positions": "1d"})
    variants = {
        "gelu": {},
        "geglu": {"model.ffn": "geglu", "model.ffn_size": gated_size(rotary.model.hidden_size)},
    }
    trials = vary(rotary, variants, "feed_forward", SEEDS[scale])
    return Sweep("feed_forward", trials, partial(report, metrics=METRICS, trends=TRENDS))


def gated_size(D: int) -> int:
    """The F at which 3 D F + 2 F + D, GeGLU's parameters, come closest to GELU's 8 D^2 + 5 D."""
    return round((8 * D * D + 4 * D) / (3 * D + 2))
