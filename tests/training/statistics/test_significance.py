from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, make_table

from lapwing_training.errors import NotEnoughData
from lapwing_training.statistics import ranks
from lapwing_training.statistics.ranks import Ranked, group_codes, one_value_per_group
from lapwing_training.statistics.significance import HeadSignificance, head_scalars, head_significance, strongest_heads


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


@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_ranks_hold_for_few_of_a_class_and_for_any_ties(decimals: int, share: float) -> None:
    rng = np.random.default_rng(7)
    values = np.round(rng.standard_t(2, size=(150, 40)), decimals)
    labels = (np.arange(150) < max(1, int(150 * share))).astype(int)
    ranked = Ranked.of(values, labels)
    expected = stats.mannwhitneyu(values[labels == 1], values[labels == 0], method="asymptotic")
    np.testing.assert_array_equal(ranked.statistic, expected.statistic)
    np.testing.assert_allclose(ranked.p_value(), expected.pvalue, rtol=1e-12)


def test_blocks_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = scalars_with_ties()
    groups = np.arange(300) // 2
    whole = head_significance(values, labels, groups, errors=True)
    monkeypatch.setattr(ranks, "COLUMNS_AT_ONCE", 4)
    blocks = head_significance(values, labels, groups, errors=True)
    for name in ("p_value", "q_value", "auroc", "auroc_error"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), rtol=1e-12)


def test_q_values_are_benjamini_and_hochberg() -> None:
    values, labels = scalars_with_ties()
    tested = head_significance(values, labels, np.arange(300))
    p = np.sort(tested.p_value.ravel())
    stepped = np.minimum.accumulate((p * 15 / np.arange(1, 16))[::-1])[::-1]
    np.testing.assert_allclose(np.sort(tested.q_value.ravel()), stepped, rtol=1e-12)
    np.testing.assert_allclose(tested.q_value.ravel(), stats.false_discovery_control(tested.p_value.ravel()))
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
        head_significance(np.zeros((20, 3)), np.ones(20), np.arange(20))


def test_groups_and_classes_give_one_mean_each() -> None:
    values = np.array([[1.0], [3.0], [10.0], [5.0]])
    means, labels = one_value_per_group(values, np.array([1, 1, 0, 0]), np.array(["b", "b", "b", "a"]))
    assert means.tolist() == [[5.0], [10.0], [2.0]]
    assert labels.tolist() == [0, 0, 1]


def false_alarms(pooled: bool) -> float:
    """Share of null heads with p < .05 where the five rows of a group resemble each other."""
    table = make_table(rows=1000, layers=20, heads=20, per_group=5, group_effect=0.5, seed=3)
    groups = np.arange(1000) if pooled else table.groups
    return head_significance(table.scalars((LAPLACIAN,), table.k), table.labels, groups).share_p


def test_repeated_groups_do_not_raise_the_false_alarm_rate() -> None:
    # 400 null heads at 5 %: one standard error is 1.1 %.
    assert 0.02 <= false_alarms(pooled=False) <= 0.085


def test_control_rows_counted_as_independent_raise_it() -> None:
    assert false_alarms(pooled=True) > 0.15


def uneven_groups() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Skewed values of 64 heads, group of each row, label of each group; one to six rows a group, and no signal."""
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(120), rng.integers(1, 7, 120))
    noise, shared = rng.normal(size=(len(groups), 64)), rng.normal(size=(120, 64))
    return np.exp(np.sqrt(0.5) * (noise + shared[groups])), groups, (np.arange(120) < 48).astype(int)


def permuted_level(pooled: bool) -> float:
    """Share of p < .05 over the permutations of whole groups, which is what the test promises to be .05."""
    values, groups, of_group = uneven_groups()
    rng = np.random.default_rng(0)
    counted = np.arange(len(groups)) if pooled else groups
    return float(
        np.mean([head_significance(values, rng.permutation(of_group)[groups], counted).share_p for _ in range(60)])
    )


def test_the_level_holds_over_permutations_of_whole_groups() -> None:
    # 60 x 64 tests at 5 %: a standard error of .4 %; groups of uneven size have means of uneven spread.
    assert 0.035 <= permuted_level(pooled=False) <= 0.065


def test_control_the_level_of_plain_rows_does_not_hold_over_permutations() -> None:
    assert permuted_level(pooled=True) > 0.12


def test_the_p_value_is_the_share_of_group_permutations_that_are_as_extreme() -> None:
    values, groups, of_group = uneven_groups()
    found = head_significance(values, of_group[groups], groups).p_value
    means, labels = one_value_per_group(values, of_group[groups], groups)
    centred = stats.rankdata(means, axis=0) - (len(means) + 1) / 2
    rng = np.random.default_rng(1)
    dealt = np.stack([rng.permutation(labels) for _ in range(4000)])
    extreme = np.abs(dealt @ centred) >= np.abs(labels @ centred)  # (permutations, heads)
    # A share of 4,000 has a standard error of at most .8 %.
    np.testing.assert_allclose(found, extreme.mean(axis=0), atol=0.03)


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


def direct_obuchowski(values: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Equations 3 to 5 from all pairs, group by group."""
    high, low = labels == 1, labels == 0
    wins = (values[high][:, None] > values[low]) + 0.5 * (values[high][:, None] == values[low])
    auroc, names = wins.mean(), np.unique(groups)
    above = np.array([(wins.mean(axis=1) - auroc)[groups[high] == name].sum() for name in names])
    below = np.array([(wins.mean(axis=0) - auroc)[groups[low] == name].sum() for name in names])
    with_high, with_low = (len(np.unique(groups[rows])) for rows in (high, low))
    variance = (
        with_high / (with_high - 1) * (above**2).sum() / high.sum() ** 2
        + with_low / (with_low - 1) * (below**2).sum() / low.sum() ** 2
        + 2 * len(names) / (len(names) - 1) * (above * below).sum() / (high.sum() * low.sum())
    )
    return float(np.sqrt(variance))


def test_the_clustered_error_is_obuchowskis_for_every_head() -> None:
    values, labels = scalars_with_ties()
    groups = np.random.default_rng(5).integers(0, 90, 300)  # one to eight rows, many with both classes
    tested = head_significance(values, labels, groups, errors=True)
    for layer in range(3):
        for head in range(5):
            expected = direct_obuchowski(values[:, layer, head], labels, groups)
            assert tested.auroc_error[layer, head] == pytest.approx(expected, rel=1e-10)


def test_the_influence_of_the_groups_is_what_leaving_one_out_does() -> None:
    values, labels = scalars_with_ties()
    groups = np.arange(300) // 2
    won, lost = Ranked.of(values[:, 1], labels).influence(group_codes(groups))
    np.testing.assert_allclose((won + lost).sum(axis=1), 0.0, atol=1e-12)
    whole = roc_auc_score(labels, values[:, 1, 0])
    without = [roc_auc_score(labels[groups != one], values[groups != one, 1, 0]) for one in range(150)]
    # Of 150 groups one does about a hundredth more than to first order.
    np.testing.assert_allclose(whole - np.array(without), (won + lost)[0], rtol=0.05, atol=1e-4)


def coverage(grouped: bool, mixed: bool) -> float:
    """How often the interval holds the true .5 of a null head, when the four rows of a group are alike."""
    table = make_table(rows=400, layers=20, heads=20, per_group=4, group_effect=0.7, seed=4)
    labels = np.random.default_rng(0).permutation(table.labels) if mixed else table.labels
    groups = table.groups if grouped else np.arange(400)
    low, high = head_significance(table.scalars((LAPLACIAN,), 4), labels, groups, errors=True).auroc_interval
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


def test_an_error_that_one_group_can_not_give_is_unknown() -> None:
    values, labels = scalars_with_ties()
    groups = np.where(labels == 1, 0, np.arange(300))
    assert np.isnan(head_significance(values, labels, groups, errors=True).auroc_error).all()


def test_the_head_scalar_is_the_mean_of_the_top_k() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(head_scalars(values), values.mean(axis=-1))


def pooled_false_alarms(correlation: float, mean: bool) -> float:
    """Share of null heads with p < .05 when k correlated values are pooled, or their mean is taken."""
    rng = np.random.default_rng(2)
    labels = (np.arange(200) < 80).astype(int)
    own, shared = rng.normal(size=(200, 400, 10)), rng.normal(size=(200, 400, 1))
    values = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * shared
    if mean:
        return head_significance(head_scalars(values), labels, np.arange(200)).share_p
    pooled = values.transpose(0, 2, 1).reshape(2000, 400)
    return head_significance(pooled, np.repeat(labels, 10), np.arange(2000)).share_p


def test_the_mean_of_the_top_k_keeps_the_level() -> None:
    assert 0.02 <= pooled_false_alarms(0.6, mean=True) <= 0.085  # 400 heads: a standard error of 1.1 %


def test_control_pooling_the_k_values_does_not() -> None:
    assert pooled_false_alarms(0.6, mean=False) > 0.35


def test_the_strongest_heads_are_named_as_the_model_names_its_layers() -> None:
    auroc = np.array([[0.5, 0.7], [0.2, 0.55]])
    tested = HeadSignificance(np.zeros((2, 2)), np.zeros((2, 2)), auroc, np.full((2, 2), 0.01))
    first, second = strongest_heads(tested, layers=(3, 7), count=2)
    assert (first["layer"], first["head"], first["value"]) == (7, 0, 0.2)
    assert (second["layer"], second["head"]) == (3, 1)
    assert second["low"] == pytest.approx(0.7 - 1.96 * 0.01, abs=1e-4)
