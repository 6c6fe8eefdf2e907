import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.inference.sampling import (
    History,
    Sampling,
    apply_rules,
    cut_tail,
    largest,
    pad_ids,
    per_row,
    sample,
)

ENDS = (5, 9)


@jax.jit
def draw(logits_BV, sampling, key_B):
    one_B = jnp.ones(len(logits_BV), jnp.int32)
    return sample(logits_BV, sampling, key_B, History(one_B[:, None], one_B, one_B, ENDS))


@jax.jit
def rule(logits_BV, sampling, ids_BS, length_B, prompt_B):
    return apply_rules(logits_BV, sampling, History(ids_BS, length_B, prompt_B, ENDS))


cut = jax.jit(cut_tail)

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=1000),
    Sampling(top_p=0.3),
    Sampling(top_p=0.9),
    Sampling(top_p=1e-6),
    Sampling(temperature=1.7, top_k=9, top_p=0.8),
]


def name(sampling):
    return f"t{sampling.temperature}-k{sampling.top_k}-p{sampling.top_p}"


def probabilities(logits_V, sampling):
    """Walks through the tokens from the most probable one down, in float64."""
    logits_V = logits_V.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits_V)
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(logits_V[order] - logits_V[order[0]])
    p /= p.sum()
    kept, total = 0, 0.0
    while kept < len(order) and (total < sampling.top_p or sampling.top_p == 1):
        total += p[kept]
        kept += 1
    result_V = np.zeros_like(logits_V)
    result_V[order[:kept]] = p[:kept] / p[:kept].sum()
    return result_V


@pytest.mark.parametrize("sampling", SETTINGS, ids=name)
def test_cut_tail_leaves_the_reference_distribution(sampling):
    logits_BV = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32) * 2
    cut_BV = cut(jnp.asarray(logits_BV / sampling.temperature), sampling)
    expected_BV = np.stack([probabilities(logits_V, sampling) for logits_V in logits_BV])
    np.testing.assert_array_equal(np.isfinite(cut_BV), expected_BV > 0)
    # float32: 50 exponentials, each off by a few units in the last place of logits below 16.
    np.testing.assert_allclose(jax.nn.softmax(cut_BV), expected_BV, rtol=1e-5)


@pytest.mark.parametrize("sampling", SETTINGS, ids=name)
def test_drawn_frequencies_are_the_reference_probabilities(sampling):
    draws = 20_000
    logits_V = np.random.default_rng(1).normal(size=12).astype(np.float32)
    logits_BV = jnp.broadcast_to(logits_V, (draws, 12))
    ids_B = draw(logits_BV, sampling, jax.random.split(jax.random.key(sampling.seed), draws))
    frequency_V = np.bincount(ids_B, minlength=12) / draws
    p_V = probabilities(logits_V, sampling)
    # Five standard deviations of a binomial share; exactly zero outside the kept tokens.
    assert np.all(np.abs(frequency_V - p_V) <= 5 * np.sqrt(p_V * (1 - p_V) / draws))


def test_temperature_zero_takes_the_first_most_probable_token():
    logits_BV = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])
    keys_B = jax.random.split(jax.random.key(0), 2)
    assert draw(logits_BV, Sampling(temperature=0.0), keys_B).tolist() == [1, 0]


def test_ties_with_the_last_kept_token_are_kept():
    logits_BV = jnp.array([[1.0, 3.0, 1.0, 0.0]])
    kept = np.isfinite(cut(logits_BV, Sampling(top_k=2)))
    assert kept.tolist() == [[True, True, True, False]]


def test_a_row_does_not_depend_on_its_neighbours():
    logits_BV = jax.random.normal(jax.random.key(0), (16, 100))
    keys_B = jax.random.split(jax.random.key(1), 16)
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95)
    whole_B = draw(logits_BV, sampling, keys_B)
    alone_B = [int(draw(logits_BV[b : b + 1], sampling, keys_B[b : b + 1])[0]) for b in range(16)]
    assert whole_B.tolist() == alone_B


@pytest.mark.parametrize("smallest", [0.0, -np.inf], ids=["finite", "with-infinity"])
def test_largest_takes_the_fewest_that_reach_the_sum(smallest):
    random = np.random.default_rng(3)
    x_BV = random.normal(size=(40, 30)).round(1).astype(np.float32)
    x_BV[:, ::7] = smallest
    weight_BV = random.integers(0, 4, x_BV.shape).astype(np.float32)
    target_B1 = random.integers(1, 60, (40, 1)).astype(np.float32)
    target_B1[0] = np.inf
    for x_V, weight_V, target, is_taken_V in zip(
        x_BV, weight_BV, target_B1[:, 0], largest(x_BV, weight_BV, target_B1), strict=True
    ):
        enough = [bound for bound in x_V if weight_V[x_V >= bound].sum() >= target]
        np.testing.assert_array_equal(is_taken_V, x_V >= max(enough, default=-np.inf))


LENGTHS = np.array([20, 12, 7, 3, 2], np.int32)
PROMPTS = np.array([4, 12, 1, 1, 2], np.int32)


def histories():
    """Logits, and rows of few different tokens, with some behind them that do not count."""
    random = np.random.default_rng(4)
    ids_BS = random.integers(0, 4, (5, 24)).astype(np.int32)
    return random.normal(size=(5, 12)).astype(np.float32), ids_BS


def test_the_repetition_penalty_makes_tokens_that_stand_before_less_probable():
    logits_BV, ids_BS = histories()
    found_BV = rule(logits_BV, Sampling(repetition_penalty=1.3), ids_BS, LENGTHS, PROMPTS)
    for logits_V, ids_S, length, found_V in zip(logits_BV, ids_BS, LENGTHS, found_BV, strict=True):
        for id, logit in enumerate(logits_V):
            factor = 1.3 if logit < 0 else 1 / 1.3
            expected = logit * factor if id in ids_S[:length] else logit
            np.testing.assert_allclose(found_V[id], expected, rtol=3e-7)


@pytest.mark.slow
def test_the_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits_BV, ids_BS = histories()
    found_BV = rule(logits_BV, Sampling(repetition_penalty=1.3), ids_BS, LENGTHS, PROMPTS)
    official = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    for logits_V, ids_S, length, found_V in zip(logits_BV, ids_BS, LENGTHS, found_BV, strict=True):
        ids, logits = torch.tensor(ids_S[None, :length]).long(), torch.tensor(logits_V[None])
        np.testing.assert_allclose(found_V, official(ids, logits)[0].numpy(), rtol=3e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_no_ngram_whose_last_token_was_generated_comes_again(n):
    logits_BV, ids_BS = histories()
    found_BV = rule(logits_BV, Sampling(no_repeat_ngram=n), ids_BS, LENGTHS, PROMPTS)
    numbers = zip(logits_BV, ids_BS, LENGTHS, PROMPTS, found_BV, strict=True)
    for logits_V, ids_S, length, prompt, found_V in numbers:
        ids = ids_S[:length].tolist()
        following = collections.defaultdict(set)
        for end in range(prompt, length):
            if end >= n - 1:
                following[tuple(ids[end - n + 1 : end])].add(ids[end])
        banned = following[tuple(ids[length - n + 1 :])] if length > n else set()
        expected_V = [-np.inf if id in banned else x for id, x in enumerate(logits_V)]
        np.testing.assert_array_equal(found_V, np.float32(expected_V))
    assert np.isneginf(found_BV[0]).any() == (n < 5)
    assert not np.isneginf(found_BV[1]).any()  # Nothing was generated.


def test_pieces_do_not_end_early_and_banned_ids_are_not_drawn():
    logits_BV, ids_BS = histories()
    sampling = Sampling(min_new_tokens=6, banned=(0, 11, 40))
    found_BV = rule(logits_BV, sampling, ids_BS, LENGTHS, PROMPTS)
    for b, new in enumerate(LENGTHS - PROMPTS):
        banned = {0, 11, *(ENDS if new < 6 else ())}
        assert set(np.flatnonzero(np.isneginf(found_BV[b]))) == banned
        others = [id for id in range(12) if id not in banned]
        np.testing.assert_array_equal(found_BV[b, others], logits_BV[b, others])


def test_rules_that_are_off_change_nothing():
    logits_BV, ids_BS = histories()
    found_BV = rule(logits_BV, Sampling(), ids_BS, LENGTHS, PROMPTS)
    np.testing.assert_array_equal(found_BV, logits_BV)


def test_rows_have_settings_of_their_own():
    samplings = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.7, top_k=3),
        Sampling(top_p=0.6, banned=(1, 2, 3)),
        Sampling(temperature=2.0, repetition_penalty=1.5, no_repeat_ngram=2),
        Sampling(temperature=0.0, min_new_tokens=9, banned=tuple(range(20, 40))),
        Sampling(repetition_penalty=0.5, top_k=5, top_p=0.9, no_repeat_ngram=1),
    ]
    random = np.random.default_rng(5)
    copies, B = 50, 50 * len(samplings)
    logits_BV = random.normal(size=(B, 40)).astype(np.float32)
    ids_BS = random.integers(0, 40, (B, 12)).astype(np.int32)
    length_B, prompt_B = np.full(B, 10), np.full(B, 4)
    key_B = jax.random.split(jax.random.key(2), B)

    @jax.jit
    def draw_behind(sampling, logits_BV, key_B, *history):
        return sample(logits_BV, sampling, key_B, History(*history, ENDS))

    arrays = logits_BV, key_B, ids_BS, length_B, prompt_B
    together_B = draw_behind(per_row(samplings * copies), *arrays)
    for b, sampling in enumerate(samplings):
        rows = slice(b, B, len(samplings))
        alone_B = draw_behind(sampling, *(x[rows] for x in arrays))
        np.testing.assert_array_equal(together_B[rows], alone_B)


def test_settings_of_rows_are_arrays_of_fixed_types():
    rows = per_row([Sampling(), Sampling(temperature=1, banned=(7,))], 32)
    for field, leaf in zip(dataclasses.fields(rows), jax.tree.leaves(rows), strict=True):
        assert leaf.dtype == (np.float32 if isinstance(field.default, float) else np.int32)
        assert leaf.shape == ((2, 32) if field.name == "banned" else (2,))
    assert rows.banned[1].tolist() == [7] + [-1] * 31
    assert [len(pad_ids(range(n))) for n in (0, 16, 17, 33)] == [16, 16, 32, 64]


def test_all_settings_share_one_compilation():
    size = draw._cache_size()
    logits_BV = jnp.zeros((3, 7))
    keys_B = jax.random.split(jax.random.key(1), 3)
    others = [
        Sampling(temperature=0.0, seed=3),
        Sampling(repetition_penalty=1.2, no_repeat_ngram=2, min_new_tokens=4),
        Sampling(banned=(3,)),
        Sampling(banned=tuple(range(16))),
    ]
    for sampling in [*SETTINGS, *others]:
        draw(logits_BV, sampling, keys_B)
    assert draw._cache_size() == size + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature must be 0 or positive, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or positive, got nan"),
        ({"top_k": -1}, "top_k must be 0 .off. or positive, got -1"),
        ({"top_p": 0.0}, "top_p must be in .0, 1., got 0.0"),
        ({"top_p": 1.5}, "top_p must be in .0, 1., got 1.5"),
        ({"seed": -1}, "seed must be in .0, 2.31., got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be positive, got nan"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be 0 .off. or positive, got -1"),
        ({"min_new_tokens": -1}, "min_new_tokens must be 0 or positive, got -1"),
        ({"banned": (4, -1)}, "banned ids must be 0 or positive, got -1"),
    ],
    ids=[
        "temperature", "nan", "top_k", "top_p-zero", "top_p-large", "seed", "penalty-zero",
        "penalty-nan", "ngram", "min", "banned",
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
