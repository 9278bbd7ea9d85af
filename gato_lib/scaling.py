"""Scaling laws: how loss falls with parameters and tokens, fitted and extrapolated (paper 5.1).

The form and the robust fit are those of Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556),
their third approach:

    loss(N, D) = floor + a N^-alpha + b D^-beta

for N parameters and D tokens. What is minimised is the Huber loss of the logarithm's error, so that
one bad training bends no curve. With one number of tokens alone b is 0, and with one size a.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

HUBER = 1e-2  # of log loss: larger errors count linearly
# Where fits begin; the best one counts. Shares of the least loss, and exponents.
FLOORS, TERM, EXPONENTS = (0.3, 0.9), 0.3, (0.2, 0.5, 1.0)
LARGEST = 3.0  # exponent


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law. Where a variable never changed, its factor is 0 and its exponent NaN."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Loss of networks of so many parameters after so many tokens."""
        loss = np.full(np.broadcast_shapes(np.shape(parameters), np.shape(tokens)), self.floor)
        if self.a:
            loss = loss + self.a * np.asarray(parameters, float) ** -self.alpha
        if self.b:
            loss = loss + self.b * np.asarray(tokens, float) ** -self.beta
        return loss

    def best_size(self, product: np.ndarray | float) -> np.ndarray:
        """Parameters of the least loss where parameters times tokens are given.

        Raises ValueError for a law that does not hold both.
        """
        if not (self.a and self.b):
            raise ValueError("the law has one variable, there is nothing to divide")
        ratio = (self.alpha * self.a) / (self.beta * self.b)
        power = 1.0 / (self.alpha + self.beta)
        return ratio**power * np.asarray(product, float) ** (self.beta * power)


def fit(
    parameters: Sequence[float],
    tokens: Sequence[float],
    loss: Sequence[float],
    near: Law | None = None,
) -> Law:
    """The law of least Huber loss, for trainings of so many parameters and tokens.

    The search begins at several places, of which `near`, a law of as many variables, is one. Raises
    ValueError where a value is not positive, and where there are no more trainings than the law has
    constants: such a fit says nothing.
    """
    n, d, y = (np.asarray(x, float) for x in (parameters, tokens, loss))
    for name, values in (("parameters", n), ("tokens", d), ("loss", y)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name}: {values.tolist()}, expected positive numbers")
    known = (("a", "alpha", n), ("b", "beta", d))
    varied = [term for term in known if len(np.unique(term[2])) > 1]
    if not varied or len(y) <= 1 + 2 * len(varied):
        raise ValueError(
            f"{len(y)} trainings with {len(varied)} varied of parameters and tokens: too few to fit"
        )
    # In units of the geometric means factors hardly depend on exponents.
    middles = [np.exp(np.log(x).mean()) for *_, x in varied]
    logs = [np.log(x / m) for (*_, x), m in zip(varied, middles, strict=True)]

    def errors(theta: np.ndarray) -> np.ndarray:
        """Of log loss; theta is log floor, then a log factor and an exponent for each variable."""
        terms = [np.full(len(y), theta[0])]
        terms += [theta[1 + 2 * i] - theta[2 + 2 * i] * x for i, x in enumerate(logs)]
        return logsumexp(terms, axis=0) - np.log(y)

    exponents = EXPONENTS if near is None else EXPONENTS[1:2]
    starts = [
        [np.log(floor * y.min()), *[np.log(TERM * y.min()), exponent] * len(logs)]
        for floor, exponent in itertools.product(FLOORS, exponents)
    ]
    if near is not None:  # but from a floor of next to nothing no search ever rises again
        start = [np.log(max(near.floor, FLOORS[0] * y.min()))]
        for (factor, exponent, _), m in zip(varied, middles, strict=True):
            power = getattr(near, exponent)
            start += [np.log(getattr(near, factor)) - power * np.log(m), power]
        starts.append(start)
    low = [-np.inf, *[-np.inf, 0.0] * len(logs)]
    high = [np.inf, *[np.inf, LARGEST] * len(logs)]
    found = [
        least_squares(
            errors, np.clip(start, low, high), bounds=(low, high), loss="huber", f_scale=HUBER
        )
        for start in starts
    ]
    best = min(found, key=lambda f: f.cost).x
    constants = {"a": 0.0, "alpha": np.nan, "b": 0.0, "beta": np.nan}
    for i, ((factor, exponent, _), m) in enumerate(zip(varied, middles, strict=True)):
        constants[exponent] = float(best[2 + 2 * i])
        constants[factor] = float(np.exp(best[1 + 2 * i]) * m ** best[2 + 2 * i])
    return Law(float(np.exp(best[0])), **constants)


def widened_errors(
    law: Law, parameters: Sequence[float], tokens: Sequence[float], loss: Sequence[float]
) -> np.ndarray:
    """Errors of the logarithm of the loss around a fitted law, float64 (trainings,).

    Centred, and widened for the constants that were fitted: what another training would add.
    """
    smooth = law(np.asarray(parameters, float), np.asarray(tokens, float))
    errors = np.log(np.asarray(loss, float) / smooth)
    constants = 1 + 2 * (bool(law.a) + bool(law.b))
    return (errors - errors.mean()) * np.sqrt(len(errors) / (len(errors) - constants))


def resampled(
    parameters: Sequence[float],
    tokens: Sequence[float],
    loss: Sequence[float],
    resamples: int,
    seed: int = 0,
) -> list[Law]:
    """Laws of what the trainings might have been: a residual bootstrap of `fit`.

    The errors of the logarithm (`widened_errors`) are dealt anew to the trainings. Quantiles over
    the laws are intervals, of constants and of predictions alike; with a few trainings for each
    constant they are somewhat too narrow.
    """
    law, rng = fit(parameters, tokens, loss), np.random.default_rng(seed)
    smooth = law(np.asarray(parameters, float), np.asarray(tokens, float))
    errors = widened_errors(law, parameters, tokens, loss)
    draws = rng.choice(errors, (resamples, len(errors)))
    return [fit(parameters, tokens, smooth * np.exp(draw), near=law) for draw in draws]
