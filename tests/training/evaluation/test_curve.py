from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, make_table

from lapwing_training.evaluation import curve as curve_module
from lapwing_training.evaluation.curve import DRAWS, Curve, learning_curve
from lapwing_training.recipes.fit import LapwingRecipe
from lapwing_training.statistics.selection import SELECTIONS
from lapwing_training.statistics.splits import Fold, grouped_folds
from lapwing_training.store.table import Table

RECIPE = LapwingRecipe((LAPLACIAN,), 2)


def folds_of(table: Table) -> list[Fold]:
    return grouped_folds(table.labels, table.groups, 3, seed=0)


@pytest.fixture(scope="module")
def table() -> Table:
    return make_table(rows=600, layers=4, heads=8, k=2, planted=(3, 12, 20, 31), strength=0.6, per_group=2)


@pytest.fixture(scope="module")
def curve(table: Table) -> Curve:
    return learning_curve(RECIPE, table, folds_of(table), seed=0)


def test_every_row_has_a_logit_for_every_number(table: Table, curve: Curve) -> None:
    assert curve.heads == (1, 2, 4, 8, 16, 32)
    assert curve.selected.shape == (6, 600)
    assert curve.by_lot.shape == (6, DRAWS, 600)
    assert np.isfinite(curve.selected).all()
    assert np.isfinite(curve.by_lot).all()


def test_ranked_heads_rise_at_once_and_heads_by_lot_slowly(table: Table, curve: Curve) -> None:
    ranked = [roc_auc_score(table.labels, logits) for logits in curve.selected]
    drawn = [np.mean([roc_auc_score(table.labels, logits) for logits in draws]) for draws in curve.by_lot]
    assert ranked[2] > ranked[0] + 0.05
    assert ranked[2] > max(ranked) - 0.02  # four heads know all that there is
    assert ranked[2] > drawn[2] + 0.1
    assert drawn[-1] > drawn[0] + 0.1


def test_all_heads_are_all_heads_in_whatever_order(curve: Curve) -> None:
    for draw in curve.by_lot[-1]:
        np.testing.assert_allclose(draw, curve.selected[-1], atol=1e-3)  # float32
    assert np.abs(curve.by_lot[0, 0] - curve.selected[0]).max() > 0.1  # control


def test_the_curve_ranks_as_the_full_fit_does(table: Table, curve: Curve) -> None:
    rows, tested = folds_of(table)[0]
    train, test = table.take(rows), table.take(tested)
    choice = RECIPE.choose(train, seed=0)
    ranked = RECIPE.rank(train, train.scalars((LAPLACIAN,), 2), 0).heads
    full = RECIPE.fit_chosen(train, ranked[:4], choice.strength).logit(test)
    found = curve.selected[2, tested]
    assert roc_auc_score(test.labels, found) == pytest.approx(roc_auc_score(test.labels, full), abs=0.01)
    assert np.corrcoef(found, full)[0, 1] > 0.98


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_number_of_heads_is_read_whatever_the_selection(
    selection: str, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    plain = curve_module.nested_logits

    def spy(recipe: LapwingRecipe, train: Table, test: Table, order: np.ndarray, counts: list[int]) -> np.ndarray:
        read.append((len(set(order.tolist())), max(counts)))
        return plain(recipe, train, test, order, counts)

    monkeypatch.setattr(curve_module, "nested_logits", spy)
    recipe = LapwingRecipe((LAPLACIAN,), 2, selection, strength=0.1)
    found = learning_curve(recipe, table, folds_of(table), seed=0)
    assert {heads >= most == found.heads[-1] for heads, most in read} == {True}
    # All heads are all heads in whatever order, also for the selections that leave some out.
    np.testing.assert_allclose(found.by_lot[-1, 0], found.selected[-1], atol=1e-3)


def test_on_noise_the_curve_is_flat_at_half() -> None:
    found = []
    for seed in range(6):
        table = make_table(rows=200, layers=8, heads=8, k=2, seed=seed)
        curve = learning_curve(RECIPE, table, folds_of(table), seed)
        found.append([roc_auc_score(table.labels, logits) for logits in curve.selected])
    # One AUROC of 200 rows has a standard error of .042, the mean of six .017.
    assert np.abs(np.mean(found, axis=0) - 0.5).max() < 0.07


def test_labels_and_values_of_tested_rows_do_not_matter(table: Table, curve: Curve) -> None:
    folds = folds_of(table)
    _, tested = folds[0]
    labels = table.labels.copy()
    labels[tested] = 1 - labels[tested]
    other = learning_curve(RECIPE, table.with_labels(labels), folds, seed=0)
    np.testing.assert_array_equal(curve.selected[:, tested], other.selected[:, tested])
    rest = np.setdiff1d(np.arange(600), tested)
    assert (curve.selected[:, rest] != other.selected[:, rest]).any()  # control: fitted on them


def test_what_the_probes_of_the_folds_chose_need_not_be_chosen_again(
    table: Table, curve: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = folds_of(table)
    probes = [RECIPE.fit(table.take(rows), 0) for rows, _ in folds]

    def choose(*arguments: object) -> None:
        raise AssertionError("chosen again")

    monkeypatch.setattr(LapwingRecipe, "choose", choose)
    done: list[None] = []
    again = learning_curve(RECIPE, table, folds, 0, lambda: done.append(None), probes)
    assert len(done) == 3
    assert again.heads == curve.heads
    assert np.isfinite(again.selected).all()
