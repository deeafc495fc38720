"""What a recipe chooses by: the first Newton step, which ranks as the fit does, and the simplest that is as good."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, make_table

from lapwing_training.recipes.linear_probe import standardiser
from lapwing_training.recipes.recipe import simplest
from lapwing_training.statistics.newton import STRENGTHS, first_newton_steps


def test_the_first_newton_step_ranks_like_the_full_fit() -> None:
    table = make_table(rows=1200, planted=(2, 9, 11), strength=0.5)
    columns = table.features[LAPLACIAN].reshape(1200, -1).astype(np.float64)
    mean, scale = standardiser(columns[:800])
    standard = (columns - mean) / scale
    [logits] = first_newton_steps(standard[:800], table.labels[:800], standard[800:], [columns.shape[1]])
    for strength, logit in zip(STRENGTHS, logits, strict=True):
        full = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        expected = full.fit(standard[:800], table.labels[:800]).decision_function(standard[800:])
        step, fit = (roc_auc_score(table.labels[800:], values) for values in (logit, expected))
        # The choice is made to one standard error of an AUROC, .03 here; the step may miss a sixth of it.
        assert step == pytest.approx(fit, abs=0.005)


def test_newton_steps_of_fewer_columns_are_steps_of_their_own() -> None:
    rng = np.random.default_rng(0)
    columns, labels = rng.normal(size=(100, 6)), (rng.random(100) < 0.5).astype(int)
    nested = first_newton_steps(columns, labels, columns, [2, 6])[0]
    alone = first_newton_steps(columns[:, :2], labels, columns[:, :2], [2])[0]
    np.testing.assert_allclose(nested, alone, atol=1e-12)


def test_with_more_columns_than_rows_the_step_is_the_same() -> None:
    rng = np.random.default_rng(0)
    columns, labels = rng.normal(size=(40, 90)), (rng.random(40) < 0.3).astype(int)
    [_, found] = first_newton_steps(columns, labels, columns[:7], [3, 90])
    weight = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    centred = columns - weight @ columns / weight.sum()
    for strength, logit in zip(STRENGTHS, found, strict=True):
        hessian = (centred.T * 0.25 * weight) @ centred + np.eye(90) / strength
        expected = centred[:7] @ np.linalg.solve(hessian, centred.T @ (weight * (labels - 0.5)))
        np.testing.assert_allclose(logit, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # Each fold lies elsewhere, all candidates with it: .69 is worse in every fold by .02, .709 within the error.
        ([[0.58, 0.599, 0.60], [0.68, 0.697, 0.70], [0.78, 0.803, 0.80]], 1),
        ([[0.60, 0.69, 0.70], [0.62, 0.71, 0.72]], 2),  # worse by .01 without any doubt
        ([[0.70, 0.60, 0.60], [0.70, 0.60, 0.60]], 0),
        ([[0.50, 0.50, 0.50]], 0),
        ([[0.60, 0.80, 0.70]], 1),  # one fold knows no error
    ],
)
def test_the_simplest_is_taken_that_falls_short_by_no_more_than_its_error(
    scores: list[list[float]], expected: int
) -> None:
    assert simplest(np.array(scores)) == expected
