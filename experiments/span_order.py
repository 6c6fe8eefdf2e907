"""Does it help to fill the blanks of a text in random order?

    glmjax sweep experiments/span_order.py

Changed: part B holds the contents of the blanks in random order, or from left to right. All rows have
[MASK] blanks. Each model is evaluated with blanks in random order, from left to right, and with one
blank in a text, where there is no order.

Published: GLM paper section 3.4: blanks from left to right lead to a severe drop on SuperGLUE, whose
questions have one blank.
"""

from functools import partial

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import Trend, heldout_by, report
from glmjax.sweep.trials import Scale, Sweep, vary

METRICS = {
    "loss/one blank": "held-out loss, one blank in a text",
    "loss/random order": "held-out loss, blanks in random order",
    "loss/left to right": "held-out loss, blanks from left to right",
}
SOURCE = "GLM paper section 3.4: blanks from left to right lead to a severe drop"
TRENDS = tuple(
    Trend("random order", "left to right", SOURCE, metric)
    for metric in ("loss/one blank", "loss/random order")
)
ORDERS = {
    "loss/one blank": {"objective.single_span": 1.0, "train.evaluate_batches": 64},
    "loss/random order": {"objective.shuffle_spans": True},
    "loss/left to right": {"objective.shuffle_spans": False},
}


def sweep(scale: Scale) -> Sweep:
    variants = {"random order": {}, "left to right": {"objective.shuffle_spans": False}}
    trials = vary(base(scale, **{"objective.token": 1.0}), variants, "span_order", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("span_order", trials, say, partial(heldout_by, ORDERS))
