"""What is promised of the significant heads: of all that are called, at most the nominal share says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lapwing_training.statistics.selection import rank_heads
from lapwing_training.statistics.significance import head_significance

SIMULATIONS = 200
HEADS = 64
PLANTED = np.array([3, 30, 61])
LEVEL = 0.05


def simulated(seed: int, per_group: int = 1, correlation: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """200 groups with one label each, 64 heads of which three carry signal: scalars, labels, groups.

    The rows of a group share half of a head's noise, and all heads of a row share `correlation` of it.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(200), per_group)
    labels = (rng.random(200) < 0.4).astype(int)[groups]
    shared = rng.normal(size=(200, HEADS))[groups]
    noise = np.sqrt(0.5) * (shared + rng.normal(size=(len(groups), HEADS)))
    noise = np.sqrt(1 - correlation) * noise + np.sqrt(correlation) * rng.normal(size=200)[groups, None]
    noise[:, PLANTED] += labels[:, None]
    return noise, labels, groups


def false_discoveries(called: np.ndarray) -> tuple[float, float, float]:
    """Realised false discovery rate of (simulations, heads), its standard error, and the share of planted heads."""
    null = np.setdiff1d(np.arange(HEADS), PLANTED)
    shares = called[:, null].sum(axis=1) / np.maximum(called.sum(axis=1), 1)
    return float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares))), float(called[:, PLANTED].mean())


def q_values(per_group: int = 1, correlation: float = 0.0, pooled: bool = False) -> np.ndarray:
    """(simulations, heads)"""
    found = []
    for seed in range(SIMULATIONS):
        scalars, labels, groups = simulated(seed, per_group, correlation)
        counted = np.arange(len(labels)) if pooled else groups
        found.append(head_significance(scalars, labels, counted).q_value)
    return np.array(found)


@pytest.mark.parametrize(("per_group", "correlation"), [(1, 0.0), (1, 0.5), (4, 0.0)])
def test_the_planted_are_found_and_no_others_at_the_promised_rate(per_group: int, correlation: float) -> None:
    rate, error, power = false_discoveries(q_values(per_group, correlation) < LEVEL)
    assert power > 0.99
    assert rate <= LEVEL + 2 * error
    assert error < 0.015  # so that the promise could be broken visibly


def test_control_without_the_correction_half_of_the_discoveries_are_false() -> None:
    called = []
    for seed in range(SIMULATIONS):
        called.append(head_significance(*simulated(seed)).p_value < LEVEL)
    rate, error, _ = false_discoveries(np.array(called))
    assert rate > LEVEL + 20 * error  # three planted, and 5 % of 61


def test_control_rows_of_a_group_that_count_as_independent_break_the_promise() -> None:
    rate, error, _ = false_discoveries(q_values(per_group=4, pooled=True) < LEVEL)
    assert rate > LEVEL + 20 * error


def test_the_heads_that_may_be_selected_are_the_discoveries() -> None:
    called = np.zeros((SIMULATIONS, HEADS), dtype=bool)
    ungated = np.zeros_like(called)
    for seed in range(SIMULATIONS):
        scalars, labels, groups = simulated(seed)
        of_one = scalars.reshape(len(labels), 1, 8, 8)
        called[seed, rank_heads(of_one, labels, groups).heads] = True
        ungated[seed, rank_heads(of_one, labels, groups, "top-m").heads] = True
    rate, error, power = false_discoveries(called)
    assert power > 0.99
    assert rate <= LEVEL + 2 * error
    assert false_discoveries(ungated)[0] > 0.9  # control: every head is a candidate


def test_two_features_are_no_two_chances() -> None:
    called = np.zeros((SIMULATIONS, HEADS), dtype=bool)
    either = np.zeros_like(called)
    for seed in range(SIMULATIONS):
        scalars, labels, groups = simulated(seed)
        second = np.random.default_rng([seed, 1]).normal(size=scalars.shape)
        second[:, PLANTED] += labels[:, None]
        both = np.stack([scalars, second], axis=1)  # (rows, features, heads), independent of each other
        called[seed, rank_heads(both.reshape(len(labels), 2, 8, 8), labels, groups).heads] = True
        q_values = [head_significance(values, labels, groups).q_value for values in (scalars, second)]
        either[seed] = np.min(q_values, axis=0) < LEVEL
    rate, error, power = false_discoveries(called)
    assert power > 0.99
    assert rate <= LEVEL + 2 * error
    rate, error, _ = false_discoveries(either)
    assert rate > LEVEL + 2 * error  # control: significant in either feature
