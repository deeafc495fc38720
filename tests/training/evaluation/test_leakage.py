"""On pure noise an honest pipeline finds nothing; one that looks at its test rows finds something."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from training_fakes import LAPLACIAN, make_table

from lapwing_training.errors import InvalidData
from lapwing_training.evaluation import nested
from lapwing_training.evaluation.baselines import shuffled_control
from lapwing_training.evaluation.sample import Sample
from lapwing_training.recipes.fit import LapwingRecipe, PaperRecipe, Recipe
from lapwing_training.statistics.selection import SELECTIONS, rank_heads
from lapwing_training.statistics.splits import grouped_folds, split_by_group
from lapwing_training.store.table import Table

HONEST = LapwingRecipe((LAPLACIAN,), 2)


def noise(seed: int) -> Table:
    return make_table(rows=200, layers=16, heads=16, k=2, seed=seed)


def leaky(table: Table) -> Recipe:
    """Heads selected on all rows, tested ones included: the mistake that the folds are there to prevent."""
    heads = rank_heads(table.scalars((LAPLACIAN,), 2), table.labels, table.groups).heads[:8]
    return replace(HONEST, heads=heads, strength=0.1)


def mean_out_of_fold(select_outside: bool, seeds: range = range(6)) -> float:
    found = []
    for seed in seeds:
        table = noise(seed)
        recipe = leaky(table) if select_outside else HONEST
        found.append(roc_auc_score(table.labels, nested.fit(table, recipe, seed).held_out))
    return float(np.mean(found))


def selected_and_fitted(selection: str, outside: bool) -> float:
    """Mean AUROC on noise of eight heads taken by a selection, and a fit of them inside each fold."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        labels, groups = (rng.random(160) < 0.4).astype(int), np.arange(160)
        scalars = rng.normal(size=(160, 1, 8, 8))
        for fitted, tested in grouped_folds(labels, groups, 5, seed):
            seen = groups if outside else fitted
            heads = rank_heads(scalars[seen], labels[seen], groups[seen], selection, seed).heads[:8]
            columns = scalars.reshape(160, -1)[:, heads]
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced"))
            model.fit(columns[fitted], labels[fitted])
            found.append(roc_auc_score(labels[tested], model.decision_function(columns[tested])))
    return float(np.mean(found))


CHOOSING = [name for name in SELECTIONS if name != "all"]


@pytest.mark.parametrize("selection", CHOOSING)
def test_every_selection_scores_half_on_noise_when_it_stays_inside_the_folds(selection: str) -> None:
    # 160 rows six times: a standard error of .019.
    assert abs(selected_and_fitted(selection, outside=False) - 0.5) < 0.057


@pytest.mark.parametrize("selection", CHOOSING)
def test_control_every_selection_that_saw_the_tested_rows_is_caught(selection: str) -> None:
    assert selected_and_fitted(selection, outside=True) > 0.6


def test_noise_scores_half_out_of_fold() -> None:
    # One AUROC of 200 rows, pooled over folds that chose for themselves, varies by .06 (seen over 24 tables), the mean
    # of nine by .02.
    assert abs(mean_out_of_fold(select_outside=False, seeds=range(9)) - 0.5) < 0.06


def test_control_selection_on_tested_rows_finds_signal_in_noise() -> None:
    assert mean_out_of_fold(select_outside=True) > 0.6


@pytest.mark.parametrize("recipe", [LapwingRecipe((LAPLACIAN,), 4), PaperRecipe((LAPLACIAN,), 4)])
def test_shuffled_labels_score_half_within_the_interval(recipe: Recipe) -> None:
    table = make_table(rows=800, planted=(1, 6), strength=1.0, per_group=2)
    rows, tested = split_by_group(table, 0.3, seed=0)
    honest = recipe.fit(table.take(rows), 0).logit(table.take(tested))
    assert roc_auc_score(table.labels[tested], honest) > 0.7  # there is something to be lost
    deals = shuffled_control(recipe, table, [(rows, tested)], seed=0)
    logits, labels = np.stack([logit for _, logit in deals]), np.stack([dealt.labels for dealt, _ in deals])
    found = Sample.of(table.take(tested), resamples=500).judge(logits, labels)["auroc"]
    assert found["low"] <= 0.5 <= found["high"]


def test_a_group_keeps_its_side_in_every_store() -> None:
    table = make_table(rows=400, per_group=2)
    _, tested = split_by_group(table, 0.3, seed=0)
    part = table.take(np.arange(100, 300))
    _, tested_part = split_by_group(part, 0.3, seed=0)
    assert set(part.groups[tested_part]) == set(table.groups[tested]) & set(part.groups)
    assert 0.2 < len(set(table.groups[tested])) / 200 < 0.4
    _, other = split_by_group(table, 0.3, seed=1)
    assert set(table.groups[other]) != set(table.groups[tested])


def test_a_given_split_wins() -> None:
    table = make_table(rows=400, per_group=2)
    splits = np.where(np.arange(400) < 100, "test", "train")
    splits[1] = ""  # its group is tested, so it is, too
    rows, tested = split_by_group(replace(table, splits=splits), 0.3, seed=0)
    assert tested.tolist() == list(range(100))
    assert not set(table.groups[rows]) & set(table.groups[tested])


def test_a_group_on_both_sides_of_a_given_split_is_refused() -> None:
    table = make_table(rows=40, per_group=2)
    splits = np.where(np.arange(40) < 21, "test", "train")  # parts rows 20 and 21
    with pytest.raises(InvalidData, match="group `g10` stands in `train` and in `test`; give all items"):
        split_by_group(replace(table, splits=splits), 0.3, seed=0)
