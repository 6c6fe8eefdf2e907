"""Autoregressive blank infilling: text in, training rows out (GLM section 2, GLM-130B section 2.2).

`spans` draws where the blanks go and `pieces` lays texts with blanks out; here rows are cut into
the texts that get blanks of their own, and put together again as a batch.

Suffixes: B rows, T tokens of a row, N tokens of text, P pieces, S slots, K blanks.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax.config import ObjectiveConfig, SpecialTokens
from glmjax.data.pieces import Fields, PositionRule, fill_pieces
from glmjax.data.spans import (
    Blanks,
    Generators,
    Texts,
    document_bounds,
    draw_document_blanks,
    draw_sentence_blanks,
    draw_token_blanks,
    span_length_probabilities,
    sum_before,
    uniform,
)

OBJECTIVES = ("mask", "smask", "gmask", "multitask")
"""What a row trains; the index is `Batch.objective_B`."""


class Batch(NamedTuple):
    """Rows ready for the model. Padding is the pad token with every other field 0: it sees nothing,
    and nothing sees it."""

    tokens_BT: np.ndarray
    """int32, inputs."""
    positions_B2T: np.ndarray
    """int32, position and block position."""
    k_start_BT: np.ndarray
    """int32, query q sees keys k_start <= k < k_end."""
    k_end_BT: np.ndarray
    """int32, max(q + 1, s + c) in a piece that starts at s with a part A of c tokens."""
    targets_BT: np.ndarray
    """int32, scored against the logits at the same place."""
    weights_BT: np.ndarray
    """float32, 1 where the target counts."""
    objective_B: np.ndarray
    """int32, index into OBJECTIVES."""


class Plan(NamedTuple):
    """What is drawn once for a batch, or once for a row."""

    objective: int
    single_span: bool
    share: float
    """Where in its range the length of document-level blanks lies, in [0, 1)."""
    short: float | None
    """Where in its range the length of short texts lies, in [0, 1); None leaves texts whole."""


def make_batch(
    texts: Sequence[np.ndarray],
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    *,
    sequence_length: int,
    seed: int,
    step: int,
    row_indices: Sequence[int],
    is_sentence_end_V: np.ndarray,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> Batch:
    """Training rows of some texts, a pure function of (seed, step) and of each row's index and text.

    `texts` are windows of a stream of documents that each end with eos (and start with [CLS] if
    the vocabulary has one); `row_indices` count the rows of the whole run, so that a process
    builds its share of a batch without knowing the others. With objective.draw = "batch" the
    objective, the single-span and short-sequence choices and the document-level length are drawn
    once per step (the length as a share of each text, where the original takes tokens from the
    shortest and longest text of the batch); with "row" they are drawn for each row or piece.
    Multi-task rows draw their pairs at random from `pairs` and leave their text unused.

    Raises:
        ValueError: tokens or pairs that the objective needs are missing.
    """
    check_objective(objective, tokens)
    if objective.multitask and not pairs:
        raise ValueError(f"objective.multitask = {objective.multitask} needs (text, target) pairs")
    rngs = [np.random.default_rng((seed, 1, row)) for row in row_indices]
    if objective.draw == "batch":
        plans = [draw_plan(np.random.default_rng((seed, 0, step)), objective)] * len(texts)
    else:
        plans = [draw_plan(rng, objective) for rng in rngs]

    fields_7BT = np.zeros((7, len(texts), sequence_length), np.int32)
    fields_7BT[:2] = tokens.pad
    few = max(1, 16384 // sequence_length)  # rows filled at once, so that they stay in cache
    for plan in {plan.objective: plan for plan in plans}.values():
        rows = [row for row, other in enumerate(plans) if other.objective == plan.objective]
        for first in range(0, len(rows), few):
            _fill_rows(
                fields_7BT, rows[first : first + few], texts, rngs, plan, objective, tokens,
                is_sentence_end_V, pairs,
            )  # fmt: skip
    return Batch(
        tokens_BT=fields_7BT[0],
        positions_B2T=np.ascontiguousarray(fields_7BT[2:4].transpose(1, 0, 2)),
        k_start_BT=fields_7BT[5],
        k_end_BT=fields_7BT[6],
        targets_BT=fields_7BT[1],
        weights_BT=fields_7BT[4].astype(np.float32),
        objective_B=np.array([plan.objective for plan in plans], np.int32),
    )


def _fill_rows(
    fields_7BT: np.ndarray,
    rows: Sequence[int],
    texts: Sequence[np.ndarray],
    rngs: Generators,
    plan: Plan,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    is_sentence_end_V: np.ndarray,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]] | None,
) -> None:
    """Writes rows of one objective into the batch."""
    name = OBJECTIVES[plan.objective]
    texts, rngs = [texts[row] for row in rows], [rngs[row] for row in rows]
    length = fields_7BT.shape[2]
    if name == "multitask":
        assert pairs is not None
        pieces, blanks = _pair_texts(rngs, pairs, objective, length)
    else:
        pieces = _cut_texts(rngs, texts, plan, objective, tokens, length, is_sentence_end_V)
        blanks = _draw_blanks(rngs, pieces, plan, objective, tokens, is_sentence_end_V)
        if not objective.cut_targets:
            pieces, blanks = _fit(pieces, blanks, length)
    mask, positions = mask_token(name, objective, tokens), row_positions(name, objective)
    filled = fill_pieces(pieces.tokens_N, pieces.bounds_P1, blanks, tokens, mask, positions)
    if name == "mask" and objective.decoder_noise:
        _add_noise(rngs, filled, pieces, objective, tokens)
    _place(fields_7BT, rows, filled, pieces)


def text_length(objective: ObjectiveConfig, sequence_length: int) -> int:
    """How many tokens of text fill a row of `sequence_length` tokens once blanks are added.

    Every blank adds two tokens. Room is left for the mean number of blanks of one text per slot and
    two standard deviations; make_batch cuts the end of texts that need more.
    """
    if not (objective.token or objective.single_span or objective.sentence):
        return sequence_length - 2
    length = 16.0  # a short sentence; longer ones need less room
    if objective.token or objective.single_span:
        length = float(span_length_probabilities(objective.mean_span) @ np.arange(1, 40))
    slot_length = sequence_length // objective.pieces_per_row
    n = np.arange(1, slot_length + 1)
    blanks = objective.mask_ratio * n / length
    fits = n + 2 * (1 + blanks + np.sqrt(blanks)) <= slot_length
    return max(1, int(fits.sum())) * objective.pieces_per_row


def check_objective(objective: ObjectiveConfig, tokens: SpecialTokens) -> None:
    """Raises ValueError if the objective needs a special token that the vocabulary lacks."""
    for token, needed in (
        ("smask", objective.task_masks and objective.sentence > 0),
        ("gmask", objective.task_masks and objective.token + objective.sentence < 1 - 1e-9),
        ("dblock", objective.decoder_noise > 0),
    ):
        if needed and getattr(tokens, token) is None:
            raise ValueError(f"the objective needs special token {token}, the vocabulary has none")


def draw_plan(rng: np.random.Generator, objective: ObjectiveConfig) -> Plan:
    """Draws the objective of a batch or row; a single span makes a whole batch token-level."""
    multitask, single, mode, share, short, short_length = rng.random(6)
    per_batch = objective.draw == "batch"
    single_span = per_batch and single < objective.single_span
    if multitask < objective.multitask:
        name = "multitask"
    elif single_span or mode < objective.token:
        name = "mask"
    elif mode < objective.token + objective.sentence:
        name = "smask"
    else:
        name = "gmask"
    is_short = per_batch and short < objective.short_sequence
    return Plan(OBJECTIVES.index(name), single_span, share, short_length if is_short else None)


def mask_token(name: str, objective: ObjectiveConfig, tokens: SpecialTokens) -> int:
    """Id that stands in part A for the blanks of an objective."""
    special = {"smask": tokens.smask, "gmask": tokens.gmask}.get(name)
    return special if objective.task_masks and special is not None else tokens.mask


def row_positions(name: str, objective: ObjectiveConfig) -> PositionRule:
    """The position rule of an objective."""
    if objective.positions == "2d":
        return "2d"
    return "straight" if name in ("gmask", "multitask") else "frozen"


def _cut_texts(
    rngs: Generators,
    texts: Sequence[np.ndarray],
    plan: Plan,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    sequence_length: int,
    is_sentence_end_V: np.ndarray,
) -> Texts:
    """Cuts the texts of rows into slots, and those into pieces that leave room for a blank each."""
    slots = objective.pieces_per_row if OBJECTIVES[plan.objective] == "mask" else 1
    if plan.short is not None:
        slots = 1
        windows = [
            short_texts(rng, text, plan.short, tokens, is_sentence_end_V)
            for rng, text in zip(rngs, texts, strict=True)
        ]
        texts = [np.concatenate(parts) for parts in windows]
        bounds = np.cumsum([0] + [len(part) for parts in windows for part in parts])
    size_S = np.repeat([len(text) // slots for text in texts], slots)
    bounds_S1 = np.concatenate(([0], np.cumsum(size_S)))
    tokens_N = np.concatenate([text[: len(text) // slots * slots] for text in texts])
    if plan.short is None:
        bounds = bounds_S1
    if not objective.cross_document_attention:
        bounds = document_bounds(tokens_N, bounds, tokens.eos)
    slot_P = bounds_S1.searchsorted(bounds[:-1], side="right") - 1
    pieces = Texts(tokens_N, bounds, slot_P, slots)

    if objective.draw == "row" and objective.short_sequence:
        row_S = np.arange(len(size_S)) // slots
        is_short_S = (uniform(rngs, row_S) < objective.short_sequence) & (size_S > 32)
        length_S = 32 + (uniform(rngs, row_S) * (size_S - 32)).astype(int)
        pieces = _shorten(pieces, _first_tokens(pieces, np.where(is_short_S, length_S, size_S)))
    if not objective.cut_targets:
        size_P = np.diff(pieces.bounds_P1)
        room_P = sequence_length // slots - 2 - sum_before(size_P + 2, pieces.slot_P)
        pieces = _shorten(pieces, np.minimum(np.maximum(room_P, 0), size_P))
    some = np.diff(pieces.bounds_P1) > 0
    bounds = np.append(pieces.bounds_P1[:-1][some], pieces.bounds_P1[-1])
    return pieces._replace(bounds_P1=bounds, slot_P=pieces.slot_P[some])


def short_texts(
    rng: np.random.Generator,
    text_N: np.ndarray,
    share: float,
    tokens: SpecialTokens,
    is_sentence_end_V: np.ndarray,
) -> list[np.ndarray]:
    """Random windows of a text, moved back to sentence ends, each with its own [CLS] (THUDM/GLM).

    Their length t is uniform over 32..N - 2, `share` in [0, 1) says where; there are (N - 1) // t.
    The original makes every window a row of its own.
    """
    body_N = text_N[int(text_N[0] == tokens.cls) :]
    shortest = min(32, len(text_N) - 2)
    length = shortest + int(share * (len(text_N) - 1 - shortest))
    ends = 1 + np.flatnonzero(is_sentence_end_V[body_N] | (body_N == tokens.eos))
    starts = np.append(0, ends[ends < len(body_N)])
    starts = starts[(body_N[starts] != tokens.eos) | (starts == 0)]
    windows = []
    for _ in range((len(text_N) - 1) // length):
        start, end = 0, len(body_N)
        if length < len(body_N):
            start = starts[starts <= rng.integers(len(body_N) - length)][-1]
            end = start + length
            snapped = ends[(ends >= start + max(1, length // 2)) & (ends <= end)]
            end = snapped[-1] if len(snapped) else end
        if tokens.cls is None or body_N[start] == tokens.cls:
            windows.append(body_N[start:end])
        else:
            windows.append(np.append(np.array(tokens.cls, body_N.dtype), body_N[start:end]))
    return windows


def _draw_blanks(
    rngs: Generators,
    texts: Texts,
    plan: Plan,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    is_sentence_end_V: np.ndarray,
) -> Blanks:
    name = OBJECTIVES[plan.objective]
    if name == "smask":
        return draw_sentence_blanks(rngs, texts, objective, tokens, is_sentence_end_V)
    draw_P = uniform(rngs, texts.row_P)
    if name == "mask":
        single_P = draw_P < objective.single_span
        if objective.draw == "batch":
            single_P[:] = plan.single_span
        return draw_token_blanks(rngs, texts, objective, tokens, single_P)
    if objective.draw == "batch":
        draw_P[:] = plan.share
    return draw_document_blanks(rngs, texts, objective, tokens, draw_P)


def _fit(texts: Texts, blanks: Blanks, sequence_length: int) -> tuple[Texts, Blanks]:
    """Cuts the end of the text of slots that overflow, and leaves out blanks that reach into it.

    A slot keeps at least one blank, because there is room for one and each further one makes the
    text two tokens shorter.
    """
    start_K, length_K, piece_K, closed_K = blanks
    num_slots = int(texts.slot_P[-1]) + 1
    size_S = np.bincount(texts.slot_P, np.diff(texts.bounds_P1), num_slots).astype(int)
    growth_S = np.bincount(texts.slot_P[piece_K], 1 + closed_K, num_slots).astype(int)
    excess_S = size_S + growth_S - sequence_length // texts.slots_per_row
    if excess_S.max() <= 0:
        return texts, blanks
    size_P = _first_tokens(texts, size_S - np.maximum(excess_S, 0))
    shorter = _shorten(texts, size_P)
    offset_K = start_K - texts.bounds_P1[piece_K]
    fits_K = offset_K + length_K <= size_P[piece_K]
    moved = Blanks(shorter.bounds_P1[piece_K] + offset_K, length_K, piece_K, closed_K)
    return shorter, Blanks(*(field_K[fits_K] for field_K in moved))


def _first_tokens(texts: Texts, length_S: np.ndarray) -> np.ndarray:
    """Sizes of the pieces when each slot keeps its first `length_S` tokens."""
    size_P = np.diff(texts.bounds_P1)
    left_P = length_S[texts.slot_P] - sum_before(size_P, texts.slot_P)
    return np.minimum(np.maximum(left_P, 0), size_P)


def _shorten(texts: Texts, size_P: np.ndarray) -> Texts:
    """Keeps the first `size_P` tokens of each piece; pieces may become empty."""
    bounds_P1 = np.concatenate(([0], np.cumsum(size_P)))
    if bounds_P1[-1] == len(texts.tokens_N):
        return texts
    shift_P = texts.bounds_P1[:-1] - bounds_P1[:-1]
    index_N = np.arange(bounds_P1[-1]) + np.repeat(shift_P, size_P)
    return texts._replace(tokens_N=texts.tokens_N[index_N], bounds_P1=bounds_P1)


def _pair_texts(
    rngs: Generators,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    objective: ObjectiveConfig,
    sequence_length: int,
) -> tuple[Texts, Blanks]:
    """One (text, target) pair in every slot; the target is the blank.

    A pair that is too long loses the end of its text down to a quarter of the slot, then the end
    of its target (GLM-130B).
    """
    slots = objective.pieces_per_row
    room = sequence_length // slots - 2
    parts = []
    for choice in np.concatenate([rng.integers(len(pairs), size=slots) for rng in rngs]).tolist():
        text_N, target = pairs[choice]
        if not len(target):
            raise ValueError(f"pair {choice} of the multi-task data has an empty target")
        if len(text_N) + len(target) > room:
            text_N = text_N[: max((room + 2) // 4, room - len(target))]
        parts += [text_N, target[: room - len(text_N)]]
    bounds = np.cumsum([0] + [len(part) for part in parts])
    slot_P = np.arange(len(rngs) * slots)
    texts = Texts(np.concatenate(parts), bounds[::2], slot_P, slots)
    return texts, Blanks(bounds[1::2], np.diff(bounds)[1::2], slot_P, np.ones(len(slot_P), bool))


def _add_noise(
    rngs: Generators,
    filled: Fields,
    texts: Texts,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
) -> None:
    """Replaces inputs of part B, but not its sops, by [dBLOCK] with probability decoder_noise."""
    inputs, weights = filled.fields_7T[0], filled.fields_7T[4]
    noisy = uniform(rngs, np.repeat(texts.row_P, filled.length_P)) < objective.decoder_noise
    inputs[noisy & (weights > 0) & (inputs != tokens.sop)] = tokens.dblock


def _place(fields_7BT: np.ndarray, rows: Sequence[int], filled: Fields, texts: Texts) -> None:
    """Copies the pieces to the slots of their rows; what is longer than its slot is cut."""
    slot_length = fields_7BT.shape[2] // texts.slots_per_row
    first_S = texts.slot_P.searchsorted(np.arange(len(rows) * texts.slots_per_row + 1))
    begin_S = np.append(0, np.cumsum(filled.length_P))[first_S].tolist()
    for slot, (begin, end) in enumerate(itertools.pairwise(begin_S)):
        row, start = rows[slot // texts.slots_per_row], slot % texts.slots_per_row * slot_length
        target = fields_7BT[:, row, start : start + min(end - begin, slot_length)]
        target[:] = filled.fields_7T[:, begin : begin + target.shape[1]]
        target[5:] += start - begin
        if end - begin > slot_length:
            np.minimum(target[6], start + slot_length, out=target[6])
