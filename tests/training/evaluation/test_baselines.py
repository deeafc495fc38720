"""Log-probability and attention together: at least as good as each alone, which takes the right scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lapwing_training.evaluation.baselines import Combination, log_odds, raw_names, raw_scores
from lapwing_training.evaluation.scores import judging_steps
from lapwing_training.store.table import Table
from tests.training.training_fakes import make_table


def sure_and_unsure(table: Table, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Mean log-probabilities that pile up below zero with a long tail, and a weak attention logit."""
    random = np.random.default_rng(seed)
    labels, rows = table.labels, len(table.labels)
    odds = random.normal(4.0, 3.0, rows) - 2.5 * labels
    log_probabilities = -np.logaddexp(0.0, -odds) - (random.random(rows) < 0.03) * random.exponential(2.0, rows)
    return log_probabilities, random.normal(0.5 * labels, 1.0)


def test_log_odds_keep_the_order_and_are_finite_where_the_model_is_sure() -> None:
    values = np.array([-50.0, -3.0, -0.5, -1e-3, -1e-8, -1e-12, 0.0])
    odds = log_odds(values)
    assert np.isfinite(odds).all()
    assert (np.diff(odds) >= 0).all()
    p = np.exp(values[1:4])
    np.testing.assert_allclose(odds[1:4], np.log(p / (1 - p)), rtol=1e-9)


def test_attention_that_helps_adds_to_log_probability_and_a_straight_line_loses_part_of_it() -> None:
    table = make_table(rows=4000, heads=1, layers=1)
    labels, (known, attention) = table.labels, sure_and_unsure(table)
    both = Combination.fit(known, attention, table).score(known, attention)
    alone = roc_auc_score(labels, -known)
    assert roc_auc_score(labels, both) > max(alone, roc_auc_score(labels, attention))
    # Control: log-probabilities as they are, with their long tail.
    columns = np.stack([known, attention], axis=1)
    line = LogisticRegression().fit(columns, labels).decision_function(columns)
    assert roc_auc_score(labels, line) < roc_auc_score(labels, both) - 0.02


def test_a_combination_comes_back_from_json() -> None:
    table = make_table(rows=200, heads=1, layers=1)
    known, attention = sure_and_unsure(table)
    fitted = Combination.fit(known, attention, table)
    again = Combination.from_dict(fitted.to_dict())
    assert again.score(known, attention) == pytest.approx(fitted.score(known, attention))


def test_a_missing_log_probability_counts_as_the_middle_one_of_the_given_rows() -> None:
    known = np.array([-1.0, -2.0, -3.0, np.nan, -40.0, -50.0, np.nan, -60.0])
    table = replace(make_table(rows=8, heads=1, layers=1), log_probabilities=known)
    filled = raw_scores(table, np.arange(4))["log_probability"]
    np.testing.assert_array_equal(filled, [-1.0, -2.0, -3.0, -2.0, -40.0, -50.0, -2.0, -60.0])
    assert raw_scores(table)["log_probability"][3] == -21.5  # control: of all rows, the tested ones included
    assert "log_probability" not in raw_scores(table, np.array([3, 6]))


def test_the_raw_scores_are_counted_without_a_look_at_features() -> None:
    table = make_table(rows=40)
    half = replace(table, log_probabilities=np.where(np.arange(40) < 20, table.log_probabilities, np.nan))
    bare = replace(table, features={"laplacian_eigenvalues.v1": table.features["laplacian_eigenvalues.v1"]})
    for some in (table, half, bare):
        for rows in (None, np.arange(20), np.arange(20, 40)):
            assert raw_names(some, rows) == tuple(raw_scores(some, rows))

    class Unread:
        shape = (40, 4, 4, 1)

    unread = replace(table, features={"attention_score.v1": Unread()})
    assert judging_steps(unread) == 3 + 2
    with pytest.raises(TypeError):  # control
        raw_scores(unread)
