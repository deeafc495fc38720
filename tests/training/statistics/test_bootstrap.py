from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve
from training_fakes import make_table

from lapwing_training.evaluation.sample import Sample, mean_over
from lapwing_training.statistics import metrics


def scored(rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.4).astype(int)
    scores = np.round(rng.normal(size=rows) + labels, 1)  # many ties
    weights = rng.integers(0, 4, (5, rows)).astype(np.float32)
    return scores, labels, weights


def test_weighted_metrics_equal_scikit_learn() -> None:
    scores, labels, weights = scored()
    found = metrics.discrimination(scores, labels, weights)
    for row, weight in enumerate(weights):
        assert found[0, row] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight), abs=1e-12)
        assert found[1, row] == pytest.approx(average_precision_score(labels, scores, sample_weight=weight), abs=1e-12)
        false, true, _ = roc_curve(labels, scores, sample_weight=weight, drop_intermediate=False)
        for place, rate in enumerate((0.01, 0.05, 0.10), 2):
            assert found[place, row] == pytest.approx(true[false <= rate].max(), abs=1e-12)


def test_brier_and_calibration_error_equal_plain_sums() -> None:
    rng = np.random.default_rng(1)
    said, labels = rng.random(200), (rng.random(200) < 0.5).astype(int)
    weights = rng.integers(0, 4, (3, 200)).astype(np.float32)
    brier, error = metrics.calibration(said, labels, weights)
    for row, weight in enumerate(weights):
        assert brier[row] == pytest.approx(brier_score_loss(labels, said, sample_weight=weight))
        expected = 0.0
        for low in np.arange(0.0, 1.0, 0.1):
            inside = (said >= low) & (said < low + 0.1)
            expected += abs(np.sum(weight[inside] * (said[inside] - labels[inside])))
        assert error[row] == pytest.approx(expected / weight.sum(), abs=1e-6)


def test_a_probability_of_one_falls_in_the_last_bin() -> None:
    [only] = metrics.reliability(np.array([1.0, 0.95]), np.array([1, 0]))
    assert only == {"rows": 2, "said": 0.975, "true": 0.5}


def test_one_class_alone_has_no_auroc() -> None:
    found = metrics.discrimination(np.arange(5.0), np.ones(5), np.ones((1, 5)))
    assert np.isnan(found[0, 0])
    assert np.isnan(found[2:, 0]).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels, weights = scored()
    whole = metrics.discrimination(scores, labels, weights)
    monkeypatch.setattr(metrics, "BLOCK", 600)
    np.testing.assert_array_equal(metrics.discrimination(scores, labels, weights), whole)


def test_resamples_draw_whole_groups() -> None:
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    weights = metrics.bootstrap_weights(groups, 50, seed=0)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[1:, [0, 2, 3]].sum(axis=1) == 3).all()


def coverage(grouped: bool) -> float:
    """How often the interval covers the true AUROC when the four rows of a group are copies of one."""
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        labels = (rng.random(60) < 0.5).astype(int)
        scores = rng.normal(size=60) + labels  # true AUROC: Phi(1 / sqrt 2) = .760
        rows = np.repeat(np.arange(60), 4)
        groups = rows if grouped else np.arange(240)
        weights = metrics.bootstrap_weights(groups, 200, seed)
        found = metrics.estimate(metrics.auroc(scores[rows], labels[rows], weights))
        covered.append(found["low"] <= 0.7602 <= found["high"])
    return float(np.mean(covered))


def test_group_intervals_cover() -> None:
    # 150 repeats: a standard error of 1.8 % around 95 %.
    assert coverage(grouped=True) > 0.88


def test_control_row_intervals_are_too_narrow() -> None:
    assert coverage(grouped=False) < 0.75


def test_a_score_that_only_knows_the_stratum_shows_half_within() -> None:
    table = make_table(rows=900)
    rng = np.random.default_rng(0)
    rates = {"r0": 0.2, "r1": 0.5, "r2": 0.8}
    labels = (rng.random(900) < [rates[name] for name in table.strata]).astype(np.int8)
    sample = Sample.of(table.with_labels(labels), resamples=200)
    judged = sample.judge(np.array([rates[name] for name in table.strata]))
    assert judged["auroc"]["value"] > 0.7
    assert judged["within"]["mean"]["value"] == 0.5
    assert sorted(judged["within"]["strata"]) == ["r0", "r1", "r2"]


def test_a_stratum_with_too_few_of_a_class_is_named_but_not_judged() -> None:
    table = make_table(rows=90)
    strata = np.where(np.arange(90) < 80, "many", "few")
    sample = Sample(table.labels, table.groups, strata, metrics.bootstrap_weights(table.groups, 20, 0))
    assert set(sample.judged_strata()) == {"many"}
    assert sample.about_strata()["few"]["judged"] is False


def test_the_mean_over_strata_passes_over_a_stratum_that_lost_a_class() -> None:
    found = mean_over({"a": np.array([0.6, np.nan]), "b": np.array([0.8, 0.7])})
    np.testing.assert_allclose(found, [0.7, 0.7])


def test_averages_over_draws_are_means_of_the_metrics() -> None:
    scores, labels, weights = scored()
    sample = Sample(labels.astype(np.int8), np.arange(300), np.full(300, ""), weights)
    twice = sample.judge(np.stack([scores, -scores]))
    assert twice["auroc"]["value"] == pytest.approx(0.5)
    assert "within" not in twice


def graded(rows: int = 200, per_group: int = 1, seed: int = 0) -> tuple[Sample, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = np.arange(rows) // per_group
    weights = metrics.bootstrap_weights(groups, 400, seed)
    labels = (rng.random(rows) < 0.5).astype(np.int8)
    return Sample(labels, groups.astype(str), np.full(rows, "", dtype=np.str_), weights), rng.random(rows)


def test_a_share_is_that_of_the_weights() -> None:
    flagged, weights = np.array([True, False, True]), np.array([[1, 1, 1], [2, 0, 0], [0, 3, 1], [0, 0, 0]])
    found = metrics.share(flagged, weights)
    np.testing.assert_allclose(found, [2 / 3, 1.0, 0.25, np.nan])


def test_a_rate_has_the_interval_of_its_groups() -> None:
    sample, values = graded(rows=400, per_group=4)
    by_group = np.repeat(values[::4], 4) < 0.3  # whole groups are flagged
    found = sample.rate(by_group)
    assert found["value"] == by_group.mean()
    # A binomial of 100 groups, and not of 400 rows.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 100), rel=0.2)
    rows = np.arange(400)
    narrow = replace(sample, groups=rows.astype(str), weights=metrics.bootstrap_weights(rows, 400, 0)).rate(by_group)
    assert narrow["high"] - narrow["low"] < 0.6 * (found["high"] - found["low"])  # control


def test_a_large_group_counts_once_where_groups_count() -> None:
    groups = np.array(["a"] * 8 + ["b", "c"])
    sample = Sample(np.zeros(10, np.int8), groups, np.full(10, ""), metrics.bootstrap_weights(groups, 10, 0))
    flagged = groups == "a"
    assert sample.rate(flagged)["value"] == pytest.approx(0.8)
    assert sample.rate(flagged, each_group_once=True)["value"] == pytest.approx(1 / 3)


def test_nothing_flagged_is_no_proof_of_a_rate_of_zero() -> None:
    sample, _ = graded(rows=60)
    found = sample.rate(np.zeros(60, dtype=bool))
    exact = binomtest(0, 60).proportion_ci(method="exact")
    assert (found["value"], found["low"]) == (0.0, 0.0)
    assert found["high"] == pytest.approx(exact.high)


def test_some_rows_keep_their_resamples() -> None:
    sample, values = graded(rows=80, per_group=2)
    rows = np.arange(0, 80, 3)
    some = sample.take(rows)
    np.testing.assert_array_equal(some.weights, sample.weights[:, rows])
    assert some.auroc(values[rows])[0] == pytest.approx(roc_auc_score(sample.labels[rows], values[rows]))


def test_a_difference_is_taken_resample_by_resample() -> None:
    sample, values = graded(rows=300)
    first = values + 0.5 * sample.labels
    found = sample.difference(first, values)["difference"]
    expected = sample.auroc(first) - sample.auroc(values)
    assert found["value"] == pytest.approx(expected[0])
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(expected[1:], [0.025, 0.975]).tolist())
    assert "difference_within" not in sample.difference(first, values)  # no strata
    assert sample.difference(values, values)["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
