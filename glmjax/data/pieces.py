"""Text with blanks as the model reads it: the fixed half of the blank-infilling objective.

A piece is part A, the text with one mask token in place of each blank, and part B, the contents of
the blanks. Part A is seen by the whole piece, part B from left to right. One layout serves every
objective: a continuation is a blank at the end of the text that is not closed by end-of-piece, a
(text, target) pair is a text that ends in a blank.

Suffixes: N tokens of text, T tokens of pieces, P pieces, K blanks.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from glmjax.config import SpecialTokens
from glmjax.data.spans import Blanks

PositionRule = Literal["2d", "frozen", "straight"]
"""2d: blanks repeat the position of their mask and count block positions. frozen: the same without
block positions (GLM-130B, [MASK]). straight: 0, 1, 2, ... (GLM-130B, [gMASK] and pairs)."""


class Piece(NamedTuple):
    """One text with its blanks."""

    tokens: np.ndarray
    positions_2T: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    context: int
    """Length of part A."""


class Fields(NamedTuple):
    """Pieces side by side, every field int32."""

    fields_7T: np.ndarray
    """Tokens, targets, positions, block positions, weights, k_start, k_end."""
    length_P: np.ndarray
    """Length of each piece."""
    context_P: np.ndarray
    """Length of its part A."""


def fill_piece(
    text_N: np.ndarray,
    spans: Sequence[tuple[int, int]],
    tokens: SpecialTokens,
    *,
    mask: int,
    positions: PositionRule = "2d",
    closed: bool = True,
) -> Piece:
    """The piece of a text whose blanks are `spans`, [start, end) pairs in the order of part B.

    Spans must not overlap or be empty. `closed=False` leaves end-of-piece out, for a span that ends
    the text.
    """
    start_K, end_K = np.array(spans, int).reshape(-1, 2).T
    piece_K = np.zeros(len(start_K), int)
    blanks = Blanks(start_K, end_K - start_K, piece_K, np.full(len(start_K), closed))
    bounds = np.array([0, len(text_N)])
    fields, _, context = fill_pieces(text_N, bounds, blanks, tokens, mask, positions)
    return Piece(fields[0], fields[2:4], fields[1], fields[4].astype(np.float32), int(context[0]))


def suffix_piece(
    text_N: np.ndarray,
    length: int,
    tokens: SpecialTokens,
    *,
    mask: int,
    positions: PositionRule = "2d",
) -> Piece:
    """The piece that asks for the last `length` tokens of a text: there is no end-of-piece, the
    natural last token is the last target."""
    span = (len(text_N) - length, len(text_N))
    return fill_piece(text_N, [span], tokens, mask=mask, positions=positions, closed=False)


def pair_piece(
    text_N: np.ndarray,
    target: np.ndarray,
    tokens: SpecialTokens,
    *,
    mask: int,
    positions: PositionRule = "straight",
) -> Piece:
    """The piece that asks for `target` behind a text (multi-task instruction data of GLM-130B)."""
    whole = np.concatenate([text_N, target])
    return fill_piece(whole, [(len(text_N), len(whole))], tokens, mask=mask, positions=positions)


def fill_pieces(
    text_N: np.ndarray,
    bounds_P1: np.ndarray,
    blanks: Blanks,
    tokens: SpecialTokens,
    mask: int,
    positions: PositionRule,
) -> Fields:
    """Parts A and B of all pieces side by side: A of piece 0, B of piece 0, A of piece 1, ..."""
    rank_N1 = _rank_in_part_a(len(text_N), blanks)
    rank_P1 = rank_N1[bounds_P1]
    context_P = np.diff(rank_P1)
    size_K = blanks.length_K + blanks.closed_K
    size_P = np.bincount(blanks.piece_K, size_K, len(context_P)).astype(int)
    length_P = context_P + size_P
    begin_P = np.cumsum(length_P) - length_P
    num_a, num_b = int(rank_P1[-1]), int(size_K.sum())
    index_T = np.arange(num_a + num_b, dtype=np.int32)

    parts_5T = np.zeros((5, num_a + num_b), np.int32)
    masked_N = text_N.astype(np.int32)
    masked_N[blanks.start_K] = mask
    parts_5T[:2, :num_a] = masked_N[np.diff(rank_N1) > 0]
    parts_5T[2, :num_a] = index_T[:num_a] - _spread(rank_P1[:-1], context_P)
    parts_5T[2, num_a:] = _spread(rank_N1[blanks.start_K] - rank_P1[blanks.piece_K], size_K)
    _write_part_b(parts_5T[:, num_a:], text_N, blanks, size_K, tokens)

    fields_7T = np.empty((7, num_a + num_b), np.int32)
    size_2P = np.stack([context_P, size_P], axis=1).ravel()
    source_2P = np.stack([rank_P1[:-1], num_a + np.cumsum(size_P) - size_P], axis=1).ravel()
    source_T = index_T + _spread(source_2P - (np.cumsum(size_2P) - size_2P), size_2P)
    np.take(parts_5T, source_T, axis=1, out=fields_7T[:5], mode="clip")
    fields_7T[5] = _spread(begin_P, length_P)
    np.maximum(index_T + 1, _spread(begin_P + context_P, length_P), out=fields_7T[6])
    if positions == "straight":
        fields_7T[2] = index_T - fields_7T[5]
    if positions != "2d":
        fields_7T[3] = 0
    return Fields(fields_7T, length_P, context_P)


def _rank_in_part_a(num_tokens: int, blanks: Blanks) -> np.ndarray:
    """How many tokens of part A come before each token of the text, and how many there are.

    Part A keeps all tokens but the tails of blanks, so the rank is the position that counts a blank
    as one.
    """
    step_N1 = np.zeros(num_tokens + 1, np.int8)
    step_N1[blanks.start_K + 1] += 1
    step_N1[blanks.start_K + blanks.length_K] -= 1
    kept_N = np.cumsum(step_N1[:-1], dtype=np.int8) == 0
    rank_N1 = np.zeros(num_tokens + 1, np.int32)
    np.cumsum(kept_N, out=rank_N1[1:])
    return rank_N1


def _write_part_b(
    part_5T: np.ndarray,
    text_N: np.ndarray,
    blanks: Blanks,
    size_K: np.ndarray,
    tokens: SpecialTokens,
) -> None:
    """Writes tokens, targets, block positions and weights of all blanks, one after another."""
    inputs, targets, _, block_positions, weights = part_5T
    index_T = np.arange(len(inputs), dtype=np.int32)
    end_K = np.cumsum(size_K)
    begin_K = end_K - size_K
    text_N1 = np.append(text_N, tokens.eop)
    targets[:] = text_N1[index_T + _spread(blanks.start_K - begin_K, size_K)]
    targets[end_K[blanks.closed_K] - 1] = tokens.eop
    inputs[1:] = targets[:-1]
    inputs[begin_K] = tokens.sop
    block_positions[:] = index_T + 1 - _spread(begin_K, size_K)
    weights[:] = 1
    if tokens.cls is not None and not blanks.closed_K.all():
        # A continuation over several documents does not learn to predict their [CLS].
        weights[:] = (targets != tokens.cls) | np.repeat(blanks.closed_K, size_K)


def _spread(value_K: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    return np.repeat(value_K.astype(np.int32), count_K)
