"""Does noise in the inputs of part B help to fill blanks?

    glmjax sweep experiments/decoder_noise.py

Changed: the probability that a token of a blank, once written, is seen as [dBLOCK]. All rows have
[MASK] blanks. Held-out blanks have no noise.

Published: no comparison. THUDM/GLM's scripts have 0.1 for GLM-2B and GLM-10B and 0 for the smaller
models (--block-mask-prob).
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import Trend, heldout_by, report
from glmjax.sweep.trials import Scale, Sweep, vary

METRICS = {"loss": "held-out loss without noise"}
SOURCE = "none published; THUDM/GLM trains its larger models with 0.1"
TRENDS = (Trend("noise 0.1", "noise 0", SOURCE, "loss"),)


def sweep(scale: Scale) -> Sweep:
    variants = {f"noise {p:g}": {"objective.decoder_noise": p} for p in (0.0, 0.1)}
    trials = vary(base(scale, **{"objective.token": 1.0}), variants, "decoder_noise", SEEDS[scale])
    measure = partial(heldout_by, {"loss": {"objective.decoder_noise": 0.0}})
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("decoder_noise", trials, say, measure)
