"""Fits of scaling laws: planted constants are found, and intervals hold them."""

from __future__ import annotations

import numpy as np
import pytest

from gato_lib.scaling import Law, fit, resampled

PLANTED = Law(floor=1.4, a=30.0, alpha=0.4, b=900.0, beta=0.5)
SIZES, BUDGETS = np.array([2e4, 1e5, 3e5, 7e5, 2e6]), np.array([8e5, 1.7e6, 3.5e6, 7e6])
N, D = (x.ravel() for x in np.meshgrid(SIZES, BUDGETS))


def test_planted_constants_are_found():
    found = fit(N, D, PLANTED(N, D))
    assert found.floor == pytest.approx(PLANTED.floor, rel=0.01)
    assert (found.alpha, found.beta) == pytest.approx((PLANTED.alpha, PLANTED.beta), rel=0.02)
    assert found(2e7, 1e8) == pytest.approx(PLANTED(2e7, 1e8), rel=0.005)


@pytest.mark.parametrize("alone", ["parameters", "tokens"])
def test_a_variable_that_never_changes_has_no_part(alone):
    fixed = np.full(5, 7e6)
    n, d = (SIZES, fixed) if alone == "parameters" else (fixed, np.geomspace(1e5, 1e7, 5))
    law = fit(n, d, PLANTED(n, d))
    if alone == "parameters":
        assert law.alpha == pytest.approx(PLANTED.alpha, rel=0.02)
        assert law.b == 0.0 and np.isnan(law.beta)
        assert law.floor == pytest.approx(PLANTED.floor + PLANTED.b * 7e6**-0.5, rel=0.01)
    else:
        assert law.beta == pytest.approx(PLANTED.beta, rel=0.02)
        assert law.a == 0.0 and np.isnan(law.alpha)
    with pytest.raises(ValueError, match="one variable"):
        law.best_size(1e12)


def test_one_bad_training_bends_nothing():
    loss = PLANTED(N, D)
    loss[7] *= 1.5
    found = fit(N, D, loss)
    others = np.arange(len(N)) != 7
    assert np.abs(found(N, D) / PLANTED(N, D) - 1)[others].max() < 0.01
    assert found.alpha == pytest.approx(PLANTED.alpha, rel=0.1)


@pytest.mark.slow
def test_intervals_mostly_hold_what_was_planted_and_widen_with_noise():
    rng, widths, held = np.random.default_rng(1), [], 0
    for noise in [0.003] * 4 + [0.03] * 4:
        loss = PLANTED(N, D) * np.exp(noise * rng.normal(size=len(N)))
        laws = resampled(N, D, loss, 40)
        low, high = np.quantile([law(4e6, 7e6) for law in laws], [0.025, 0.975])
        held += low < PLANTED(4e6, 7e6) < high
        widths.append(high - low)
    assert held >= 6
    assert np.mean(widths[4:]) > 3 * np.mean(widths[:4])


def test_a_law_without_a_floor_does_not_keep_others_from_one():
    flat = Law(floor=1e-30, a=3.0, alpha=0.02, b=3.0, beta=0.02)
    assert fit(N, D, PLANTED(N, D), near=flat).floor == pytest.approx(PLANTED.floor, rel=0.01)


def test_the_best_size_is_where_the_loss_is_least():
    product = 1e12
    sizes = np.geomspace(1e3, 1e8, 20_001)
    least = sizes[PLANTED(sizes, product / sizes).argmin()]
    assert PLANTED.best_size(product) == pytest.approx(least, rel=1e-3)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="5 trainings with 2 varied"):
        fit(N[:5] + [0, 0, 1, 1, 2], N[:5] + np.arange(5), N[:5])
    with pytest.raises(ValueError, match="0 varied"):
        fit([1e5] * 6, [1e6] * 6, [2.0] * 6)
    with pytest.raises(ValueError, match="loss: .*expected positive"):
        fit(N, D, np.where(N > 1e6, np.nan, 2.0))
