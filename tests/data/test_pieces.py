"""The worked layouts: official constructors run with fixed spans."""

import numpy as np
import pytest

from glmjax.config import SpecialTokens
from glmjax.data.pieces import Piece, fill_piece, pair_piece, suffix_piece

GLM = SpecialTokens(
    mask=103, smask=205, gmask=206, sop=201, eop=202, eos=0, pad=0, cls=101, dblock=207
)
GLM_130B = SpecialTokens(mask=101, gmask=102, sop=104, eop=105, eos=106, pad=0)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def assert_piece(piece: Piece, tokens: str, targets: str, position: str, block: str, sep: int):
    """`targets` are those of part B alone; part A is copied from the tokens."""
    assert piece.tokens.tolist() == numbers(tokens)
    assert piece.targets.tolist() == numbers(tokens)[:sep] + numbers(targets)
    assert piece.positions_2T.tolist() == [numbers(position), numbers(block)]
    assert piece.weights.tolist() == [0] * sep + [1] * (len(piece.tokens) - sep)
    assert piece.context == sep


def test_e1_reversed_spans():
    text = np.array([101, 11, 12, 13, 14, 15, 16])
    assert_piece(
        fill_piece(text, [(5, 7), (3, 4)], GLM, mask=103),
        tokens="101 11 12 103 14 103 201 15 16 201 13",
        targets="15 16 202 13 202",
        position="0 1 2 3 4 5 5 5 5 3 3",
        block="0 0 0 0 0 0 1 2 3 1 2",
        sep=6,
    )


def test_e2_spans_in_text_order():
    text = np.array([101, 11, 12, 13, 14, 15, 16])
    assert_piece(
        fill_piece(text, [(1, 3), (5, 6)], GLM, mask=103),
        tokens="101 103 13 14 103 16 201 11 12 201 15",
        targets="11 12 202 15 202",
        position="0 1 2 3 4 5 1 1 1 4 4",
        block="0 0 0 0 0 0 1 2 3 1 2",
        sep=6,
    )


def test_e3_sentence():
    text = np.array([101, 11, 12, 15, 16, 17, 18, 19, 13, 14])
    assert_piece(
        fill_piece(text, [(1, 4)], GLM, mask=205),
        tokens="101 205 16 17 18 19 13 14 201 11 12 15",
        targets="11 12 15 202",
        position="0 1 2 3 4 5 6 7 1 1 1 1",
        block="0 0 0 0 0 0 0 0 1 2 3 4",
        sep=8,
    )


def test_e4_suffix():
    text = np.array([101, 11, 12, 13, 14, 15, 16, 17, 18, 0])
    assert_piece(
        suffix_piece(text, 4, GLM, mask=206),
        tokens="101 11 12 13 14 15 206 201 16 17 18",
        targets="16 17 18 0",
        position="0 1 2 3 4 5 6 6 6 6 6",
        block="0 0 0 0 0 0 0 1 2 3 4",
        sep=7,
    )


def test_e5_document_span():
    text = np.array([101, 11, 12, 13, 14, 15, 16, 17, 18, 0])
    assert_piece(
        fill_piece(text, [(4, 8)], GLM, mask=206),
        tokens="101 11 12 13 206 18 0 201 14 15 16 17",
        targets="14 15 16 17 202",
        position="0 1 2 3 4 5 6 4 4 4 4 4",
        block="0 0 0 0 0 0 0 1 2 3 4 5",
        sep=7,
    )


def test_e6_whole_text_as_suffix():
    assert_piece(
        suffix_piece(np.arange(1, 11), 10, GLM_130B, mask=102, positions="straight"),
        tokens="102 104 1 2 3 4 5 6 7 8 9",
        targets="1 2 3 4 5 6 7 8 9 10",
        position="0 1 2 3 4 5 6 7 8 9 10",
        block="0 0 0 0 0 0 0 0 0 0 0",
        sep=1,
    )


def test_e7_pair():
    assert_piece(
        pair_piece(np.array([1, 2, 3]), np.array([7, 8]), GLM_130B, mask=101),
        tokens="1 2 3 101 104 7 8",
        targets="7 8 105",
        position="0 1 2 3 4 5 6",
        block="0 0 0 0 0 0 0",
        sep=4,
    )


def test_e8_frozen_positions():
    assert_piece(
        fill_piece(np.arange(1, 7), [(4, 6), (2, 3)], GLM_130B, mask=101, positions="frozen"),
        tokens="1 2 101 4 101 104 5 6 104 3",
        targets="5 6 105 3 105",
        position="0 1 2 3 4 4 4 4 2 2",
        block="0 0 0 0 0 0 0 0 0 0",
        sep=5,
    )


def test_piece_without_blanks_is_the_text():
    assert_piece(
        fill_piece(np.array([7, 8, 9]), [], GLM, mask=103),
        tokens="7 8 9",
        targets="",
        position="0 1 2",
        block="0 0 0",
        sep=3,
    )


def test_suffix_does_not_score_the_cls_of_later_documents():
    piece = suffix_piece(np.array([101, 11, 12, 0, 101, 13, 0]), 5, GLM, mask=206)
    assert piece.targets[piece.context :].tolist() == [12, 0, 101, 13, 0]
    assert piece.weights[piece.context :].tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("spans", [[(0, 2), (2, 3)], [(2, 3), (0, 2)]], ids=["forward", "reversed"])
def test_neighbouring_spans_keep_one_mask_each(spans):
    piece = fill_piece(np.array([11, 12, 13, 14]), spans, GLM, mask=205)
    assert piece.tokens[:3].tolist() == [205, 205, 14]
    position_of = {(0, 2): 0, (2, 3): 1}
    expected = [position_of[span] for span in spans for _ in range(span[1] - span[0] + 1)]
    assert piece.positions_2T[0, 3:].tolist() == expected
