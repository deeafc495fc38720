from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss

from lapwing_training.errors import InvalidOption
from lapwing_training.evaluation.calibrate import (
    choose_kind,
    fit_calibration,
    guaranteed_points,
    isotonic,
    one_per_group,
    operating_points,
    platt,
)


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
    knots = isotonic(logits, labels)
    assert {round(value, 6) for _, value in knots} == {round(labels.mean(), 6)}


def drawn(rows: int, crooked: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and groups of three; crooked: the probability is two plateaus, as no sigmoid is."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=rows)
    probabilities = np.where(logits > 1.0, 0.9, np.where(logits > -1.0, 0.35, 0.3)) if crooked else expit(1.2 * logits)
    return logits, (rng.random(rows) < probabilities).astype(int), np.arange(rows) // 3


def test_isotonic_is_taken_by_rule_where_no_sigmoid_fits() -> None:
    logits, labels, groups = drawn(3000, crooked=True)
    kind, reason = choose_kind(logits, labels, groups)
    assert kind == "isotonic"
    assert "standard error" in reason
    calibration = fit_calibration(logits, labels, groups)
    assert calibration.knots
    fresh_logits, fresh_labels, _ = drawn(3000, crooked=True, seed=1)
    losses = {
        kind: log_loss(fresh_labels, fit_calibration(logits, labels, groups, kind).probabilities(fresh_logits))
        for kind in ("platt", "isotonic")
    }
    assert losses["isotonic"] < losses["platt"] - 0.01
    # Controls: where a sigmoid is the truth, and with too few rows, it stays Platt's.
    assert choose_kind(*drawn(3000, crooked=False))[0] == "platt"
    few = drawn(900, crooked=True)
    assert choose_kind(*few)[1].startswith("900 rows, ")
    assert fit_calibration(*few).knots == ()
    rare = (logits, (np.arange(3000) < 150).astype(int), groups)
    assert choose_kind(*rare)[1].startswith("3000 rows, 150 of the rarer class")


def test_knots_say_what_isotonic_regression_says_but_never_0_or_1() -> None:
    logits, labels, groups = drawn(1200, crooked=True)
    labels[logits > 2.0], labels[logits < -2.0] = 1, 0
    calibration = fit_calibration(logits, labels, groups, "isotonic")
    at = np.linspace(-5, 5, 301)
    oracle = IsotonicRegression(out_of_bounds="clip").fit(logits, labels)
    assert oracle.predict([5.0]) == 1.0
    # Between a step and the outermost one the line leads to what is left of 1: not the same by less than 1 / 1202.
    expected = np.clip(oracle.predict(at), 1 / 1202, 1201 / 1202)
    np.testing.assert_allclose(calibration.probabilities(at), expected, atol=1 / 1202)
    assert (np.diff(calibration.probabilities(at)) >= 0).all()
    assert (calibration.slope, calibration.intercept) == platt(logits, labels)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidOption, match="`beta`; known are auto, platt, isotonic"):
        fit_calibration(*drawn(100, crooked=False), kind="beta")


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


def test_a_guarantee_counts_every_group_once() -> None:
    groups = np.repeat([f"g{number}" for number in range(30)], 10)
    labels = np.tile([1, 0], 150)
    logits = np.random.default_rng(0).normal(size=300)
    [point] = guaranteed_points(logits, labels, groups, [0.1], seed=0)
    assert point.negatives == 30
    assert point.logit in logits[labels == 0]
    values = one_per_group(logits, groups, seed=0)
    assert [
        value in logits[groups == f"g{number}"]
        for value, number in zip(values, sorted(range(30), key=str), strict=True)
    ]
    assert (values != one_per_group(logits, groups, seed=1)).any()
    # A group of positives only has no false alarm to give.
    [point] = guaranteed_points(logits, np.where(groups == "g3", 1, labels), groups, [0.1], seed=0)
    assert point.negatives == 29


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
