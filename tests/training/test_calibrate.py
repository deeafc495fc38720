from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from lapwing_training.calibrate import flagged_share, operating_points, platt


def test_platt_equals_maximum_likelihood() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(3.0, 5.0, 2000)
    labels = (rng.random(2000) < expit(0.4 * logits - 1.0)).astype(int)

    def loss(at: np.ndarray) -> float:
        z = at[0] * logits + at[1]
        return float(np.sum(np.logaddexp(0, z) - labels * z))

    expected = minimize(loss, [1.0, 0.0], method="BFGS").x
    # lbfgs stops at a gradient of 1e-4 of the mean loss.
    np.testing.assert_allclose(platt(logits, labels), expected, atol=2e-3)


def test_logits_without_signal_give_the_base_rate_and_never_a_falling_curve() -> None:
    logits = np.linspace(-1, 1, 1000)
    labels = (logits < -0.2).astype(int)
    slope, intercept = platt(logits, labels)
    assert slope == 0.0
    assert expit(intercept) == pytest.approx(labels.mean())


def test_the_threshold_is_the_stated_order_statistic() -> None:
    [point] = operating_points(np.random.default_rng(0).permutation(np.arange(1.0, 20.0)), [0.05])
    assert point.logit == 19.0  # ceil(20 * .95) = 19th of 19
    [point] = operating_points(np.arange(1.0, 100.0), [0.1])
    assert point.logit == 90.0  # ceil(100 * .9)


def test_too_few_negatives_store_no_number_but_a_reason() -> None:
    one, five, ten = operating_points(np.arange(18.0))
    assert one.logit is None
    assert "needs at least 99" in str(one.reason)
    assert five.logit is None
    assert "needs at least 19" in str(five.reason)
    assert ten.logit is not None
    assert operating_points(np.arange(99.0), [0.01])[0].logit == 98.0
    assert operating_points(np.arange(0.0))[0].logit is None


def realised(rate: float, negatives: int, plain_quantile: bool) -> float:
    """Mean false-alarm rate over many draws; exact for uniform logits, where P(flag) = 1 - threshold."""
    rng = np.random.default_rng(0)
    draws = rng.random((20_000, negatives))
    if plain_quantile:
        return float(np.mean(1.0 - np.quantile(draws, 1.0 - rate, axis=1)))
    return float(np.mean([1.0 - operating_points(draw, [rate])[0].logit for draw in draws[:5000]]))


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_the_promised_rate_is_kept_in_simulation(rate: float) -> None:
    # 5,000 draws of a threshold whose standard deviation is about sqrt(rate / 30).
    margin = 4 * np.sqrt(rate / 30 / 5000)
    assert realised(rate, 30, plain_quantile=False) <= rate + margin


def test_control_a_plain_quantile_breaks_the_promise() -> None:
    assert realised(0.05, 30, plain_quantile=True) > 0.07


def test_flagging_is_strict() -> None:
    assert flagged_share(np.array([1.0, 2.0, 2.0, 3.0]), 2.0) == 0.25
    assert np.isnan(flagged_share(np.array([]), 0.0))
