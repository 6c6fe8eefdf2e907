"""The recorded runs of the official PyTorch code in tests/golden, as one kind of batch."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glmjax.config import GLMConfig
from glmjax.interop.layout import to_official
from glmjax.interop.load import load
from glmjax.interop.names import family_of
from glmjax.interop.places import find_places
from glmjax.model.attention import BlankMask
from glmjax.model.params import Params
from glmjax.model.parts import take_apart

GOLDEN = Path(__file__).parent / "golden"
GRADIENT_STRIDE = 5
"""Of gradient matrices every fifth row is stored."""
LEFT_PADDED_STRIDE = 3
"""Of left-padded outputs every third column is stored."""


class Batch(NamedTuple):
    """Inputs, and for each of its tokens the row and column of the official batch it stands for.

    Independent options in one row of GLM-130B are not one interval of keys: they become rows of
    their own, each with a copy of the context, whose tokens carry no weight.
    """

    tokens_BT: np.ndarray
    positions_B2T: np.ndarray
    mask: BlankMask
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    row_BT: np.ndarray
    column_BT: np.ndarray
    real_BT: np.ndarray

    def take(self, outputs: np.ndarray) -> np.ndarray:
        """The official outputs [rows, columns, ...] of this batch's tokens."""
        return outputs[self.row_BT, self.column_BT]


class Case(NamedTuple):
    """A tiny model and what the official code made of one batch."""

    config: GLMConfig
    params: Params
    batch: Batch
    outputs: dict[str, np.ndarray]


def read_npz(case: str, name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / f"{name}.npz") as arrays:
        return dict(arrays)


def load_model(case: str, name: str = "model", **changes: Any) -> tuple[GLMConfig, Params]:
    """The tiny model of a case, its floats in float32; `changes` are applied to the configuration.

    With tied_embeddings=False the output layer is a copy of the word embedding.
    """
    config, params = load(GOLDEN / case / f"{name}.safetensors", dtype="float32")
    config = dataclasses.replace(config, **changes)
    if not config.tied_embeddings and params.output_embedding is None:
        params = dataclasses.replace(params, output_embedding=params.word_embedding)
    return config, params


def official_arrays(config: GLMConfig, params: Params) -> dict[str, np.ndarray]:
    """A model, or gradients of its shape, as arrays under official names."""
    parts = take_apart(config, params)
    return {
        place.tensor: to_official(place.layout, place.spec.axes, parts[key].read())
        for key, (place,) in find_places(config, family_of(config)).items()
    }


def load_case(case: str, **changes: Any) -> Case:
    """A case with its training batch; `changes` are applied to the configuration."""
    config, params = load_model(case, **changes)
    inputs = read_npz(case, "inputs")
    if case == "glm":
        mask = BlankMask.from_context(inputs["sep"], length=inputs["input_ids"].shape[1])
        batch = _whole(
            inputs["input_ids"], inputs["position_ids"], mask, inputs["target"], inputs["loss_mask"]
        )
    elif case == "glm130b":
        batch = _options_apart(inputs)
    else:
        labels = np.pad(inputs["labels"][:, 1:], [(0, 0), (0, 1)], constant_values=-100)
        mask = BlankMask.from_context(inputs["context_length"], length=labels.shape[1])
        batch = _whole(
            inputs["input_ids"], inputs["position_ids"], mask,
            np.maximum(labels, 0), labels != -100,
        )  # fmt: skip
    return Case(config, params, batch, read_npz(case, "outputs"))


def intervals(visible_BTS: np.ndarray) -> BlankMask:
    """The mask whose queries see exactly these keys, which must be one interval for each."""
    length = visible_BTS.shape[-1]
    start_BT = visible_BTS.argmax(-1)
    end_BT = np.where(visible_BTS.any(-1), length - visible_BTS[..., ::-1].argmax(-1), 0)
    key_S = np.arange(length)
    rebuilt_BTS = (start_BT[..., None] <= key_S) & (key_S < end_BT[..., None])
    np.testing.assert_array_equal(rebuilt_BTS, visible_BTS)
    return BlankMask(start_BT.astype(np.int32), end_BT.astype(np.int32))


def _whole(
    tokens_BT: np.ndarray,
    positions_B2T: np.ndarray,
    mask: BlankMask,
    targets_BT: np.ndarray,
    weights_BT: np.ndarray,
) -> Batch:
    row_BT, column_BT = np.indices(tokens_BT.shape)
    weights_BT = weights_BT.astype(np.float32)
    return Batch(
        tokens_BT, positions_B2T, mask, targets_BT, weights_BT,
        row_BT, column_BT, np.ones_like(tokens_BT, bool),
    )  # fmt: skip


def _options_apart(inputs: dict[str, np.ndarray]) -> Batch:
    """GLM-130B's batch, with the options of the multiple-choice row as rows of their own."""
    visible_BTS = ~inputs["attention_mask"]
    length = visible_BTS.shape[1]
    pieces = []
    for row, count in enumerate(inputs["length"]):
        context = visible_BTS[row, 0].sum()
        # An option starts where a token does not see the one before it.
        before = visible_BTS[row, np.arange(context, count), np.arange(context, count) - 1]
        starts = [context, *(context + np.flatnonzero(~before[1:]) + 1), count]
        for start, end in itertools.pairwise(starts):
            pieces.append((row, [*range(context), *range(start, end)]))
    row_BT = np.array([[row] * length for row, _ in pieces])
    column_BT = np.array([columns + [0] * (length - len(columns)) for _, columns in pieces])
    real_BT = np.array([np.arange(length) < len(columns) for _, columns in pieces])
    visible_BTS = visible_BTS[row_BT[..., None], column_BT[..., None], column_BT[:, None]]
    position_BT = inputs["position_ids"][row_BT, column_BT]
    return Batch(
        tokens_BT=inputs["tokens"][row_BT, column_BT],
        positions_B2T=np.stack([position_BT, np.zeros_like(position_BT)], axis=1),
        mask=intervals(visible_BTS & real_BT[..., None] & real_BT[:, None]),
        targets_BT=inputs["targets"][row_BT, column_BT],
        weights_BT=(inputs["loss_mask"][row_BT, column_BT] * real_BT).astype(np.float32),
        row_BT=row_BT,
        column_BT=column_BT,
        real_BT=real_BT,
    )
