from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from training_fakes import LAPLACIAN, SCORE, make_table

from lapwing_training.errors import NotEnoughData
from lapwing_training.statistics import head_probes
from lapwing_training.statistics.head_probes import (
    cross_validated_auroc,
    fit_head_probes,
    head_probe_auroc,
    head_probe_steps,
    newton,
)
from lapwing_training.statistics.splits import Fold, grouped_folds


def heads_of_all_kinds(rows: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 6, 4): noise, weak, strong, nearly collinear, partly constant, separable; a third hallucinated."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.33).astype(int)
    values = rng.normal(size=(rows, 6, 4))
    values[:, 1, 0] += 0.3 * labels
    values[:, 2] += 1.5 * labels[:, None]
    values[:, 3] = values[:, 3, :1] + 0.01 * values[:, 3] + 0.3 * labels[:, None]
    values[:, 4, 1:] = 7.0
    values[:, 5, 0] = 10.0 * labels + 0.1 * values[:, 5, 0]
    return values * np.array([1.0, 30.0, 0.5, 2.0]) - 4.0, labels


def oracle(**settings: object) -> Pipeline:
    model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000, **settings)
    return make_pipeline(StandardScaler(), model)


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_every_head_equals_scikit_learn_one_at_a_time(strength: float) -> None:
    values, labels = heads_of_all_kinds()
    fresh, truth = heads_of_all_kinds(seed=1)
    found = fit_head_probes(values, labels, strength)
    logits = found.logits(fresh)
    for head in range(6):
        model = oracle(C=strength).fit(values[:, head], labels)
        scaler, regression = model.steps[0][1], model.steps[1][1]
        np.testing.assert_allclose(found.weights[head] * scaler.scale_, regression.coef_[0], atol=1e-6)
        expected = model.decision_function(fresh[:, head])
        np.testing.assert_allclose(logits[:, head], expected, atol=1e-5)
        assert roc_auc_score(truth, logits[:, head]) == pytest.approx(roc_auc_score(truth, expected), abs=1e-6)


def test_cross_validation_equals_scikit_learn_fold_by_fold() -> None:
    values, labels = heads_of_all_kinds()
    folds = grouped_folds(labels, np.arange(400) // 2, 5, seed=0)
    found = cross_validated_auroc(values.astype(np.float32), labels, folds)
    for head in range(6):
        column = values[:, head].astype(np.float32).astype(np.float64)
        scores = [
            roc_auc_score(
                labels[tested], oracle().fit(column[fitted], labels[fitted]).decision_function(column[tested])
            )
            for fitted, tested in folds
        ]
        assert found[head] == pytest.approx(np.mean(scores), abs=1e-6)


def test_a_table_is_worked_off_in_blocks_and_every_head_stands_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(rows=300, planted=(2, 9))
    folds = grouped_folds(table.labels, table.groups, 3, seed=0)
    values = table.stacked((SCORE, LAPLACIAN), 3).reshape(300, 16, 4)
    expected = cross_validated_auroc(values, table.labels, folds).reshape(4, 4)
    for at_once in (3, 16, 100):
        monkeypatch.setattr(head_probes, "HEADS_AT_ONCE", at_once)
        calls: list[int] = []
        found = head_probe_auroc(table, (SCORE, LAPLACIAN), 3, folds, lambda calls=calls: calls.append(1))
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert len(calls) == head_probe_steps(table)
    assert set(np.argsort(-found.ravel())[:2].tolist()) == {2, 9}


def test_a_probe_sees_what_the_mean_of_the_values_hides() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(600) < 0.5).astype(int)
    values = rng.normal(size=(600, 1, 2))
    values[:, 0, 0] += labels
    values[:, 0, 1] -= labels
    [found] = cross_validated_auroc(values, labels, grouped_folds(labels, np.arange(600), 5, seed=0))
    assert abs(roc_auc_score(labels, values[:, 0].mean(axis=1)) - 0.5) < 0.05
    assert found > 0.8  # Phi(1) = .841


def chance(leak: bool) -> float:
    """Mean AUROC of 200 heads of ten values each whose labels are dealt at random."""
    rng = np.random.default_rng(4)
    labels = rng.permutation(np.arange(200) % 2)
    folds = grouped_folds(labels, np.arange(200), 5, seed=0)
    seen: list[Fold] = [(np.concatenate(rows), rows[1]) for rows in folds]
    return float(cross_validated_auroc(rng.normal(size=(200, 200, 10)), labels, seen if leak else folds).mean())


def test_on_dealt_labels_the_heads_score_half_on_average() -> None:
    # One head has a standard error of .04, their mean .003.
    assert abs(chance(leak=False) - 0.5) < 0.012


def test_control_a_fit_that_saw_the_tested_rows_scores_more() -> None:
    assert chance(leak=True) > 0.55


def shifted_scores(leak: bool) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs before and after all rows to be tested move by the same, which no honest fit can notice."""
    values, labels = heads_of_all_kinds()
    fold = (np.arange(300), np.arange(300, 400))
    moved = values.copy()
    moved[300:] += np.array([500.0, 0.0, 0.0, 0.0])
    if leak:  # standardised over all rows
        values, moved = ((one - one.mean(axis=0)) / np.maximum(one.std(axis=0), 1e-4) for one in (values, moved))
        head_scores = [without_scaling(one, labels, fold) for one in (values, moved)]
        return head_scores[0], head_scores[1]
    return cross_validated_auroc(values, labels, [fold]), cross_validated_auroc(moved, labels, [fold])


def without_scaling(values: np.ndarray, labels: np.ndarray, fold: Fold) -> np.ndarray:
    fitted, tested = fold
    model = LogisticRegression(class_weight="balanced")
    return np.array(
        [
            roc_auc_score(labels[tested], model.fit(column[fitted], labels[fitted]).decision_function(column[tested]))
            for column in values.transpose(1, 0, 2)
        ]
    )


def test_neither_fit_nor_standardisation_knows_the_tested_rows() -> None:
    before, after = shifted_scores(leak=False)
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_control_standardising_over_the_tested_rows_shows() -> None:
    before, after = shifted_scores(leak=True)
    assert np.abs(before - after).max() > 0.01


def wild_columns() -> tuple[np.ndarray, np.ndarray]:
    """100 fits of two numbers that spread over many orders of magnitude; one row of twelve is hallucinated."""
    rng = np.random.default_rng(1)
    columns = np.exp(3.0 * rng.normal(size=(100, 3, 12))) * rng.choice([-1.0, 1.0], size=(100, 3, 12))
    columns[:, -1] = 1.0
    return columns, np.arange(12) == 0


def test_newton_settles_from_everywhere() -> None:
    columns, positive = wild_columns()
    found = newton(columns, positive, strength=1.0)
    for fit in range(100):
        model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000)
        model.fit(columns[fit, :2].T, positive)
        np.testing.assert_allclose(found[fit], [*model.coef_[0], model.intercept_[0]], atol=1e-5)


def test_control_whole_steps_alone_leave_for_good() -> None:
    columns, positive = wild_columns()
    weights, penalty, here = np.where(positive, 6.0, 12 / 22), np.diag([1.0, 1.0, 0.0]), np.zeros(3)
    for _ in range(100):
        said = expit(here @ columns[44])
        gradient = columns[44] @ (weights * (said - positive)) + penalty @ here
        hessian = (columns[44] * weights * said * (1 - said)) @ columns[44].T + penalty
        here = here - np.linalg.pinv(hessian) @ gradient
    assert np.linalg.norm(gradient) > 1.0


def test_what_does_not_settle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = heads_of_all_kinds()
    monkeypatch.setattr(head_probes, "MOST_STEPS", 2)
    with pytest.raises(ArithmeticError, match="of 6 fits is not below 1e-10 per row after 2 steps"):
        fit_head_probes(values, labels)


def test_a_number_that_hardly_varies_is_not_blown_up() -> None:
    labels = np.arange(100) % 2
    values = (0.5 + 1e-7 * labels).reshape(100, 1, 1)
    assert np.abs(np.ptp(fit_head_probes(values, labels).logits(values))) < 0.1
    assert np.ptp(fit_head_probes(values * 1e5, labels).logits(values * 1e5)) > 1.0  # control


def test_one_class_alone_can_not_be_fitted() -> None:
    with pytest.raises(NotEnoughData, match="20 hallucinated and 0 other"):
        fit_head_probes(np.zeros((20, 3, 2)), np.ones(20))
