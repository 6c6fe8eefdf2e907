import math

import numpy as np
import pytest
from scipy.stats import linregress

from glmjax.sweep.scaling_law import (
    Law,
    fit_law,
    fit_parabola,
    fit_power_law,
    frontier,
    interval,
    predict,
    predict_run,
)

TRUE = Law(1.5, 60.0, 300.0, 0.3, 0.35)
NOISE = 0.004
BUDGETS = {
    1e12: (1e5, 2e5, 3e5, 5e5, 8e5),
    3e12: (1.5e5, 3e5, 5e5, 8e5, 1.3e6),
    9e12: (2e5, 4e5, 8e5, 1.3e6, 2e6),
}
SIZES = np.array([size for sizes in BUDGETS.values() for size in sizes])
TOKENS = np.array([budget / (6 * size) for budget, sizes in BUDGETS.items() for size in sizes])


def measured(rng, sizes=SIZES, tokens=TOKENS, noise=NOISE):
    return predict(TRUE, sizes, tokens) * np.exp(noise * rng.standard_normal(np.shape(sizes)))


def test_exact_losses_give_the_law_back():
    losses = measured(np.random.default_rng(0), noise=0.0)
    fit = fit_law(SIZES, TOKENS, losses, samples=3)
    np.testing.assert_allclose(fit.law, TRUE, rtol=0.05)
    np.testing.assert_allclose(predict(fit.law, SIZES, TOKENS), losses, rtol=1e-5)
    assert fit.r2 > 1 - 1e-6
    assert predict_run(fit, 1e6, 5e6)[0] == pytest.approx(float(predict(TRUE, 1e6, 5e6)), rel=1e-3)


def test_noisy_losses_have_the_law_within_its_intervals():
    fit = fit_law(SIZES, TOKENS, measured(np.random.default_rng(1)), samples=40)
    for name, samples, true in zip(Law._fields, fit.samples, TRUE, strict=True):
        low, high = interval(samples)
        assert low <= true <= high, name
        assert low < high, name
    assert 0.99 < fit.r2 < 1
    assert NOISE / 4 < fit.residuals.std() < NOISE * 2


def test_one_wild_run_hardly_moves_the_fit():
    losses = measured(np.random.default_rng(2), noise=1e-4)
    wild = losses.copy()
    wild[7] *= 1.2
    foreseen = [
        predict_run(fit_law(SIZES, TOKENS, values, samples=2), 1e6, 5e6)[0]
        for values in (losses, wild)
    ]
    assert foreseen[1] == pytest.approx(foreseen[0], rel=2e-3)


def test_the_same_runs_give_the_same_fit():
    losses = measured(np.random.default_rng(3))
    first, second = (fit_law(SIZES, TOKENS, losses, samples=5) for _ in range(2))
    np.testing.assert_array_equal(first.law, second.law)
    np.testing.assert_array_equal(first.samples, second.samples)
    other = fit_law(SIZES, TOKENS, losses, samples=5, seed=1)
    np.testing.assert_array_equal(first.law, other.law)
    assert not np.array_equal(first.samples, other.samples)


@pytest.mark.slow
def test_prediction_intervals_hold_nine_of_ten_runs():
    held = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        fit = fit_law(SIZES, TOKENS, measured(rng), samples=40)
        _, low, high = predict_run(fit, 1e6, 4.5e6)
        held.append(low <= measured(rng, 1e6, 4.5e6) <= high)
    assert 0.8 <= np.mean(held) <= 1.0


def test_intervals_widen_with_the_noise_of_a_run_and_with_distance():
    fit = fit_law(SIZES, TOKENS, measured(np.random.default_rng(4)), samples=40)
    _, low, high = predict_run(fit, 8e5, 2e6)
    law_low, law_high = interval(predict(fit.samples, 8e5, 2e6))
    assert high - low > law_high - law_low
    _, far_low, far_high = predict_run(fit, 1e9, 1e10)
    assert (far_high - far_low) / far_low > (high - low) / low


def test_the_frontier_is_where_the_loss_is_smallest_at_equal_flops():
    budget = 9e12
    best = frontier(TRUE, budget)
    assert 6 * best.parameters * best.tokens == pytest.approx(budget)
    near = best.parameters * np.array([0.9, 1.1])
    assert (predict(TRUE, near, budget / (6 * near)) > best.loss).all()
    larger = frontier(TRUE, 10 * budget)
    assert larger.parameters / best.parameters == pytest.approx(10**best.size_exponent)
    assert larger.tokens / best.tokens == pytest.approx(10**best.token_exponent)
    ratio = (larger.loss - TRUE.E) / (best.loss - TRUE.E)
    assert ratio == pytest.approx(10**-best.loss_exponent)
    assert best.size_exponent == pytest.approx(0.35 / 0.65)


def test_parabolas_find_the_smallest_loss():
    sizes = np.array([1e5, 2e5, 4e5, 8e5])
    losses = 3.0 + 0.1 * (np.log(sizes) - math.log(3e5)) ** 2
    parabola = fit_parabola(sizes, losses)
    assert parabola.parameters == pytest.approx(3e5)
    assert parabola.loss == pytest.approx(3.0)
    assert parabola.curvature == pytest.approx(0.1)
    assert parabola.inside
    assert not fit_parabola([4e5, 8e5, 1.6e6], [3.0, 3.1, 3.3]).inside
    downwards = fit_parabola(sizes, -losses)
    assert math.isnan(downwards.parameters) and not downwards.inside


def test_power_laws_of_one_and_two_variables():
    x, z = np.array([1.0, 2.0, 4.0, 9.0, 3.0]), np.array([5.0, 1.0, 7.0, 2.0, 2.5])
    law = fit_power_law(3 * x**-0.5, x)
    assert (law.coefficient, law.exponents[0], law.r2) == pytest.approx((3, -0.5, 1))
    both = fit_power_law(3 * x**-0.5 * z**0.25, x, z)
    assert (both.coefficient, *both.exponents) == pytest.approx((3, -0.5, 0.25))
    noisy = fit_power_law([1.0, 5.0, 2.0, 4.0, 3.0], x)
    assert noisy.r2 < 0.5
    line = linregress(np.log(x), np.log([1.0, 5.0, 2.0, 4.0, 3.0]))
    assert (noisy.exponents[0], noisy.errors[0]) == pytest.approx((line.slope, line.stderr))
    assert math.isnan(fit_power_law([1.0, 2.0], [1.0, 4.0]).errors[0])


def test_few_runs_have_intervals_too():
    kept = [0, 2, 4, 10, 12, 14]
    losses = measured(np.random.default_rng(5))[kept]
    fit = fit_law(SIZES[kept], TOKENS[kept], losses, samples=20)
    loss, low, high = predict_run(fit, 8e5, 2e6)
    assert low < loss < high


def test_a_law_without_a_term_has_a_frontier():
    best = frontier(Law(1.5, 60.0, 300.0, 0.0, 0.35), 9e12)
    assert (best.size_exponent, best.token_exponent, best.loss_exponent) == (1, 0, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda N, D, L: (N[:5], D[:5], L[:5]), "5 coefficients and needs more runs .* got 5"),
        (lambda N, D, L: (0 * N + 1e6, D, L), "more than one size, got 1e\\+06 only"),
        (lambda N, D, L: (N, 0 * D + 2e6, L), "more than one number of tokens, got 2e\\+06 only"),
        (lambda N, D, L: (N, D, np.where(N == N[3], np.nan, L)), "losses must be .* got nan"),
        (lambda N, D, L: (N, D, -L), "losses must be positive"),
        (lambda N, D, L: (N, D, np.where(N == N[3], np.inf, L)), "losses must be .* got inf"),
    ],
)
def test_what_cannot_be_fitted_is_said_in_a_sentence(change, sentence):
    runs = change(SIZES, TOKENS, measured(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=sentence):
        fit_law(*runs)


def test_too_few_points_for_the_other_fits():
    with pytest.raises(ValueError, match="a parabola needs 3 sizes, got 2"):
        fit_parabola([1e5, 2e5, 2e5], [3.0, 2.9, 2.8])
    with pytest.raises(ValueError, match="3 points do not tell the 2 coefficients"):
        fit_power_law([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])
    with pytest.raises(ValueError, match="y must be positive and finite, got -1"):
        fit_power_law([1.0, -1.0], [1.0, 2.0])
