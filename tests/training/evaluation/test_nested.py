"""Nested cross-validation: no probe, calibration or threshold judges a row whose group it saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, make_table

from lapwing_training.errors import InvalidData, InvalidOption, NotEnoughData
from lapwing_training.evaluation.baselines import shuffled, shuffled_control
from lapwing_training.evaluation.calibrate import fit_calibration, guaranteed_points, operating_points
from lapwing_training.evaluation.evaluate import combined, evaluate_fit
from lapwing_training.evaluation.guarantee import guarantee
from lapwing_training.evaluation.nested import Trial, fit, logits_over, trial_of
from lapwing_training.evaluation.plan import OUTER_FOLDS, plan_rows
from lapwing_training.evaluation.sample import Sample
from lapwing_training.recipes.fit import LapwingRecipe, LinearProbe
from lapwing_training.store.table import Table

SEEDS = 40
HEADS = np.array([2, 9])
RECIPE = LapwingRecipe((LAPLACIAN,), 4, heads=HEADS, strength=0.1)


@pytest.fixture(scope="module")
def table() -> Table:
    return make_table(rows=600, planted=(2, 9), strength=0.8, per_group=2, seed=3)


@pytest.fixture(scope="module")
def trial(table: Table) -> Trial:
    plan = plan_rows(table, None, guarantee=False, seed=0)
    return trial_of(fit(table, RECIPE, 0), table, plan)


@pytest.fixture(scope="module")
def judged(table: Table, trial: Trial) -> dict[str, Any]:
    return evaluate_fit(fit(table, RECIPE, 0), trial, resamples=50, seed=0)


@dataclass(frozen=True)
class Spy:
    """A recipe that remembers which groups it was fitted on, for each probe."""

    seen: list[tuple[set[str], LinearProbe]]

    name, features = "spy", (LAPLACIAN,)

    def fit(self, train: Table, seed: int) -> LinearProbe:
        probe = RECIPE.fit(train, seed)
        self.seen.append((set(train.groups.tolist()), probe))
        return probe


def test_no_row_is_judged_by_a_probe_that_saw_its_group(table: Table) -> None:
    spy = Spy([])
    trial = trial_of(fit(table, spy, 0), table, plan_rows(table, None, guarantee=False, seed=0))
    assert trial.rows.tolist() == list(range(600))
    for (known, tested), probe in zip(trial.folds, trial.probes, strict=True):
        [groups] = [groups for groups, fitted in spy.seen if fitted is probe]
        assert groups == set(table.groups[known])
        assert not groups & set(table.groups[tested])
        np.testing.assert_array_equal(trial.held_out[tested], probe.logit(table.take(tested)))
    # Control: the probe that is saved saw them all.
    assert spy.seen[0][0] == set(table.groups)


def test_what_a_fold_is_calibrated_on_comes_from_probes_that_saw_neither_side(table: Table) -> None:
    spy, plan, steps = Spy([]), plan_rows(table, None, guarantee=False, seed=0), []
    fitted = fit(table, spy, 0)
    trial = trial_of(fitted, table, plan, lambda: steps.append(1))
    assert len(steps) == plan.pairs == len(spy.seen) - 1 - OUTER_FOLDS == 10
    for (known, tested), scorers, logits in zip(trial.folds, trial.known_scorers, trial.known, strict=True):
        assert sorted(np.concatenate([rows for rows, _ in scorers]).tolist()) == known.tolist()
        assert np.isnan(logits[tested]).all()
        for rows, probe in scorers:
            [groups] = [groups for groups, seen in spy.seen if seen is probe]
            assert groups == set(table.groups) - set(table.groups[rows]) - set(table.groups[tested])
            np.testing.assert_array_equal(logits[rows], probe.logit(table.take(rows)))
    # The saved probe is calibrated on what all other rows say.
    assert fitted.calibration == fit_calibration(trial.held_out, table.labels, table.groups)
    # Control: those come from probes that saw the fold that is judged.
    for logits, (known, _) in zip(trial.known, trial.folds, strict=True):
        assert (logits[known] != trial.held_out[known]).any()


def test_a_split_needs_no_pairs(table: Table) -> None:
    plan = plan_rows(table, 0.3, guarantee=False, seed=0)
    spy = Spy([])
    [known] = trial_of(fit(table.take(plan.fitted), spy, 0), table, plan).known
    assert (plan.pairs, len(spy.seen)) == (0, 1 + OUTER_FOLDS)
    assert np.isfinite(known[plan.fitted]).all()
    assert np.isnan(known[plan.tested]).all()


class Contrast:
    """The mean of one class less that of the other, in every head: nothing is chosen, and it takes no time."""

    name, features = "contrast", (LAPLACIAN,)

    def fit(self, train: Table, seed: int) -> LinearProbe:
        values = train.feature(LAPLACIAN, 1)
        weights = values[train.labels == 1].mean(axis=0) - values[train.labels == 0].mean(axis=0)
        return LinearProbe((LAPLACIAN,), 1, weights, 0.0, np.ones(weights.shape[:2], dtype=bool), {})


def test_on_noise_attention_adds_nothing_to_noise() -> None:
    def auroc(trial: Trial) -> float:
        both, labels = combined(trial, trial.table.log_probabilities), trial.table.labels
        return float(np.mean([roc_auc_score(labels[rows], both[rows]) for _, rows in trial.folds]))

    honest, leaking = np.zeros(SEEDS), np.zeros(SEEDS)
    for seed in range(SEEDS):
        noise = make_table(rows=60, layers=1, heads=4, k=1, seed=seed)
        unrelated = -np.random.default_rng([seed, 1]).exponential(size=60)
        noise = replace(noise, log_probabilities=unrelated)
        plan = plan_rows(noise, None, guarantee=False, seed=seed)
        trial = trial_of(fit(noise, Contrast(), seed), noise, plan)
        honest[seed] = auroc(trial)
        leaking[seed] = auroc(replace(trial, known=(trial.held_out,) * OUTER_FOLDS))

    def in_errors(found: np.ndarray) -> float:
        return float(found.mean() / (found.std() / np.sqrt(SEEDS)))

    assert abs(in_errors(honest - 0.5)) < 3
    # Control: the weight was set on logits of probes that had the labels of this fold among theirs.
    assert in_errors(leaking - honest) > 3
    assert leaking.mean() > 0.53


def with_labels_turned_in(trial: Trial, rows: np.ndarray) -> Trial:
    """The same logits; only what is set on them may change."""
    labels = trial.table.labels.copy()
    labels[rows] = 1 - labels[rows]
    return replace(trial, table=trial.table.with_labels(labels))


def test_probabilities_and_thresholds_of_a_fold_come_from_the_others_alone(trial: Trial) -> None:
    _, tested = trial.folds[0]
    turned = with_labels_turned_in(trial, tested)
    np.testing.assert_array_equal(turned.probabilities[tested], trial.probabilities[tested])
    for before, after in zip(trial.limits(trial.points), turned.limits(turned.points), strict=True):
        np.testing.assert_array_equal(before[tested], after[tested])
    # Control: the labels of another fold do matter.
    others = with_labels_turned_in(trial, trial.folds[1][1])
    assert (others.probabilities[tested] != trial.probabilities[tested]).all()


def test_they_are_what_the_other_folds_rows_give(trial: Trial, table: Table) -> None:
    for logits, (known, tested) in zip(trial.known, trial.folds, strict=True):
        others = logits[known]
        expected = fit_calibration(others, table.labels[known], table.groups[known])
        np.testing.assert_array_equal(trial.probabilities[tested], expected.probabilities(trial.held_out[tested]))
        points = operating_points(others[table.labels[known] == 0])
        limits = [limit[tested] for limit in trial.limits(trial.points)]
        for point, limit in zip(points, limits, strict=True):
            assert set(limit.tolist()) == {point.logit}


def test_the_report_judges_all_rows_by_their_held_out_logits(
    judged: dict[str, Any], trial: Trial, table: Table
) -> None:
    found = judged
    assert found["protocol"] == "nested"
    assert found["test"]["rows"] == 600
    assert found["test"]["auroc"]["value"] == pytest.approx(roc_auc_score(table.labels, trial.held_out))
    assert found["out_of_fold"]["auroc"] == found["test"]["auroc"]
    negatives = table.labels == 0
    for entry, limit in zip(found["thresholds"], trial.limits(trial.points), strict=True):
        assert entry["realised_rate"] == pytest.approx((trial.logits > limit)[negatives].mean())
        assert entry["low"] <= entry["realised_rate"] <= entry["high"]
    # The rates are about kept; 360 negatives in halves of correlated rows: a standard error of .02.
    assert abs(found["thresholds"][2]["realised_rate"] - 0.1) < 0.05


def test_against_paper_is_paired_and_says_with_how_many_heads(judged: dict[str, Any]) -> None:
    both = [judged["comparison"][f"{name}/{LAPLACIAN}"]["auroc"] for name in ("paper", "lapwing")]
    paper, own = (one["value"] for one in both)
    against = judged["against_paper"]
    assert (against["heads"], against["of"]) == (2, 16)
    assert against["difference"]["value"] == pytest.approx(own - paper)
    # Control: resampled apart, the difference would scatter as both together.
    apart = np.hypot(*(one["high"] - one["low"] for one in both))
    assert against["difference"]["high"] - against["difference"]["low"] < 0.8 * apart


def test_pure_noise_is_judged_as_noise_and_what_saw_all_rows_is_not() -> None:
    def judged(recipe_of: Callable[[Table], LapwingRecipe]) -> np.ndarray:
        found = []
        for seed in range(10):
            noise = make_table(rows=160, layers=8, heads=16, k=2, seed=seed)
            folds = plan_folds(noise)
            found.append(roc_auc_score(noise.labels, logits_over(recipe_of(noise), noise, folds, seed)))
        return np.array(found)

    def strongest(noise: Table) -> LapwingRecipe:
        scalars = noise.scalars((LAPLACIAN,), 2).reshape(160, -1)
        effect = [abs(roc_auc_score(noise.labels, column) - 0.5) for column in scalars.T]
        return LapwingRecipe((LAPLACIAN,), 2, heads=np.argsort(effect)[-8:], strength=0.1)

    # Logits of five probes on shared rows scatter by more than AUROCs of independent rows: here by .075, not by .046.
    found = judged(lambda noise: LapwingRecipe((LAPLACIAN,), 2, count=8, strength=0.1))
    assert abs(found.mean() - 0.5) < 3 * 0.075 / np.sqrt(len(found))
    assert judged(strongest).mean() > 0.6  # control: the heads were chosen on rows that are tested


def plan_folds(table: Table) -> list[tuple[np.ndarray, np.ndarray]]:
    from lapwing_training.statistics.splits import grouped_folds

    return grouped_folds(table.labels, table.groups, OUTER_FOLDS, 0)


def test_labels_are_dealt_within_the_folds(trial: Trial, table: Table) -> None:
    dealt = shuffled(table, trial.folds, seed=1)
    assert (dealt.labels != table.labels).any()
    for known, tested in trial.folds:
        assert dealt.labels[tested].sum() == table.labels[tested].sum()
        assert dealt.labels[known].sum() == table.labels[known].sum()
    deals = shuffled_control(RECIPE, table, trial.folds, seed=1, draws=4)
    aurocs = [roc_auc_score(tested.labels, logits) for tested, logits in deals]
    # 600 rows: a standard error of .024, of the mean of four .012.
    assert abs(np.mean(aurocs) - 0.5) < 0.036
    assert roc_auc_score(table.labels, trial.held_out) > 0.7  # control: there was something to be lost


def test_nested_is_the_default_and_a_split_of_the_items_or_a_share_is_the_option(table: Table) -> None:
    assert plan_rows(table, None, guarantee=False, seed=0).protocol == "nested"
    shared = plan_rows(table, 0.3, guarantee=False, seed=0)
    assert shared.protocol == "split"
    assert not set(table.groups[shared.fitted]) & set(table.groups[shared.tested])
    given = replace(table, splits=np.where(np.arange(600) < 100, "test", "train"))
    plan = plan_rows(given, None, guarantee=False, seed=0)
    assert (plan.protocol, plan.tested.tolist()) == ("split", list(range(100)))
    # Items that are only said to be trained on bring no split.
    only = replace(table, splits=np.full(600, "train"))
    assert plan_rows(only, None, guarantee=False, seed=0).protocol == "nested"


def test_a_plan_that_can_not_be_is_refused(table: Table) -> None:
    both = replace(table, splits=np.where(np.arange(600) < 101, "test", "train"))  # parts rows 100 and 101
    with pytest.raises(InvalidData, match=r"group `g50`"):
        plan_rows(both, None, guarantee=False, seed=0)
    with pytest.raises(InvalidOption, match=r"test share is 1\.5"):
        plan_rows(table, 1.5, guarantee=False, seed=0)
    with pytest.raises(NotEnoughData, match="5 groups; a guarantee"):
        plan_rows(make_table(rows=40, per_group=8), None, guarantee=True, seed=0)


@pytest.mark.parametrize("test_share", [None, 0.3])
def test_the_groups_of_a_guarantee_are_neither_fitted_on_nor_judged(table: Table, test_share: float | None) -> None:
    spy, plan = Spy([]), plan_rows(table, test_share, guarantee=True, seed=0)
    apart = set(table.groups[plan.apart])
    fitted = fit(table.take(plan.fitted), spy, 0)
    trial = trial_of(fitted, table, plan)
    assert 0.15 * 300 * (1 - (test_share or 0)) < len(apart) < 0.25 * 300
    assert not any(apart & groups for groups, _ in spy.seen)
    assert not apart & set(trial.tested.groups)
    found = guarantee(fitted, trial, Sample.of(trial.tested, 20), seed=0)
    assert found is not None
    assert found["calibration_groups"] == len(apart)
    kept = table.take(plan.apart)
    expected = guaranteed_points(fitted.probe.logit(kept), kept.labels, kept.groups, seed=0)
    assert [entry["logit"] for entry in found["rates"]] == [point.logit for point in expected]
    # The promise is about groups, so each counts once.
    negatives, limit = trial.tested.labels == 0, found["rates"][2]["logit"]
    if test_share is not None:
        flags = (trial.logits > limit)[negatives]
        groups = trial.tested.groups[negatives]
        by_group = np.mean([flags[groups == group].mean() for group in np.unique(groups)])
        assert found["rates"][2]["realised_rate"] == pytest.approx(by_group)
    assert (
        guarantee(fitted, replace(trial, plan=replace(plan, apart=plan.apart[:0])), Sample.of(trial.tested, 2), 0)
        is None
    )


def test_a_fold_without_a_threshold_is_left_out_of_what_came_of_it() -> None:
    # 19 negatives make a promise of 5 %; the 15 or 16 of four folds do not.
    table = make_table(rows=60, seed=4)
    labels = np.ones(60, dtype=np.int8)
    labels[np.arange(0, 60, 3)[:19]] = 0
    table = table.with_labels(labels)
    plan = plan_rows(table, None, guarantee=False, seed=0)
    fitted = fit(table, RECIPE, 0)
    found = evaluate_fit(fitted, trial_of(fitted, table, plan), resamples=10, seed=0)
    one, five, ten = found["thresholds"]
    assert one["logit"] is None
    assert five["logit"] is not None
    assert five["realised_rate"] is None
    assert ten["realised_rate"] is not None


def test_the_curve_has_a_point_for_every_number_of_heads(judged: dict[str, Any]) -> None:
    curve = judged["curve"]
    assert curve["heads"][0] == 1
    assert len(curve["heads"]) == len(curve["selected"]) == len(curve["random"])
    two = curve["heads"].index(2)
    assert curve["selected"][two]["low"] > curve["random"][two]["high"]  # two of sixteen heads were planted
