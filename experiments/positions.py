"""Which position encoding learns to fill blanks best: learned 2D, rotary 1D or 2D, or ALiBi?

    glmjax sweep experiments/positions.py

Changed: the encoding, and with it how positions are counted. learned_2d adds two tables, position and
block position; rope_2d turns one half of each head by either; rope_1d and alibi have one number, by
GLM-130B's rule: the tokens of a [MASK] blank share theirs. All see the same rows with the same blanks.

Published: GLM-130B appendix B, table 8, GLM-Base on 50 GB of English and Chinese text: perplexity
24.58 with absolute positions, 24.14 with ALiBi, 22.95 with RoPE.
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import OBJECTIVE_METRICS, Trend, by_objective, report
from glmjax.sweep.trials import Scale, Sweep, vary

METRICS = OBJECTIVE_METRICS
TRENDS = (
    Trend("rope_1d", "learned_2d", "GLM-130B table 8: perplexity 22.95 against 24.58"),
    Trend("rope_1d", "alibi", "GLM-130B table 8: perplexity 22.95 against 24.14"),
    Trend("alibi", "learned_2d", "GLM-130B table 8: perplexity 24.14 against 24.58"),
)


def sweep(scale: Scale) -> Sweep:
    variants = {
        "learned_2d": {},
        "rope_2d": {"model.positions": "rope_2d"},
        "rope_1d": {"model.positions": "rope_1d", "objective.positions": "1d"},
        "alibi": {"model.positions": "alibi", "objective.positions": "1d"},
    }
    trials = vary(base(scale), variants, "positions", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("positions", trials, say, by_objective)
