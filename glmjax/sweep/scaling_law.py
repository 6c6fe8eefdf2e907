"""Scaling laws: what many small trainings say of a larger one.

The law is L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv 2203.15556, equation 10) for the
loss L in nats after D tokens of a model of N parameters. Fitting it is their approach 3, the parabolas
of equal FLOPs are their approach 2. scipy is there wherever jax is, which needs it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import huber

HUBER = 1e-3
"""Residuals of log L beyond it count linearly (Hoffmann et al. 2022, section 3.3)."""
COEFFICIENTS = 5
LARGEST_EXPONENT = 2.0
"""Where the grid of starts of Hoffmann et al. ends (appendix D.3); exponents lie between 0 and it."""
NOISES = 25
"""Noises of a single run for each law of the bootstrap."""
REFINED = 12
"""So many of the starts with the smallest objective are followed to their minimum."""


class Law(NamedTuple):
    """L(N, D) = E + A / N^a + B / D^b; numbers, or arrays of one law for each bootstrap sample."""

    E: np.ndarray
    A: np.ndarray
    B: np.ndarray
    a: np.ndarray
    b: np.ndarray


class Fit(NamedTuple):
    """A law, how well it fits, and how far it could be another."""

    law: Law
    residuals: np.ndarray
    """log L - log of the law, for each run."""
    r2: float
    """Explained share of the variance of log L."""
    samples: Law
    """The laws of the bootstrap samples [sample]."""


class Frontier(NamedTuple):
    """The best use of C = flops_per_token_parameter N D FLOPs under a law."""

    size_exponent: np.ndarray
    """N grows as C to it, b / (a + b)."""
    token_exponent: np.ndarray
    """D grows as C to it, a / (a + b)."""
    loss_exponent: np.ndarray
    """L - E falls as C to minus it, a b / (a + b)."""
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


class Parabola(NamedTuple):
    """L = loss + curvature (log N - log parameters)^2 over the models of one budget."""

    curvature: float
    parameters: float
    """Where the loss is smallest; not a number if the parabola opens downwards."""
    loss: float
    """The smallest loss."""
    inside: bool
    """Whether the minimum lies between the smallest and the largest model."""


class PowerLaw(NamedTuple):
    """y = coefficient x1^exponents[0] x2^exponents[1] ..., by least squares of log y."""

    coefficient: float
    exponents: tuple[float, ...]
    errors: tuple[float, ...]
    """Standard errors of the exponents; not numbers where points are as many as coefficients."""
    r2: float
    """Explained share of the variance of log y."""


def predict(law: Law, parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
    """The loss in nats that a law foresees."""
    E, A, B, a, b = law
    return E + A * np.float_power(parameters, -a) + B * np.float_power(tokens, -b)


def fit_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    samples: int = 400,
    seed: int = 0,
) -> Fit:
    """Fits L(N, D) to the runs of a sweep: the same numbers at every call.

    Minimises the Huber loss of log L - log L(N, D) with L-BFGS. Starts are a grid over the exponents
    and over the parts of the typical loss that the two terms have; the best of them are followed.

    The bootstrap draws as many runs as there are, with replacement, and fits them again from the law
    of all runs. A draw of one size or one length only is drawn anew.

    Raises:
        ValueError: no more runs than coefficients, all of one size or one length, or a number that
            is not positive.
    """
    N, D, L = (np.asarray(values, float) for values in (parameters, tokens, losses))
    _check(N, D, L)
    # About the typical run, where the coefficients hardly depend on each other.
    centre = np.log(N).mean(), np.log(D).mean()
    x, y, z = np.log(N) - centre[0], np.log(D) - centre[1], np.log(L)

    best = _minimise(_starts(z.mean()), x, y, z)
    law = _law(best, *centre)
    residuals = z - np.log(predict(law, N, D))

    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(z), len(z)) for _ in itertools.count())
    usable = (i for i in draws if np.ptp(x[i]) and np.ptp(y[i]))
    drawn = [_minimise(best[None], x[i], y[i], z[i]) for i in itertools.islice(usable, samples)]
    return Fit(
        law=law,
        residuals=residuals,
        r2=_r2(z, residuals),
        samples=_law(np.stack(drawn, axis=-1), *centre),
    )


def interval(values: np.ndarray, level: float = 0.9) -> tuple[float, float]:
    """The middle part of bootstrap samples that holds a share `level` of them."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def predict_run(
    fit: Fit, parameters: float, tokens: float, level: float = 0.9, seed: int = 0
) -> tuple[float, float, float]:
    """The foreseen loss of one more run, and an interval that holds what it will measure.

    A prediction interval: quantiles over the bootstrap of the law, each sample with the noise of a
    single run on top. The noise is a residual of the fit, drawn anew, times sqrt(n / (n - 5)), since
    n residuals about a law with 5 fitted coefficients are smaller than the noise.

    Returns (loss, low, high).
    """
    runs = len(fit.residuals)
    noise = np.random.default_rng(seed).choice(fit.residuals, (NOISES, len(fit.samples.E)))
    noise *= np.sqrt(runs / (runs - COEFFICIENTS))
    losses = predict(fit.samples, parameters, tokens) * np.exp(noise)
    return float(predict(fit.law, parameters, tokens)), *interval(losses, level)


def frontier(law: Law, flops: ArrayLike, flops_per_token_parameter: float = 6.0) -> Frontier:
    """The size and length with the smallest loss among those with N D equal to the budget divided by
    `flops_per_token_parameter` (Hoffmann et al. 2022, equation 4)."""
    _, A, B, a, b = map(np.asarray, law)
    product = np.asarray(flops) / flops_per_token_parameter
    with np.errstate(divide="ignore", invalid="ignore"):  # without a or b it lies at infinity
        parameters = (a * A / (b * B)) ** (1 / (a + b)) * product ** (b / (a + b))
        tokens = product / parameters
    return Frontier(
        b / (a + b), a / (a + b), a * b / (a + b), parameters, tokens,
        predict(law, parameters, tokens),
    )  # fmt: skip


def fit_parabola(parameters: Sequence[float], losses: Sequence[float]) -> Parabola:
    """The parabola of L over log N through models that were trained with the same FLOPs.

    Raises:
        ValueError: there are fewer than 3 sizes.
    """
    if len(set(parameters)) < 3:
        raise ValueError(f"a parabola needs 3 sizes, got {len(set(parameters))}")
    log_size = np.log(parameters)
    curvature, slope, constant = np.polyfit(log_size, losses, 2)
    if curvature <= 0:
        return Parabola(float(curvature), np.nan, np.nan, False)
    lowest = -slope / (2 * curvature)
    return Parabola(
        curvature=float(curvature),
        parameters=float(np.exp(lowest)),
        loss=float(constant - curvature * lowest**2),
        inside=bool(log_size.min() < lowest < log_size.max()),
    )


def fit_power_law(y: Sequence[float], *variables: Sequence[float]) -> PowerLaw:
    """The power law of one or more variables through points, a plane of logarithms.

    Raises:
        ValueError: the points are too few or too alike, or a number is not positive.
    """
    _check_positive(y=y, **{f"x{i}": x for i, x in enumerate(variables, 1)})
    log_y = np.log(y)
    columns = np.stack([np.ones_like(log_y), *map(np.log, variables)], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(columns, log_y)
    if rank < len(coefficients):
        raise ValueError(
            f"{len(log_y)} points do not tell the {len(coefficients)} coefficients of a power law"
        )
    residuals = log_y - columns @ coefficients
    freedom = len(log_y) - rank
    variance = residuals @ residuals / freedom if freedom else np.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))
    return PowerLaw(
        coefficient=float(np.exp(coefficients[0])),
        exponents=tuple(map(float, coefficients[1:])),
        errors=tuple(map(float, errors[1:])),
        r2=_r2(log_y, residuals),
    )


def _r2(values: np.ndarray, residuals: np.ndarray) -> float:
    variance = np.sum((values - values.mean()) ** 2)
    return float(1 - np.sum(residuals**2) / variance)


def _check(N: np.ndarray, D: np.ndarray, L: np.ndarray) -> None:
    if len(L) <= COEFFICIENTS:
        raise ValueError(
            f"a scaling law has {COEFFICIENTS} coefficients and needs more runs than that, got {len(L)}"
        )
    _check_positive(parameters=N, tokens=D, losses=L)
    for name, values in (("size", N), ("number of tokens", D)):
        if len(set(values)) < 2:
            raise ValueError(
                f"a scaling law needs runs of more than one {name}, got {values[0]:g} only"
            )


def _check_positive(**values: ArrayLike) -> None:
    for name, numbers in values.items():
        for number in np.asarray(numbers, float):
            if not 0 < number < np.inf:
                raise ValueError(f"{name} must be positive and finite, got {number:g}")


# A point is (log E, log A', log B', a, b), where A' and B' are the two terms of the typical run.
_TERMS = (-12.0, 6.0)
_BOUNDS = [_TERMS] * 3 + [(0.0, LARGEST_EXPONENT)] * 2


def _starts(typical: float) -> np.ndarray:
    """Points that share the loss exp(typical) out in several ways, with several exponents."""
    shares = (0.02, 0.1, 0.3)
    exponents = (0.1, 0.25, 0.5, 1.0)
    grid = np.array(list(itertools.product(shares, shares, exponents, exponents)))
    terms = np.log(np.stack([1 - grid[:, 0] - grid[:, 1], grid[:, 0], grid[:, 1]], axis=1))
    return np.concatenate([typical + terms, grid[:, 2:]], axis=1)


def _minimise(starts: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The point with the smallest objective that is reached from any of the starts."""
    best_first = sorted(starts, key=lambda start: _objective(start, x, y, z)[0])
    ends = [
        minimize(_objective, start, (x, y, z), method="L-BFGS-B", jac=True, bounds=_BOUNDS)
        for start in best_first[:REFINED]
    ]
    return min(ends, key=lambda end: end.fun).x


def _objective(
    point: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray
) -> tuple[float, np.ndarray]:
    """Huber loss of log L in units of its linear part, and its gradient."""
    log_E, log_A, log_B, a, b = point
    terms = np.exp([np.full_like(x, log_E), log_A - a * x, log_B - b * y])
    total = terms.sum(axis=0)
    residuals = np.log(total) - z
    shares = terms / total
    slope = np.clip(residuals / HUBER, -1, 1)
    gradient = np.concatenate([shares @ slope, [-shares[1] * x @ slope, -shares[2] * y @ slope]])
    return float(huber(HUBER, residuals).sum() / HUBER), gradient


def _law(point: np.ndarray, log_size: float, log_tokens: float) -> Law:
    """The law of a point about a typical run; of points [coordinate, sample], laws."""
    log_E, log_A, log_B, a, b = point
    return Law(np.exp(log_E), np.exp(log_A + a * log_size), np.exp(log_B + b * log_tokens), a, b)
