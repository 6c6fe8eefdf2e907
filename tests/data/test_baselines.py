"""Baselines against sums done by hand."""

import math

import numpy as np

from glmjax.data.baselines import count_targets, uniform_loss, unigram_loss
from glmjax.data.blanks import Batch


def make_batch(targets, weights) -> Batch:
    targets_BT = np.array(targets, np.int32)
    zeros = np.zeros_like(targets_BT)
    positions = np.zeros((len(targets), 2, targets_BT.shape[1]), np.int32)
    weights_BT = np.array(weights, np.float32)
    return Batch(zeros, positions, zeros, zeros, targets_BT, weights_BT, zeros[:, 0])


def test_only_weighted_targets_count():
    batches = [
        make_batch([[1, 2, 2], [0, 0, 3]], [[1, 1, 1], [0, 0, 1]]),
        make_batch([[2, 2, 0]], [[0, 1, 0]]),
    ]
    assert count_targets(batches, 5).tolist() == [0, 1, 3, 1, 0]


def test_unigram_loss():
    training_V = np.array([0, 2, 6, 0])  # smoothed: 1, 3, 7, 1 of 12
    heldout_V = np.array([1, 1, 2, 0])
    expected = -(math.log(1 / 12) + math.log(3 / 12) + 2 * math.log(7 / 12)) / 4
    assert math.isclose(unigram_loss(training_V, heldout_V), expected, rel_tol=1e-12)


def test_without_training_targets_unigram_is_uniform():
    loss = unigram_loss(np.zeros(50), np.arange(50))
    assert math.isclose(loss, uniform_loss(50), rel_tol=1e-12)
    assert math.isclose(uniform_loss(50), math.log(50), rel_tol=1e-12)
