"""Does a smaller gradient of the word embedding keep training stable?

    glmjax sweep experiments/embedding_shrink.py

Changed: alpha, by which the gradient of the word embedding is multiplied (1, 0.5, 0.1), and the
learning rate, the usual one and ten times it. Adam divides every gradient by its own size, so that
alpha acts through the clipping of the global norm alone, and through Adam's epsilon.

Published: GLM-130B section 2.3: the embedding's gradient is far larger than the others early in
training and precedes the collapses; alpha = 0.1 removed most spikes.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from experiments.classics import SEEDS, base
from glmjax.sweep.ablation import STABILITY_METRICS, Trend, cross, rates, report
from glmjax.sweep.trials import Scale, Sweep, vary
from glmjax.training.metrics import read_metrics

SOURCE = "GLM-130B section 2.3: alpha = 0.1 removed most spikes"
METRICS = {
    **STABILITY_METRICS,
    "embedding share": "gradient norm of the word embedding as a share of the whole, mean",
    "gradient spike": "largest gradient norm outside the embedding as a multiple of its median",
}
TRENDS = (
    Trend("alpha 0.1, 10 x rate", "alpha 1, 10 x rate", SOURCE, "largest_rise"),
    Trend("alpha 0.1, 10 x rate", "alpha 1, 10 x rate", SOURCE, "gradient spike"),
    Trend("alpha 0.1, 10 x rate", "alpha 1, 10 x rate", SOURCE),
)


def sweep(scale: Scale) -> Sweep:
    alphas = {f"alpha {a:g}": {"model.embedding_gradient_scale": a} for a in (1.0, 0.5, 0.1)}
    variants = cross(alphas, rates(base(scale)))
    trials = vary(base(scale), variants, "embedding_shrink", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("embedding_shrink", trials, say, gradient_norms)


def gradient_norms(run: Path) -> Mapping[str, float]:
    """From the lines of a run's metrics: one step of each interval, after the warm-up."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "gradient_norm" in row]
    rows = rows[len(rows) // 10 :]
    whole = np.array([row["gradient_norm"] for row in rows])
    embedding = np.array([row["embedding_gradient_norm"] for row in rows])
    rest = np.sqrt(np.maximum(whole**2 - embedding**2, 0))
    return {
        "embedding share": float(np.mean(embedding / whole)),
        "gradient spike": float(rest.max() / np.median(rest)),
    }
