"""Which normalisation keeps a deep model stable at a high learning rate?

    glmjax sweep experiments/norms.py

Changed: where the LayerNorms are, and the learning rate, the usual one and ten times it. The models
are four times as deep as those of the other ablations and half as wide, which leaves their FLOPs as
they are. No step is skipped for a large gradient, and three in a row that are not finite end a
training.

Published: GLM-130B section 2.2: at 100B parameters Pre-LN, Post-LN and Sandwich-LN diverged, Post-LN
with DeepNorm was stable.
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import STABILITY_METRICS, UNGUARDED, Trend, cross, rates, report
from glmjax.sweep.trials import Scale, Sweep, vary

METRICS = STABILITY_METRICS
NORMS = ("pre", "post", "sandwich", "deepnorm")
TRENDS = tuple(
    Trend("deepnorm, 10 x rate", f"{norm}, 10 x rate", f"GLM-130B section 2.2: {norm} diverged")
    for norm in NORMS[:-1]
)


def sweep(scale: Scale) -> Sweep:
    model = base(scale).model
    deep = {
        "model.num_layers": 4 * model.num_layers,
        "model.hidden_size": model.hidden_size // 2,
        "model.ffn_size": model.ffn_size // 2,
        "model.num_heads": max(2, model.num_heads // 2),
    }
    norms = {norm: {"model.norm": norm} for norm in NORMS}
    variants = cross(norms, rates(base(scale)))
    trials = vary(base(scale, **deep, **UNGUARDED), variants, "norm", SEEDS[scale])
    return Sweep("norms", trials, partial(report, metrics=METRICS, trends=TRENDS))
