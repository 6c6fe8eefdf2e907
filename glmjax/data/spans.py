"""Where blanks go: the random half of the blank-infilling objective.

Blanks are drawn for many texts at once. `Texts` is one flat array of tokens cut into pieces, the
texts that get blanks of their own; what happens "in each piece" is a sort or a running sum that
restarts at the first member of each segment. Random numbers come from one generator per row, so
that a row does not depend on the rows beside it.

Suffixes: N tokens of text, P pieces, R regions (documents), S slots, K blanks or other members.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax.config import ObjectiveConfig, SpecialTokens

Generators = Sequence[np.random.Generator]


class Texts(NamedTuple):
    """The text of some rows, cut into pieces that lie in equal slots of their rows."""

    tokens_N: np.ndarray
    bounds_P1: np.ndarray
    """Piece p is tokens_N[bounds_P1[p] : bounds_P1[p + 1]]."""
    slot_P: np.ndarray
    """Slot of each piece, counted over all rows."""
    slots_per_row: int

    @property
    def row_P(self) -> np.ndarray:
        """Row of each piece."""
        return self.slot_P // self.slots_per_row


class Blanks(NamedTuple):
    """Blanks, grouped by piece; inside a piece they stand in the order of part B."""

    start_K: np.ndarray
    """First token of the blank, an index into tokens_N."""
    length_K: np.ndarray
    """Tokens in the blank."""
    piece_K: np.ndarray
    """Which piece the blank belongs to."""
    closed_K: np.ndarray
    """Whether the blank ends with end-of-piece; a continuation to the end of the text does not."""


class Regions(NamedTuple):
    """Parts of the pieces that may be covered: documents without [CLS] and eos."""

    start_R: np.ndarray
    size_R: np.ndarray
    piece_R: np.ndarray


@functools.cache
def span_length_probabilities(mean_span: float) -> np.ndarray:
    """Poisson probabilities of token-level lengths 1..39, renormalised without 0 (THUDM/GLM)."""
    lengths = np.arange(1, 40)
    weights = np.exp(lengths * math.log(mean_span) - np.cumsum(np.log(lengths)))
    return weights / weights.sum()


def document_bounds(tokens_N: np.ndarray, bounds_P1: np.ndarray, eos: int) -> np.ndarray:
    """The bounds with every piece cut behind each eos."""
    is_bound_N1 = np.zeros(len(tokens_N) + 1, bool)
    is_bound_N1[1:] = tokens_N == eos
    is_bound_N1[bounds_P1] = True
    return np.flatnonzero(is_bound_N1)


def maskable_regions(texts: Texts, objective: ObjectiveConfig, tokens: SpecialTokens) -> Regions:
    """The documents of every piece without their leading [CLS] and final eos.

    With cross_document_attention and draw = "row" a piece is one region: GLM-130B's collator does
    not look at documents, and its blanks may cross them.
    """
    tokens_N, bounds_P1 = texts.tokens_N, texts.bounds_P1
    ignore_documents = objective.cross_document_attention and objective.draw == "row"
    bounds_R1 = bounds_P1
    if not ignore_documents:
        bounds_R1 = document_bounds(tokens_N, bounds_P1, tokens.eos)
    piece_R = bounds_P1.searchsorted(bounds_R1[:-1], side="right") - 1
    start_R = bounds_R1[:-1] + (tokens_N[bounds_R1[:-1]] == tokens.cls)
    end_R = bounds_R1[1:]
    if not ignore_documents:
        end_R = end_R - (tokens_N[end_R - 1] == tokens.eos)
    return Regions(start_R, np.maximum(end_R - start_R, 0), piece_R)


def draw_token_blanks(
    rngs: Generators,
    texts: Texts,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    single_P: np.ndarray,
) -> Blanks:
    """Blanks of Poisson lengths until `mask_ratio` of each piece is covered (GLM section 2.1).

    Lengths are drawn until their sum reaches floor(mask_ratio * n), just one where `single_P`.
    Lengths that do not fit into the piece are left out; the first is cut to the size of the piece.
    A piece of fewer than 1 / mask_ratio tokens gets no blank, unless that holds for all pieces of
    its row: then the longest gets one.
    """
    size_P = np.diff(texts.bounds_P1)
    regions = maskable_regions(texts, objective, tokens)
    longest_P = np.maximum.reduceat(regions.size_R, _first_members(regions.piece_R))
    goal_P = np.where(single_P, 1, (objective.mask_ratio * size_P).astype(int))
    goal_P[longest_P == 0] = 0
    for row in np.flatnonzero(np.bincount(texts.row_P, goal_P, len(rngs)) == 0):
        candidate_P = np.where(texts.row_P == row, longest_P, 0)
        goal_P[candidate_P.argmax()] |= candidate_P.any()

    piece_K = np.repeat(np.arange(len(goal_P)), goal_P)
    thresholds = np.cumsum(span_length_probabilities(objective.mean_span))[:-1]
    length_K = 1 + thresholds.searchsorted(uniform(rngs, texts.row_P[piece_K]), side="right")
    first_K = _first_members(piece_K)
    length_K[first_K] = np.minimum(length_K[first_K], longest_P[piece_K[first_K]])
    used_K = sum_before(length_K, piece_K) < goal_P[piece_K]
    piece_K = piece_K[used_K]
    length_K = length_K[used_K][_shuffled(rngs, piece_K, texts)]

    region_K = piece_K
    if len(regions.size_R) > len(size_P):
        region_K = _share_out(length_K, piece_K, regions, objective.mask_ratio)
        by_region = region_K.argsort(kind="stable")
        length_K, region_K = length_K[by_region], region_K[by_region]
    end_K = sum_before(length_K + 1, region_K) + length_K
    fits_K = end_K <= regions.size_R[region_K]
    length_K, region_K = length_K[fits_K], region_K[fits_K]
    piece_K = regions.piece_R[region_K]
    fraction_K = uniform(rngs, texts.row_P[piece_K])
    start_K = place_spans(fraction_K, length_K, region_K, regions)
    return _in_order(rngs, start_K, length_K, piece_K, texts, objective)


def place_spans(
    fraction_K: np.ndarray, length_K: np.ndarray, region_K: np.ndarray, regions: Regions
) -> np.ndarray:
    """Start of each span, uniform in its region with at least one token between neighbours.

    `region_K` is sorted and the spans of a region keep their order. k spans in a region of T tokens
    have k draws from 0..T - sum(length) - k + 1, here `fraction_K` in [0, 1) of that range; the
    draws are sorted, and span i starts at its draw plus i plus the lengths before it (THUDM/GLM).
    """
    taken_R = np.bincount(region_K, length_K + 1, len(regions.size_R)).astype(int)
    range_K = (regions.size_R - taken_R + 2)[region_K]
    draw_K = ((np.sort(region_K + fraction_K) - region_K) * range_K).astype(int)
    draw_K = np.minimum(draw_K, range_K - 1)  # region + fraction may have been rounded up
    return regions.start_R[region_K] + draw_K + sum_before(length_K + 1, region_K)


def draw_sentence_blanks(
    rngs: Generators,
    texts: Texts,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    is_sentence_end_V: np.ndarray,
) -> Blanks:
    """Whole sentences until `mask_ratio` of each piece is covered, at least one in every piece."""
    start_K, end_K = sentences(texts, tokens, is_sentence_end_V)
    piece_K = texts.bounds_P1.searchsorted(start_K, side="right") - 1
    order_K = _shuffled(rngs, piece_K, texts)
    start_K, length_K = start_K[order_K], (end_K - start_K)[order_K]
    goal_P = np.maximum((objective.mask_ratio * np.diff(texts.bounds_P1)).astype(int), 1)
    used_K = sum_before(length_K, piece_K) < goal_P[piece_K]
    start_K, length_K, piece_K = start_K[used_K], length_K[used_K], piece_K[used_K]
    return _in_order(rngs, start_K, length_K, piece_K, texts, objective)


def sentences(
    texts: Texts, tokens: SpecialTokens, is_sentence_end_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the sentences of all pieces, in order.

    A sentence ends with a token of `is_sentence_end_V`, before eos, or with its piece. The original
    lets the [CLS] of a later document into a sentence; here neither [CLS] nor eos is part of one.
    """
    is_edge_N1 = np.zeros(len(texts.tokens_N) + 1, bool)
    is_edge_N1[texts.bounds_P1] = True
    is_edge_N1[1:] |= is_sentence_end_V[texts.tokens_N]
    outside_N = texts.tokens_N == tokens.eos
    if tokens.cls is not None:
        outside_N |= texts.tokens_N == tokens.cls
    is_edge_N1[:-1] |= outside_N
    is_edge_N1[1:] |= outside_N
    edges = np.flatnonzero(is_edge_N1)
    inside = ~outside_N[edges[:-1]]
    return edges[:-1][inside], edges[1:][inside]


def draw_document_blanks(
    rngs: Generators,
    texts: Texts,
    objective: ObjectiveConfig,
    tokens: SpecialTokens,
    share_P: np.ndarray,
) -> Blanks:
    """One long blank in every piece: the end of the text, or one span anywhere in it.

    Its length is uniform over floor(document_min_ratio * n)..n - 2 (THUDM/GLM, draw = "batch") or
    ..n (GLM-130B, draw = "row"); `share_P` in [0, 1) says where in that range. A piece of several
    documents always loses its end (THUDM/GLM).
    """
    size_P = np.diff(texts.bounds_P1)
    low_P = (objective.document_min_ratio * size_P).astype(int)
    high_P = np.maximum(low_P, size_P - 2 if objective.draw == "batch" else size_P)
    length_P = low_P + (share_P * (high_P - low_P + 1)).astype(int)
    has_cls_P = texts.tokens_N[texts.bounds_P1[:-1]] == tokens.cls
    length_P = np.minimum(np.maximum(length_P, 1), size_P - has_cls_P)

    regions = maskable_regions(texts, objective, tokens)
    first_P = _first_members(regions.piece_R)
    inner_P, inner_start_P = regions.size_R[first_P], regions.start_R[first_P]
    suffix_P = uniform(rngs, texts.row_P) < objective.document_suffix
    suffix_P |= (np.bincount(regions.piece_R) > 1) | (inner_P == 0)
    length_P = np.where(suffix_P, length_P, np.minimum(length_P, inner_P))
    draw_P = (uniform(rngs, texts.row_P) * (inner_P - length_P + 1)).astype(int)
    start_P = np.where(suffix_P, texts.bounds_P1[1:] - length_P, inner_start_P + draw_P)
    some = np.flatnonzero(length_P > 0)
    return Blanks(start_P[some], length_P[some], some, ~suffix_P[some])


def uniform(rngs: Generators, row_K: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each member, from the generator of its row; `row_K` is sorted."""
    count_R = np.bincount(row_K, minlength=len(rngs)).tolist()
    return np.concatenate([rng.random(count) for rng, count in zip(rngs, count_R, strict=True)])


def sum_before(value_K: np.ndarray, segment_K: np.ndarray) -> np.ndarray:
    """Sum of the values before each member in its segment; `segment_K` is sorted."""
    before_K = np.cumsum(value_K) - value_K
    return before_K - before_K[segment_K.searchsorted(segment_K)]


def _first_members(segment_K: np.ndarray) -> np.ndarray:
    """Index of the first member of each segment; `segment_K` is sorted."""
    return np.flatnonzero(np.diff(segment_K, prepend=-1))


def _shuffled(rngs: Generators, piece_K: np.ndarray, texts: Texts) -> np.ndarray:
    """An order that permutes the members of each piece; `piece_K` is sorted."""
    return (piece_K + uniform(rngs, texts.row_P[piece_K])).argsort()


def _in_order(
    rngs: Generators,
    start_K: np.ndarray,
    length_K: np.ndarray,
    piece_K: np.ndarray,
    texts: Texts,
    objective: ObjectiveConfig,
) -> Blanks:
    """Puts closed blanks in the order of part B: shuffled inside each piece, or as in the text."""
    order_K = _shuffled(rngs, piece_K, texts) if objective.shuffle_spans else start_K.argsort()
    return Blanks(start_K[order_K], length_K[order_K], piece_K, np.ones(len(start_K), bool))


def _share_out(
    length_K: np.ndarray, piece_K: np.ndarray, regions: Regions, mask_ratio: float
) -> np.ndarray:
    """Region of each length when a piece holds several documents (THUDM/GLM).

    Documents take lengths in turn, shortest document first, while their sum stays within mask_ratio
    of the document; the longest takes the rest.
    """
    region_K = np.empty_like(piece_K)
    for piece in np.unique(piece_K):
        taken, end = piece_K.searchsorted((piece, piece + 1))
        first, last = regions.piece_R.searchsorted((piece, piece + 1))
        *others, longest = first + regions.size_R[first:last].argsort(kind="stable")
        for region in others:
            goal = int(mask_ratio * regions.size_R[region])
            count = np.cumsum(length_K[taken:end]).searchsorted(goal, side="right")
            region_K[taken : taken + count] = region
            taken += count
        region_K[taken:end] = longest
    return region_K
