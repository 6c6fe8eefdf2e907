"""Blank infilling: span lengths, how much is masked, the mixture, worked examples."""

import math

import numpy as np

from experiments import glm_10b, glm_130b, glm_base
from experiments.reproduce.number import Number
from glmjax.config import Experiment, SpecialTokens
from glmjax.data.blanks import OBJECTIVES, draw_plan
from glmjax.data.pieces import Piece, fill_piece, fill_pieces, pair_piece, suffix_piece
from glmjax.data.spans import (
    Regions,
    Texts,
    draw_document_blanks,
    draw_token_blanks,
    place_spans,
    span_length_probabilities,
)

TOPIC = "Objective"
GLM_SOURCE = "THUDM/GLM blocklm_utils.py"
COLLATOR = "THUDM/LargeScale glm/collator.py"
SEED = 0
ROWS = 512
"""Rows that are drawn to measure shares and lengths."""
PLANS = 20_000
"""Objectives that are drawn to measure the mixture."""

GLM_TOKENS = SpecialTokens(
    mask=103, smask=205, gmask=206, sop=201, eop=202, eos=0, pad=0, cls=101, dblock=207
)
GLM_130B_TOKENS = SpecialTokens(mask=101, gmask=102, sop=104, eop=105, eos=106, pad=0)
TEXT = np.array([101, 11, 12, 13, 14, 15, 16])
LONG = np.array([101, 11, 12, 13, 14, 15, 16, 17, 18, 0])
SENTENCES = np.array([101, 11, 12, 15, 16, 17, 18, 19, 13, 14])


def examples() -> tuple[tuple[str, Piece, str], ...]:
    """What the official constructors make of fixed spans: name, ours, and theirs as inputs, targets
    of part B, positions, block positions, length of part A."""
    glm, glm_130b = GLM_TOKENS, GLM_130B_TOKENS
    return (
        (
            "token-level, reversed", fill_piece(TEXT, [(5, 7), (3, 4)], glm, mask=103),
            (
                "101 11 12 103 14 103 201 15 16 201 13 15 16 202 13 202 "
                "0 1 2 3 4 5 5 5 5 3 3 0 0 0 0 0 0 1 2 3 1 2 6"
            ),
        ),
        (
            "token-level, in order", fill_piece(TEXT, [(1, 3), (5, 6)], glm, mask=103),
            (
                "101 103 13 14 103 16 201 11 12 201 15 11 12 202 15 202 "
                "0 1 2 3 4 5 1 1 1 4 4 0 0 0 0 0 0 1 2 3 1 2 6"
            ),
        ),
        (
            "a sentence", fill_piece(SENTENCES, [(1, 4)], glm, mask=205),
            (
                "101 205 16 17 18 19 13 14 201 11 12 15 11 12 15 202 "
                "0 1 2 3 4 5 6 7 1 1 1 1 0 0 0 0 0 0 0 0 1 2 3 4 8"
            ),
        ),
        (
            "a continuation", suffix_piece(LONG, 4, glm, mask=206),
            (
                "101 11 12 13 14 15 206 201 16 17 18 16 17 18 0 "
                "0 1 2 3 4 5 6 6 6 6 6 0 0 0 0 0 0 0 1 2 3 4 7"
            ),
        ),
        (
            "a long span", fill_piece(LONG, [(4, 8)], glm, mask=206),
            (
                "101 11 12 13 206 18 0 201 14 15 16 17 14 15 16 17 202 "
                "0 1 2 3 4 5 6 4 4 4 4 4 0 0 0 0 0 0 0 1 2 3 4 5 7"
            ),
        ),
        (
            "GLM-130B, all of a text",
            suffix_piece(np.arange(1, 11), 10, glm_130b, mask=102, positions="straight"),
            (
                "102 104 1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 10 "
                "0 1 2 3 4 5 6 7 8 9 10 0 0 0 0 0 0 0 0 0 0 0 1"
            ),
        ),
        (
            "GLM-130B, a pair", pair_piece(np.arange(1, 4), np.array([7, 8]), glm_130b, mask=101),
            "1 2 3 101 104 7 8 7 8 105 0 1 2 3 4 5 6 0 0 0 0 0 0 0 4",
        ),
        (
            "GLM-130B, token-level",
            fill_piece(np.arange(1, 7), [(4, 6), (2, 3)], glm_130b, mask=101, positions="frozen"),
            (
                "1 2 101 4 101 104 5 6 104 3 5 6 105 3 105 "
                "0 1 2 3 4 4 4 4 2 2 0 0 0 0 0 0 0 0 0 0 5"
            ),
        ),
    )  # fmt: skip


PLACES = (
    # draws, offset, starts of two spans of 2 and 1 tokens among 10
    ((3, 0), 0, "0 6"),
    ((6, 6), 0, "6 9"),
    ((0, 0), 1, "1 4"),
)
MIXTURES = (
    # model, objective, share, source
    ("GLM-130B", "multitask", "0.05", "GLM-130B table 11 multitask_ratio"),
    ("GLM-130B", "mask", "0.285", "30% of the 95% without multi-task data, GLM-130B section 2.2"),
    ("GLM-130B", "gmask", "0.665", "70% of the 95% without multi-task data, GLM-130B section 2.2"),
    ("GLM-10B", "mask", "0.5", "THUDM/GLM config/ds_block_10B.sh"),
    ("GLM-10B", "smask", "0.3", "THUDM/GLM config/ds_block_10B.sh"),
    ("GLM-10B", "gmask", "0.2", "THUDM/GLM config/ds_block_10B.sh"),
)


def numbers() -> list[Number]:
    return [*_lengths(), *_token_level(), *_document_level(), *_mixture(), *_places(), *_examples()]


def _lengths() -> list[Number]:
    weights = span_length_probabilities(3.0)
    mean = float(weights @ np.arange(1, len(weights) + 1))
    how = "spans.span_length_probabilities"
    return [
        Number(
            TOPIC, "weights of span lengths 1 to 8",
            ".1572 .2358 .2358 .1768 .1061 .0531 .0227 .0085", tuple(weights[:8].tolist()), "",
            how, GLM_SOURCE,
        ),
        Number(TOPIC, "longest span", "39", len(weights), "tokens", how, GLM_SOURCE),
        Number(TOPIC, "mean span", "3.1572", mean, "tokens", how, GLM_SOURCE),
        Number(
            TOPIC, "mass of lengths 1 to 39 before they are normalised", "0.95021",
            3 * math.exp(-3) / float(weights[0]), "",
            "Poisson(3) at 1 over the weight of 1", GLM_SOURCE,
        ),
    ]  # fmt: skip


def expected_spans(weights: np.ndarray, goal: int) -> float:
    """How many lengths are drawn on average until their sum reaches the goal: the renewal equation
    m(s) = 1 + sum over l of weight(l) m(s + l), which is 0 from the goal on."""
    more = np.zeros(goal + len(weights) + 1)
    for total in range(goal - 1, -1, -1):
        more[total] = 1 + weights @ more[total + 1 : total + 1 + len(weights)]
    return float(more[0])


def _token_level() -> list[Number]:
    """GLM-130B's pieces of 500 tokens and GLM-Base's rows of 512: computed, then drawn."""
    weights = span_length_probabilities(3.0)
    mean = float(weights @ np.arange(1, len(weights) + 1))
    found = []
    for model, experiment, pieces, source in (
        ("GLM-130B", glm_130b.experiment(), 4, COLLATOR),
        ("GLM-Base", glm_base.experiment(), 1, GLM_SOURCE),
    ):
        size = (experiment.data.text_length or 0) // pieces
        expected = expected_spans(weights, int(experiment.objective.mask_ratio * size))
        masked_P, spans_P, wrong = draw_pieces(experiment, size, pieces)
        name = f"{model}, {size} tokens"
        found.append(
            Number(
                TOPIC, f"{name}: share masked", "0.15", mean * expected / size, "",
                "mean span x spans by the renewal equation (Wald)", f"{source}, mask_prob",
            )
        )  # fmt: skip
        if model == "GLM-130B":
            found.append(
                Number(
                    TOPIC, f"{name}: growth by its spans", "48", 2 * expected, "tokens",
                    "2 x spans by the renewal equation", source,
                )
            )  # fmt: skip
        drawn = f"spans.draw_token_blanks, {len(spans_P):,} pieces, seed {SEED}"
        analytic = "the computed value, by the renewal equation"
        for what, expected_value, sample_P in (
            ("spans", expected, spans_P),
            ("share masked", mean * expected / size, masked_P / size),
            ("tokens of part B", (mean + 1) * expected, masked_P + spans_P),
        ):
            found.append(
                Number(
                    TOPIC, f"{name}: {what}, drawn", f"{expected_value:.4f}",
                    float(sample_P.mean()), "", drawn, analytic,
                    uncertainty=4 * float(sample_P.std()) / math.sqrt(len(sample_P)),
                )
            )  # fmt: skip
        found.append(
            Number(
                TOPIC, f"{name}: pieces against |B| = masked + spans, total = n + 2 spans", "0",
                wrong, "pieces", f"{drawn}, pieces.fill_pieces", source,
            )
        )  # fmt: skip
    return found


def draw_pieces(
    experiment: Experiment, size: int, pieces_per_row: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Masked tokens and spans of pieces of ordinary tokens, and how many of the pieces are not as
    long as these two numbers say."""
    tokens = experiment.model.special_tokens
    assert tokens is not None
    count = ROWS * pieces_per_row
    bounds_P1 = size * np.arange(count + 1)
    texts = Texts(np.full(count * size, 1000), bounds_P1, np.arange(count), pieces_per_row)
    rngs = [np.random.default_rng((SEED, row)) for row in range(ROWS)]
    blanks = draw_token_blanks(rngs, texts, experiment.objective, tokens, np.zeros(count, bool))
    filled = fill_pieces(texts.tokens_N, bounds_P1, blanks, tokens, tokens.mask, "2d")
    masked_P = np.bincount(blanks.piece_K, blanks.length_K, count)
    spans_P = np.bincount(blanks.piece_K, minlength=count)
    right_P = filled.length_P - filled.context_P == masked_P + spans_P
    right_P &= filled.length_P == size + 2 * spans_P
    return masked_P, spans_P, int((~right_P).sum())


def _document_level() -> list[Number]:
    experiment = glm_130b.experiment()
    size, tokens = experiment.data.text_length or 0, experiment.model.special_tokens
    assert tokens is not None
    count = 4 * ROWS
    tokens_N = np.full(count * size, 1000, np.int16)
    texts = Texts(tokens_N, size * np.arange(count + 1), np.arange(count), 1)
    rngs = [np.random.default_rng((SEED, row)) for row in range(count)]
    share_P = np.random.default_rng(SEED).random(count)
    blanks = draw_document_blanks(rngs, texts, experiment.objective, tokens, share_P)
    length_P = blanks.length_K
    return [
        Number(
            TOPIC, "GLM-130B, [gMASK]: tokens to generate of 2000, drawn", "1200",
            float(length_P.mean()), "tokens",
            f"spans.draw_document_blanks, {count:,} rows, seed {SEED}",
            f"uniform over 0.2 n to n, {COLLATOR}",
            uncertainty=4 * float(length_P.std()) / math.sqrt(count),
        )
    ]  # fmt: skip


def _mixture() -> list[Number]:
    found = []
    experiments = {"GLM-130B": glm_130b.experiment(), "GLM-10B": glm_10b.experiment()}
    drawn = {}
    for model, experiment in experiments.items():
        rng = np.random.default_rng(SEED)
        plans = [draw_plan(rng, experiment.objective) for _ in range(PLANS)]
        drawn[model] = np.bincount([plan.objective for plan in plans], minlength=len(OBJECTIVES))
    for model, name, printed, source in MIXTURES:
        share = float(drawn[model][OBJECTIVES.index(name)]) / PLANS
        found.append(
            Number(
                TOPIC, f"{model}, share of {name} rows, drawn", printed, share, "",
                f"blanks.draw_plan, {PLANS:,} times, seed {SEED}", source,
                uncertainty=4 * math.sqrt(share * (1 - share) / PLANS),
            )
        )  # fmt: skip
    return found


def _places() -> list[Number]:
    found = []
    for draws, offset, printed in PLACES:
        regions = Regions(np.array([offset]), np.array([10]), np.array([0]))
        fraction_K = (np.array(draws) + 0.5) / 7  # of the draws 0 to 6
        starts = place_spans(fraction_K, np.array([2, 1]), np.zeros(2, int), regions)
        found.append(
            Number(
                TOPIC, f"starts of spans of 2 and 1 among 10 tokens from {offset}, draws {draws}",
                printed, tuple(starts.tolist()), "", "spans.place_spans", GLM_SOURCE,
            )
        )  # fmt: skip
    return found


def _examples() -> list[Number]:
    return [
        Number(
            TOPIC, f"worked example, {name}: part A and B, targets, positions, length of A",
            printed, _flat(piece), "", "pieces.fill_piece, suffix_piece or pair_piece",
            f"output of {COLLATOR if 'GLM-130B' in name else GLM_SOURCE}",
        )
        for name, piece, printed in examples()
    ]  # fmt: skip


def _flat(piece: Piece) -> tuple[float, ...]:
    fields = piece.tokens, piece.targets[piece.context :], *piece.positions_2T, [piece.context]
    return tuple(np.concatenate(fields).tolist())
