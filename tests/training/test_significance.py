from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, make_table

from lapwing_training.errors import NotEnoughData
from lapwing_training.significance import (
    HeadSignificance,
    head_scalars,
    head_significance,
    mann_whitney,
    one_value_per_group,
    strongest_heads,
)


def scalars_with_ties() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 3, 5))
    values[:, 0] = np.round(values[:, 0] * 2)  # many ties
    labels = (rng.random(300) < 0.3).astype(int)
    values[labels == 1, 1] += 0.3
    return values, labels


def test_every_head_equals_scipy_and_scikit_learn_one_at_a_time() -> None:
    values, labels = scalars_with_ties()
    tested = head_significance(values, labels, np.arange(300))
    for layer in range(3):
        for head in range(5):
            column = values[:, layer, head]
            expected = stats.mannwhitneyu(column[labels == 1], column[labels == 0], method="asymptotic")
            assert tested.p_value[layer, head] == pytest.approx(expected.pvalue, rel=1e-12)
            assert tested.auroc[layer, head] == pytest.approx(roc_auc_score(labels, column), abs=1e-12)
            assert tested.effect_size[layer, head] == pytest.approx(2 * roc_auc_score(labels, column) - 1, abs=1e-12)


def test_q_values_are_benjamini_and_hochberg() -> None:
    values, labels = scalars_with_ties()
    tested = head_significance(values, labels, np.arange(300))
    p = np.sort(tested.p_value.ravel())
    stepped = np.minimum.accumulate((p * 15 / np.arange(1, 16))[::-1])[::-1]
    np.testing.assert_allclose(np.sort(tested.q_value.ravel()), stepped, rtol=1e-12)
    assert (tested.q_value >= tested.p_value).all()


def test_a_constant_head_says_nothing() -> None:
    values = np.zeros((20, 1, 2))
    values[:, 0, 1] = np.arange(20)
    labels = (np.arange(20) >= 10).astype(int)
    tested = head_significance(values, labels, np.arange(20))
    assert tested.p_value[0, 0] == 1.0
    assert tested.auroc[0].tolist() == [0.5, 1.0]


def test_one_class_alone_can_not_be_tested() -> None:
    with pytest.raises(NotEnoughData, match="20 hallucinated and 0 other"):
        mann_whitney(np.zeros((20, 3)), np.ones(20))


def test_groups_and_classes_give_one_mean_each() -> None:
    values = np.array([[1.0], [3.0], [10.0], [5.0]])
    means, labels = one_value_per_group(values, np.array([1, 1, 0, 0]), np.array(["b", "b", "b", "a"]))
    assert means.tolist() == [[5.0], [10.0], [2.0]]
    assert labels.tolist() == [0, 0, 1]


def false_alarms(pooled: bool) -> float:
    """Share of null heads with p < .05 where the five rows of a group resemble each other."""
    table = make_table(rows=1000, layers=20, heads=20, per_group=5, group_effect=0.5, seed=3)
    groups = np.arange(1000) if pooled else table.groups
    return head_significance(head_scalars(table.features[LAPLACIAN]), table.labels, groups).share_p


def test_repeated_groups_do_not_raise_the_false_alarm_rate() -> None:
    # 400 null heads at 5 %: one standard error is 1.1 %.
    assert 0.02 <= false_alarms(pooled=False) <= 0.085


def test_control_rows_counted_as_independent_raise_it() -> None:
    assert false_alarms(pooled=True) > 0.15


def direct_delong(values: np.ndarray, labels: np.ndarray) -> float:
    """From all pairs, as in the paper's definition."""
    high, low = values[labels == 1], values[labels == 0]
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)  # (n1, n0)
    return float(np.sqrt(wins.mean(axis=1).var(ddof=1) / len(high) + wins.mean(axis=0).var(ddof=1) / len(low)))


def test_the_interval_is_delongs_for_every_head() -> None:
    values, labels = scalars_with_ties()
    tested = head_significance(values, labels, np.arange(300), errors=True)
    low, high = tested.auroc_interval
    for layer in range(3):
        for head in range(5):
            error = direct_delong(values[:, layer, head], labels)
            auroc = tested.auroc[layer, head]
            assert low[layer, head] == pytest.approx(auroc - 1.96 * error, abs=1e-5)
            assert high[layer, head] == pytest.approx(auroc + 1.96 * error, abs=1e-5)


def coverage(grouped: bool, mixed: bool) -> float:
    """How often the interval holds the true .5 of a null head, when the four rows of a group are alike."""
    table = make_table(rows=400, layers=20, heads=20, per_group=4, group_effect=0.7, seed=4)
    labels = np.random.default_rng(0).permutation(table.labels) if mixed else table.labels
    groups = table.groups if grouped else np.arange(400)
    tested = head_significance(head_scalars(table.features[LAPLACIAN]), labels, groups, errors=True)
    low, high = tested.auroc_interval
    return float(((low <= 0.5) & (high >= 0.5)).mean())


def test_an_interval_that_was_not_asked_for_is_not_made_up() -> None:
    values, labels = scalars_with_ties()
    with pytest.raises(ValueError, match="errors=True"):
        head_significance(values, labels, np.arange(300)).auroc_interval  # noqa: B018


@pytest.mark.parametrize("mixed", [False, True])
def test_the_interval_covers_when_groups_repeat(mixed: bool) -> None:
    # 400 heads at 95 %: one standard error is 1.1 %.
    assert 0.91 <= coverage(grouped=True, mixed=mixed) <= 0.985


def test_control_rows_counted_as_independent_cover_too_little() -> None:
    assert coverage(grouped=False, mixed=False) < 0.8


def test_the_head_scalar_is_the_mean_of_the_top_k() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(head_scalars(values), values.mean(axis=-1))


def test_the_strongest_heads_are_named_as_the_model_names_its_layers() -> None:
    auroc = np.array([[0.5, 0.7], [0.2, 0.55]])
    tested = HeadSignificance(np.zeros((2, 2)), np.zeros((2, 2)), auroc, np.full((2, 2), 0.01))
    first, second = strongest_heads(tested, layers=(3, 7), count=2)
    assert (first["layer"], first["head"], first["value"]) == (7, 0, 0.2)
    assert (second["layer"], second["head"]) == (3, 1)
    assert second["low"] == pytest.approx(0.7 - 1.96 * 0.01, abs=1e-4)
