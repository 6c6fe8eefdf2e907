"""What a model without context reaches on held-out targets: the scale to read its loss on."""

import math
from collections.abc import Iterable

import numpy as np

from glmjax.data.blanks import Batch


def uniform_loss(vocab_size: int) -> float:
    """Cross entropy in nats of guessing every token alike."""
    return math.log(vocab_size)


def count_targets(batches: Iterable[Batch], vocab_size: int) -> np.ndarray:
    """How often each token is a target that counts, [V]."""
    counts_V = np.zeros(vocab_size)
    for batch in batches:
        counts_V += np.bincount(
            batch.targets_BT.ravel(), weights=batch.weights_BT.ravel(), minlength=vocab_size
        )
    return counts_V


def unigram_loss(training_V: np.ndarray, heldout_V: np.ndarray) -> float:
    """Cross entropy in nats of held-out targets under the frequencies of training targets, one
    added to every count; both as `count_targets` gives them."""
    smoothed_V = training_V + 1
    log_probability_V = np.log(smoothed_V / smoothed_V.sum())
    return float(-(heldout_V @ log_probability_V) / heldout_V.sum())
