"""Small models of the four families and rows of packed pieces to feed them."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

import glmjax
from glmjax.config import GLMConfig
from glmjax.model.attention import BlankMask
from glmjax.model.params import Params, abstract_params, leaf_name


class Family(NamedTuple):
    config: GLMConfig
    params: Params


class Rows(NamedTuple):
    """Inputs of a model; `piece_BT` numbers the pieces packed in a row, -1 is padding."""

    tokens_BT: np.ndarray
    positions_B2T: np.ndarray
    mask: BlankMask
    piece_BT: np.ndarray


@pytest.fixture(scope="session")
def model_of() -> Callable[[GLMConfig], Family]:
    """Every parameter differs from its neutral initial value, so that none can be left out."""

    def make(config: GLMConfig) -> Family:
        random = np.random.default_rng(8)

        def draw(path, leaf) -> np.ndarray:
            is_scale = leaf_name(path).endswith(".scale")
            return is_scale + 0.1 * random.standard_normal(leaf.shape, np.float32)

        params = jax.tree_util.tree_map_with_path(draw, abstract_params(config))
        return Family(config, jax.device_put(params))

    return make


@pytest.fixture(scope="session", params=["glm-tiny", "glm-130b-tiny", "chatglm-tiny", "glm-4-tiny"])
def family(request, model_of) -> Family:
    return model_of(glmjax.get_config(request.param, vocab_size=96, ffn_size=128))


@pytest.fixture(scope="session")
def rows() -> Rows:
    """Rows of 24 tokens with one to three pieces of any context, all but one with padding behind."""
    random = np.random.default_rng(0)
    batch, length = 8, 24
    start_BT = np.zeros((batch, length), np.int32)
    end_BT = np.zeros((batch, length), np.int32)
    positions_B2T = np.zeros((batch, 2, length), np.int32)
    piece_BT = np.full((batch, length), -1)
    for b in range(batch):
        used = length if b == 0 else random.integers(12, length)
        cuts = np.sort(random.choice(np.arange(1, used), random.integers(0, 3), replace=False))
        bounds = [0, *cuts, used]
        for piece, (start, end) in enumerate(itertools.pairwise(bounds)):
            span, context = slice(start, end), random.integers(0, end - start + 1)
            answer = np.maximum(np.arange(end - start) - context + 1, 0)
            position = np.minimum(np.arange(end - start), max(context - 1, 0))
            piece_BT[b, span] = piece
            positions_B2T[b, :, span] = [position, answer]
            start_BT[b, span] = start
            end_BT[b, span] = np.maximum(np.arange(start, end) + 1, start + context)
    tokens_BT = random.integers(10, 96, (batch, length), np.int32)
    return Rows(tokens_BT, positions_B2T, BlankMask(start_BT, end_BT), piece_BT)
