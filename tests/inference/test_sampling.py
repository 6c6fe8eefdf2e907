import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.inference.sampling import Sampling, cut_tail, sample

draw = jax.jit(sample)
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


def test_all_settings_share_one_compilation():
    size = draw._cache_size()
    logits_BV = jnp.zeros((3, 7))
    keys_B = jax.random.split(jax.random.key(1), 3)
    for sampling in [*SETTINGS, Sampling(temperature=0.0, seed=3)]:
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
    ],
    ids=["temperature", "nan", "top_k", "top_p-zero", "top_p-large", "seed"],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
