"""The interval mask, and that it alone decides who sees whom in a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import replace
from glmjax.model.attention import BlankMask
from glmjax.model.transformer import forward

FORWARD = jax.jit(forward, static_argnums=0)


def dense(mask: BlankMask, size: int) -> np.ndarray:
    """Whether each query sees each key [B, T, S]."""
    key_S = np.arange(size)
    start_BT, end_BT = np.asarray(mask.k_start_BT), np.asarray(mask.k_end_BT)
    return (start_BT[..., None] <= key_S) & (key_S < end_BT[..., None])


def test_every_context_is_the_official_rule():
    query, key, context = np.ogrid[:8, :8, :9]
    official = (key <= query) | (key < context)
    mask = BlankMask.from_context(np.arange(9), length=8)
    assert mask.k_start_BT.dtype == mask.k_end_BT.dtype == jnp.int32
    np.testing.assert_array_equal(dense(mask, 8), np.moveaxis(official, -1, 0))


def test_chatglm_mask_of_a_prompt_and_one_answer_token():
    # a b d [gMASK] <sop> x1
    hidden = [[0, 0, 0, 0, 1, 1]] * 4 + [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(
        dense(BlankMask.from_context(np.array([4]), length=6), 6)[0], ~np.array(hidden, bool)
    )


def test_queries_after_a_cache_see_all_of_it():
    mask = BlankMask.from_context(np.array([0, 2, 4]), length=4)
    after = dense(mask.after(np.array([0, 3, 5])), 9)
    before = dense(mask, 4)
    for b, cached in enumerate([0, 3, 5]):
        assert after[b, :, :cached].all()
        np.testing.assert_array_equal(after[b, :, cached : cached + 4], before[b])
        assert not after[b, :, cached + 4 :].any()


@pytest.fixture(scope="module", params=["reference", "blockwise"])
def model(family, request):
    """Logits of rows, by either implementation of attention."""
    config = replace(family.config, attention=request.param)

    def logits(rows, tokens_BT):
        positions_B2T, mask = rows.positions_B2T, rows.mask
        return np.asarray(FORWARD(config, family.params, tokens_BT, positions_B2T, mask))

    return logits


def other_tokens(tokens_BT, chosen_BT):
    """Other tokens where chosen."""
    return np.where(chosen_BT, 10 + (tokens_BT - 10 + 43) % 86, tokens_BT).astype(np.int32)


def test_pieces_of_a_row_do_not_see_each_other(model, rows):
    before_BTV = model(rows, rows.tokens_BT)
    for piece in range(3):
        changed_BT = rows.piece_BT == piece
        after_BTV = model(rows, other_tokens(rows.tokens_BT, changed_BT))
        np.testing.assert_array_equal(after_BTV[~changed_BT], before_BTV[~changed_BT])
        assert np.all(np.any(after_BTV[changed_BT] != before_BTV[changed_BT], axis=-1))


def test_padding_is_seen_by_nobody(model, rows):
    before_BTV = model(rows, rows.tokens_BT)
    padding_BT = rows.piece_BT < 0
    after_BTV = model(rows, other_tokens(rows.tokens_BT, padding_BT))
    np.testing.assert_array_equal(after_BTV[~padding_BT], before_BTV[~padding_BT])
    assert np.isfinite(after_BTV).all()


def test_rows_of_a_batch_do_not_see_each_other(model, rows):
    before_BTV = model(rows, rows.tokens_BT)
    odd_BT = np.broadcast_to(np.arange(8)[:, None] % 2 == 1, rows.tokens_BT.shape)
    after_BTV = model(rows, other_tokens(rows.tokens_BT, odd_BT))
    np.testing.assert_array_equal(after_BTV[::2], before_BTV[::2])


def test_a_token_changes_exactly_the_outputs_that_may_see_it(model, rows):
    """Through several layers too: who sees a part B token is behind it in the same piece."""
    before_BTV = model(rows, rows.tokens_BT)
    visible_BTS = dense(rows.mask, 24)
    for key in range(0, 24, 3):
        changed_BT = np.broadcast_to(np.arange(24) == key, rows.tokens_BT.shape)
        after_BTV = model(rows, other_tokens(rows.tokens_BT, changed_BT))
        sees_BT = visible_BTS[:, :, key] | changed_BT  # a token always changes its own output
        differs_BT = np.any(after_BTV != before_BTV, axis=-1)
        np.testing.assert_array_equal(differs_BT, sees_BT)
