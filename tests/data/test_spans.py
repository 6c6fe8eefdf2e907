"""Blanks against those of the official code: the same layouts, the same distributions.

The official random stream is not reproduced, so distributions are compared by two-sample tests at
fixed seeds, each at significance 0.001: Kolmogorov-Smirnov for numbers (its p-value is conservative
for discrete ones), chi-square for counts.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from glmjax.config import ObjectiveConfig, SpecialTokens, replace
from glmjax.data.blanks import OBJECTIVES, make_batch
from glmjax.data.pieces import fill_piece, suffix_piece
from glmjax.data.spans import (
    Blanks,
    Regions,
    Texts,
    draw_document_blanks,
    draw_sentence_blanks,
    draw_token_blanks,
    place_spans,
    sentences,
    span_length_probabilities,
    uniform,
)

SIGNIFICANCE = 1e-3
FOLDER = Path(__file__).parent.parent / "golden" / "block_data"
TOKENS = SpecialTokens(
    mask=1004, sop=1001, eop=1002, eos=1000, pad=1000, smask=1008, gmask=1007, cls=1003, dblock=1009
)
MASKS = {0: TOKENS.mask, 1: TOKENS.smask, 2: TOKENS.gmask}
IS_SENTENCE_END = np.array([id < 1000 and id % 17 == 3 for id in range(1016)])
PACKED = ObjectiveConfig(cross_document_attention=True, document_min_ratio=0.25)
TOKEN_LEVEL = ["bert", "bert_block_mask", "bert_no_task_mask_no_shuffle"]
SETTINGS = [*TOKEN_LEVEL, "bert_single_span", "sentence", "gpt", "gpt_infill", "mixture_10b"]


class Sample(NamedTuple):
    """One official block, and the blanks that it was made from."""

    text: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    sep: int
    mode: int
    spans: list[tuple[int, int]]

    @property
    def is_suffix(self) -> bool:
        return self.mode == 2 and self.targets[-1] != TOKENS.eop

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in self.spans]


def recover_spans(tokens: np.ndarray, position_ids: np.ndarray, sep: int, text_length: int):
    """The spans of a block in the order of part B, from its positions alone."""
    begins = sep + np.flatnonzero(position_ids[1, sep:] == 1)
    ends = np.append(begins[1:], len(tokens))
    lengths = ends - begins - 1
    masks = position_ids[0, begins]
    if len(masks) == 1:
        lengths = np.array([text_length - sep + 1])
    starts = [mask + (lengths[masks < mask] - 1).sum() for mask in masks]
    return [(int(s), int(s + n)) for s, n in zip(starts, lengths, strict=True)]


@functools.cache
def golden(name: str) -> list[Sample]:
    with np.load(FOLDER / f"{name}.npz") as file:
        flat = {key: file[key].astype(int) for key in file.files}
    samples: list[Sample] = []
    text_end = end = 0
    for n, length, sep, mode in zip(
        flat["in_length"], flat["length"], flat["sep"], flat["mode"], strict=True
    ):
        text, text_end = flat["in"][text_end : text_end + n], text_end + n
        block, end = slice(end, end + length), end + length
        if end > len(flat["tokens"]):
            return samples
        tokens, positions = flat["tokens"][block], flat["position_ids"][:, block]
        spans = recover_spans(tokens, positions, sep, n)
        fields = flat["targets"][block], flat["loss_mask"][block], positions
        samples.append(Sample(text, tokens, *fields, int(sep), int(mode), spans))
    return samples


def pooled(names: list[str]) -> list[Sample]:
    return [sample for name in names for sample in golden(name)]


def kolmogorov_smirnov(a, b) -> float:
    """Two-sample p-value (asymptotic series)."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    distance = np.abs(
        a.searchsorted(points, side="right") / len(a)
        - b.searchsorted(points, side="right") / len(b)
    ).max()
    x = distance * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    if x < 0.2:
        return 1.0
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 50))


def chi_square(table: np.ndarray) -> float:
    """p-value that the rows of a table of counts have one distribution (Wilson-Hilferty)."""
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    return math.erfc(z / math.sqrt(2)) / 2


def texts_of(samples: list[Sample]) -> Texts:
    """The official texts, one piece and one row each."""
    bounds = np.cumsum([0] + [len(sample.text) for sample in samples])
    return Texts(np.concatenate([s.text for s in samples]), bounds, np.arange(len(samples)), 1)


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, row)) for row in range(count)]


def draw(samples: list[Sample], repeats: int, kind: str, **changes) -> list[tuple[Texts, Blanks]]:
    texts, objective = texts_of(samples), replace(PACKED, **changes)
    drawn = []
    for repeat in range(repeats):
        rngs = generators(len(samples), seed=repeat)
        if kind == "token":
            single = np.full(len(samples), objective.single_span == 1)
            blanks = draw_token_blanks(rngs, texts, objective, TOKENS, single)
        elif kind == "sentence":
            blanks = draw_sentence_blanks(rngs, texts, objective, TOKENS, IS_SENTENCE_END)
        else:
            share = uniform(rngs, texts.row_P)
            blanks = draw_document_blanks(rngs, texts, objective, TOKENS, share)
        drawn.append((texts, blanks))
    return drawn


def counts_of(drawn: list[tuple[Texts, Blanks]]) -> np.ndarray:
    return np.concatenate([np.bincount(b.piece_K, minlength=len(t.slot_P)) for t, b in drawn])


def shares_of(drawn: list[tuple[Texts, Blanks]]) -> np.ndarray:
    """Share of each text that its blanks cover."""
    return np.concatenate(
        [np.bincount(b.piece_K, b.length_K, len(t.slot_P)) / np.diff(t.bounds_P1) for t, b in drawn]
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_official_blocks_are_rebuilt_exactly(name):
    for sample in golden(name):
        mask = TOKENS.mask if "no_task_mask" in name else MASKS[sample.mode]
        if sample.is_suffix:
            piece = suffix_piece(sample.text, sample.lengths[0], TOKENS, mask=mask)
        else:
            piece = fill_piece(sample.text, sample.spans, TOKENS, mask=mask)
        noisy = sample.tokens == TOKENS.dblock
        assert not (noisy & (sample.loss_mask == 0)).any()
        assert np.where(noisy, TOKENS.dblock, piece.tokens).tolist() == sample.tokens.tolist()
        assert piece.targets.tolist() == sample.targets.tolist()
        assert piece.weights.tolist() == sample.loss_mask.tolist()
        assert piece.positions_2T.tolist() == sample.position_ids.tolist()
        assert piece.context == sample.sep


def test_span_length_probabilities():
    probabilities = span_length_probabilities(3.0)
    first = [0.1572, 0.2358, 0.2358, 0.1768, 0.1061, 0.0531, 0.0227, 0.0085]
    np.testing.assert_allclose(probabilities[:8], first, atol=5e-5)
    assert len(probabilities) == 39
    assert probabilities @ np.arange(1, 40) == pytest.approx(3.1572, abs=5e-5)


@pytest.mark.parametrize(
    ("start", "fractions", "spans"),
    [
        (0, (3, 0), [(0, 2), (6, 7)]),
        (0, (6, 6), [(6, 8), (9, 10)]),
        (1, (0, 0), [(1, 3), (4, 5)]),
    ],
    ids=["apart", "at the end", "with offset"],
)
def test_placement_examples(start, fractions, spans):
    lengths = np.array([2, 1])  # in 10 tokens: each draw is one of 0..6
    regions = Regions(np.array([start]), np.array([10]), np.array([0]))
    draws = (np.array(fractions) + 0.5) / 7
    starts = place_spans(draws, lengths, np.zeros(2, int), regions)
    assert [(s, s + n) for s, n in zip(starts, lengths, strict=True)] == spans


def test_spans_keep_a_gap_inside_their_documents():
    samples = pooled(SETTINGS)
    for texts, blanks in draw(samples, 5, "token"):
        order = blanks.start_K.argsort()
        starts, ends = blanks.start_K[order], (blanks.start_K + blanks.length_K)[order]
        assert (starts[1:] > ends[:-1]).all()
        is_outside = np.isin(texts.tokens_N, (TOKENS.eos, TOKENS.cls))
        outside_before = np.concatenate(([0], np.cumsum(is_outside)))
        assert (outside_before[starts] == outside_before[ends]).all()


def test_length_does_not_depend_on_the_place():
    # The draw that reaches the goal tends to be a long one; it must not always be the last span.
    samples = [s for s in pooled(TOKEN_LEVEL) if (s.text == TOKENS.cls).sum() == 1]
    first, last = [], []
    for _, blanks in draw(samples, 20, "token"):
        by_place = blanks.length_K[blanks.start_K.argsort()]
        ends = np.flatnonzero(np.diff(blanks.piece_K, append=len(samples)))
        first.append(by_place[np.append(0, ends[:-1] + 1)])
        last.append(by_place[ends])
    table = [
        np.bincount(np.minimum(np.concatenate(lengths), 7), minlength=8)[1:]
        for lengths in (first, last)
    ]
    assert chi_square(np.array(table, float)) > SIGNIFICANCE


def test_longest_document_takes_what_the_others_leave():
    sizes = [22, 42, 102, 22]  # [CLS] and eos included
    document = [[TOKENS.cls, *[5] * (size - 2), TOKENS.eos] for size in sizes]
    bounds = np.arange(201) * sum(sizes)
    tokens = np.tile(np.concatenate(document), 200)
    texts = Texts(tokens, bounds, np.arange(200), 1)
    blanks = draw_token_blanks(generators(200), texts, PACKED, TOKENS, np.zeros(200, bool))
    offset = blanks.start_K - bounds[blanks.piece_K]
    index = np.cumsum(sizes).searchsorted(offset, side="right")
    covered = np.zeros((200, 4))
    np.add.at(covered, (blanks.piece_K, index), blanks.length_K)
    assert covered.max(axis=0)[[0, 1, 3]].tolist() == [3, 6, 3]  # floor(0.15 size)
    assert (covered.sum(axis=1) >= int(0.15 * sum(sizes))).all()


def test_lengths_that_fit_no_document_are_left_out():
    document = [TOKENS.cls, *[5] * 8, TOKENS.eos]
    texts = Texts(np.tile(document, 1000), np.arange(51) * 200, np.arange(50), 1)
    blanks = draw_token_blanks(generators(50), texts, PACKED, TOKENS, np.zeros(50, bool))
    order = blanks.start_K.argsort()
    starts, lengths = blanks.start_K[order], blanks.length_K[order]
    assert (starts[1:] > (starts + lengths)[:-1]).all()
    assert (starts % 10 >= 1).all() and (starts % 10 + lengths <= 9).all()
    assert (np.bincount(blanks.piece_K, blanks.length_K) < int(0.15 * 200)).any()


def test_short_text_gets_no_blank_unless_its_row_has_no_other():
    six, seven = [1003, 1, 2, 4, 5, 6], [1003, 1, 2, 4, 5, 6, 7]
    tokens = np.array(six + seven)
    beside = Texts(tokens, np.array([0, 6, 13]), np.array([0, 1]), slots_per_row=2)
    apart = beside._replace(slots_per_row=1)
    no_single = np.zeros(2, bool)
    blanks = draw_token_blanks(generators(1), beside, PACKED, TOKENS, no_single)
    assert set(blanks.piece_K.tolist()) == {1}
    blanks = draw_token_blanks(generators(2), apart, PACKED, TOKENS, no_single)
    assert np.bincount(blanks.piece_K)[0] == 1


def test_row_of_separators_gets_no_token_level_blank():
    texts = Texts(np.full(20, TOKENS.eos), np.array([0, 20]), np.array([0]), 1)
    blanks = draw_token_blanks(generators(1), texts, PACKED, TOKENS, np.array([True]))
    assert len(blanks.start_K) == 0


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_token_level_counts_and_shares_match_official(name):
    drawn = draw(golden(name), 10, "token")
    official = [len(sample.spans) for sample in golden(name)]
    assert kolmogorov_smirnov(official, counts_of(drawn)) > SIGNIFICANCE
    official = [sum(sample.lengths) / len(sample.text) for sample in golden(name)]
    assert kolmogorov_smirnov(official, shares_of(drawn)) > SIGNIFICANCE


@pytest.mark.parametrize("names", [TOKEN_LEVEL, ["bert_single_span"]], ids=["many", "single"])
def test_token_level_lengths_match_official(names):
    single_span = float(names == ["bert_single_span"])
    drawn = draw(pooled(names), 10, "token", single_span=single_span)
    if single_span:
        assert (counts_of(drawn) == 1).all()
    lengths = np.concatenate([blanks.length_K for _, blanks in drawn])
    official = np.concatenate([sample.lengths for sample in pooled(names)])
    bins = [np.bincount(np.minimum(values, 7), minlength=8)[1:] for values in (official, lengths)]
    assert chi_square(np.array(bins, float)) > SIGNIFICANCE


@pytest.mark.parametrize("names", [TOKEN_LEVEL, ["bert_single_span"]], ids=["many", "single"])
def test_token_level_places_match_official(names):
    drawn = draw(pooled(names), 4, "token", single_span=float(len(names) == 1))
    ours = [
        (b.start_K - t.bounds_P1[b.piece_K]) / np.diff(t.bounds_P1)[b.piece_K] for t, b in drawn
    ]
    official = [start / len(s.text) for s in pooled(names) for start, _ in s.spans]
    assert kolmogorov_smirnov(official, np.concatenate(ours)) > SIGNIFICANCE


def test_single_span_is_uniform_over_its_document():
    bounds = np.arange(2001) * 50
    tokens = np.full(100_000, 5)
    tokens[bounds[:-1]] = TOKENS.cls
    texts = Texts(tokens, bounds, np.arange(2000), 1)
    single = np.ones(2000, bool)
    blanks = draw_token_blanks(generators(2000), texts, PACKED, TOKENS, single)
    offset = blanks.start_K - bounds[:-1] - 1
    last = 49 - blanks.length_K
    assert offset.min() == 0
    assert (offset <= last).all() and (offset == last).any()
    fraction = (offset + 0.5) / (last + 1)
    assert kolmogorov_smirnov(fraction, (np.arange(100_000) + 0.5) / 100_000) > SIGNIFICANCE


def test_order_of_part_b_is_uniform_or_that_of_the_text():
    samples = golden("bert")
    for shuffle in (True, False):
        rises = []
        for _, blanks in draw(samples, 4, "token", shuffle_spans=shuffle):
            same_piece = np.diff(blanks.piece_K) == 0
            rises.append(np.diff(blanks.start_K)[same_piece] > 0)
        rises = np.concatenate(rises)
        if shuffle:  # a fair coin within 4 standard deviations
            assert abs(rises.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(rises))
        else:
            assert rises.all()


def test_sentences_end_at_their_marks_and_before_eos():
    tokens = np.array([1003, 1, 2, 3, 4, 5, 1000, 1003, 6, 20, 20, 7])
    starts, ends = sentences(
        Texts(tokens, np.array([0, 12]), np.array([0]), 1), TOKENS, IS_SENTENCE_END
    )
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
        (1, 4), (4, 6), (8, 10), (10, 11), (11, 12),
    ]  # fmt: skip


def test_sentence_level_matches_official():
    # The original skips the words between a full stop and eos, and takes in later [CLS]s; texts of
    # one document have neither.
    samples = [s for s in pooled(["sentence", "mixture_10b"]) if s.mode == 1]
    samples = [s for s in samples if (s.text == TOKENS.cls).sum() == 1]
    drawn = draw(samples, 10, "sentence")
    official = [len(sample.spans) for sample in samples]
    assert kolmogorov_smirnov(official, counts_of(drawn)) > SIGNIFICANCE
    official = [sum(sample.lengths) / len(sample.text) for sample in samples]
    assert kolmogorov_smirnov(official, shares_of(drawn)) > SIGNIFICANCE


def test_sentence_level_takes_whole_sentences():
    samples = golden("sentence")
    for texts, blanks in draw(samples, 3, "sentence"):
        whole = set(zip(*sentences(texts, TOKENS, IS_SENTENCE_END), strict=True))
        assert set(zip(blanks.start_K, blanks.start_K + blanks.length_K, strict=True)) <= whole
        goals = np.maximum((0.15 * np.diff(texts.bounds_P1)).astype(int), 1)
        covered = np.bincount(blanks.piece_K, blanks.length_K, len(samples))
        assert (covered >= goals).all()


@pytest.mark.parametrize(
    ("name", "suffix"), [("gpt", 0.0), ("gpt_infill", 1.0)], ids=["span", "end"]
)
def test_document_level_length_matches_official(name, suffix):
    with np.load(FOLDER / f"{name}.npz") as file:
        sizes, seps = file["in_length"], file["sep"]
    official = (sizes - seps + 1) / sizes
    drawn = draw(golden(name), 10, "document", document_suffix=suffix)
    assert kolmogorov_smirnov(official, shares_of(drawn)) > SIGNIFICANCE
    closed = np.mean([blanks.closed_K.mean() for _, blanks in drawn])
    single = np.mean([(s.text == TOKENS.cls).sum() == 1 for s in golden(name)])
    assert closed == (1 - suffix) * single


@pytest.mark.parametrize("style", ["batch", "row"])
def test_document_level_range(style):
    texts = Texts(np.arange(40), np.array([0, 40]), np.array([0]), 1)
    objective = ObjectiveConfig(document_min_ratio=0.2, draw=style, document_suffix=1.0)
    tokens = replace(TOKENS, cls=None)
    lengths = [
        draw_document_blanks(generators(1), texts, objective, tokens, np.array([share])).length_K[0]
        for share in np.arange(200) / 200
    ]
    longest = 38 if style == "batch" else 40
    assert sorted(set(lengths)) == list(range(8, longest + 1))
    spread = np.bincount(lengths)[8:]
    assert spread.max() - spread.min() <= 1


def test_mode_frequencies_match_official_mixture():
    with np.load(FOLDER / "mixture_10b.npz") as file:
        official = np.bincount(file["mode"], minlength=3)
    objective = ObjectiveConfig(
        token=0.5, sentence=0.3, document_min_ratio=0.25, decoder_noise=0.1, short_sequence=0.02
    )
    text = golden("mixture_10b")[0].text
    ours = np.zeros(3)
    for step in range(1500):
        batch = make_batch(
            [text], objective, TOKENS, sequence_length=640, seed=0, step=step,
            row_indices=[step], is_sentence_end_V=IS_SENTENCE_END,
        )  # fmt: skip
        ours[batch.objective_B[0]] += 1
    assert chi_square(np.array([official, ours])) > SIGNIFICANCE
    expected = np.array([0.5, 0.3, 0.2]) * 1e6
    assert chi_square(np.array([ours, expected])) > SIGNIFICANCE


def test_decoder_noise_rate_matches_official():
    samples = golden("bert_block_mask")
    official = np.concatenate([s.tokens[s.sep :] for s in samples])
    texts = [s.text for s in samples]
    batch = make_batch(
        texts, replace(PACKED, decoder_noise=0.1), TOKENS, sequence_length=640, seed=0, step=0,
        row_indices=range(len(texts)), is_sentence_end_V=IS_SENTENCE_END,
    )  # fmt: skip
    assert OBJECTIVES[batch.objective_B[0]] == "mask"
    assert not (batch.tokens_BT[batch.weights_BT == 0] == TOKENS.dblock).any()
    ours = batch.tokens_BT[batch.weights_BT > 0]
    table = [
        [(part_b == TOKENS.dblock).sum(), (~np.isin(part_b, (TOKENS.dblock, TOKENS.sop))).sum()]
        for part_b in (official, ours)
    ]
    assert chi_square(np.array(table, float)) > SIGNIFICANCE
    noisy, clean = table[1]
    rate = noisy / (noisy + clean)
    assert abs(rate - 0.1) < 4 * math.sqrt(0.1 * 0.9 / (noisy + clean))
