from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from training_fakes import LAPLACIAN, SCORE, make_table

from lapwing_training.errors import InvalidOption, NotEnoughData
from lapwing_training.evaluation import nested
from lapwing_training.recipes import linear_probe
from lapwing_training.recipes import paper as paper_recipe
from lapwing_training.recipes.fit import (
    LapwingRecipe,
    LinearProbe,
    PaperRecipe,
    Recipe,
    SinkRecipe,
    make_recipe,
)
from lapwing_training.recipes.linear_probe import standardiser
from lapwing_training.recipes.paper import paper_classifier, some_groups
from lapwing_training.statistics.newton import STRENGTHS
from lapwing_training.statistics.selection import SELECTIONS
from lapwing_training.statistics.splits import grouped_folds
from lapwing_training.store.table import Table

# The folded weights are float32: 2^-24 of each of some tens of terms of size one.
FOLDED = 1e-5


def unscaled(probe: LinearProbe, table: Table) -> np.ndarray:
    return probe.logit(table) * probe.chosen["logit_scale"] + probe.chosen["logit_centre"]


def columns_of(table: Table, features: tuple[str, ...] = (LAPLACIAN,)) -> np.ndarray:
    return table.stacked(features, table.k).reshape(len(table), -1).astype(np.float64)


def test_folded_logit_is_the_decision_function_of_scaler_and_regression() -> None:
    table = make_table(planted=(2, 9))
    heads = np.array([9, 2, 14])
    probe = LapwingRecipe((SCORE, LAPLACIAN), table.k).fit_chosen(table, heads, 0.1)
    columns = table.stacked((SCORE, LAPLACIAN), table.k).reshape(len(table), 16, -1)[:, heads].reshape(len(table), -1)
    # The four eigenvalues of a head together weigh as much as its one score, the more variable ones more.
    deviation = columns.astype(np.float64).std(axis=0).reshape(3, 5)
    shares = np.concatenate([np.ones((3, 1)), deviation[:, 1:] / deviation[:, 1:].sum(axis=1, keepdims=True)], axis=1)
    np.testing.assert_allclose(shares.sum(axis=1), 2.0)
    standard = StandardScaler().fit_transform(columns.astype(np.float64)) * np.sqrt(shares.ravel())
    oracle = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8).fit(standard, table.labels)
    np.testing.assert_allclose(unscaled(probe, table), oracle.decision_function(standard), atol=1e-4)
    assert np.flatnonzero(probe.selected).tolist() == [2, 9, 14]
    assert not probe.weights[~probe.selected].any()


def test_folded_logit_of_the_paper_is_the_decision_function_of_pca_and_regression() -> None:
    table = make_table(planted=(2, 9))
    probe = PaperRecipe((LAPLACIAN,), table.k).fit(table, seed=0)
    columns = columns_of(table)
    pca, model = paper_classifier(columns, table.labels)
    np.testing.assert_allclose(unscaled(probe, table), model.decision_function(pca.transform(columns)), atol=FOLDED)


def test_the_paper_recipe_has_the_published_settings() -> None:
    table = make_table(rows=900, layers=8, heads=10, k=8)
    columns, labels = columns_of(table), table.labels
    oracle = PCA(n_components=512, random_state=42)
    reduced = oracle.fit_transform(columns)
    classifier = LogisticRegression(max_iter=2000, class_weight="balanced", random_state=42).fit(reduced, labels)
    pca, model = paper_classifier(columns, labels)
    assert pca.n_components_ == 512
    np.testing.assert_array_equal(model.coef_, classifier.coef_)
    in_place, same = paper_classifier(columns.copy(), labels, copy=False)
    np.testing.assert_array_equal(same.coef_, classifier.coef_)
    np.testing.assert_array_equal(in_place.components_, pca.components_)


@pytest.mark.parametrize(
    "recipe", [LapwingRecipe((LAPLACIAN,), 4, count=3, strength=0.1), PaperRecipe((LAPLACIAN,), 4)]
)
def test_what_is_too_large_for_float64_is_fitted_in_float32_to_the_same(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(planted=(2, 9))
    expected = recipe.fit(table, 0)
    monkeypatch.setattr(linear_probe, "EXACT", 0)
    monkeypatch.setattr(linear_probe, "BLOCK", 1000)  # and the rows in blocks
    found = recipe.fit(table, 0)
    # lbfgs stops at a gradient of 1e-4, float32 a little elsewhere; logits have a standard deviation of 1.
    np.testing.assert_allclose(found.logit(table), expected.logit(table), atol=5e-3)
    assert (found.weights != expected.weights).any()


def test_a_number_that_hardly_varies_is_not_blown_up() -> None:
    columns = np.array([[1.0, 0.5], [2.0, 0.5 + 1e-7], [3.0, 0.5]])
    mean, scale = standardiser(columns)
    assert mean[0] == 2.0
    assert scale[0] == pytest.approx(columns[:, 0].std())
    assert scale[1] == 1e-4


def test_out_of_fold_logits_never_see_their_group() -> None:
    table = make_table(rows=300, per_group=3)
    seen: dict[str, set[str]] = {}

    class Spy:
        name, features = "spy", (LAPLACIAN,)

        def fit(self, train, seed):
            class Fitted:
                k = table.k

                def logit(self, tested):
                    assert not set(tested.groups) & set(train.groups)
                    seen.setdefault("groups", set()).update(tested.groups.tolist())
                    return np.zeros(len(tested))

            return Fitted()

    logits = nested.fit(table, Spy(), seed=0).held_out
    assert seen["groups"] == set(table.groups.tolist())
    assert np.isfinite(logits).all()


def test_folds_part_no_group_and_hold_both_classes() -> None:
    table = make_table(rows=300, per_group=4)
    tested = []
    for fitted_rows, tested_rows in grouped_folds(table.labels, table.groups, 5, seed=0):
        assert not set(table.groups[fitted_rows]) & set(table.groups[tested_rows])
        assert set(table.labels[tested_rows]) == {0, 1}
        tested += tested_rows.tolist()
    assert sorted(tested) == list(range(300))


def test_too_few_groups_are_refused() -> None:
    table = make_table(rows=40, per_group=10)
    with pytest.raises(NotEnoughData, match="folds need at least 5"):
        grouped_folds(table.labels, table.groups, 5, seed=0)


def test_the_paper_chooses_k_inside_and_a_smaller_k_is_a_prefix() -> None:
    table = make_table(rows=300, k=10, planted=(2,))
    probe = PaperRecipe((LAPLACIAN,)).fit(table, seed=0)
    assert probe.k in (5, 10)
    assert probe.weights.shape[-1] == probe.k
    np.testing.assert_array_equal(table.stacked((LAPLACIAN,), 5), table.features[LAPLACIAN][..., :5])


@pytest.mark.parametrize(
    ("name", "k", "features", "says"),
    [
        ("magic", None, (LAPLACIAN,), "`magic`; known recipes"),
        ("lapwing", 9, (LAPLACIAN,), "k is 9; the store holds 1 to 4"),
        ("lapwing", None, ("sink_scores.v1",), "lapwing extract --features sink_scores.v1"),
        ("sink", None, None, "lapwing extract --features sink_scores.v1"),
    ],
)
def test_what_the_store_lacks_is_said(name: str, k: int | None, features: tuple[str, ...] | None, says: str) -> None:
    table = make_table(rows=100)
    with pytest.raises(InvalidOption, match=says):
        make_recipe(name, features, k, table.k).fit(table, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("paper", {"selection": "l1"}, "`paper` selects no heads"),
        ("sink", {"heads": 3}, "`sink` selects no heads"),
        ("lapwing", {"heads": 0}, "heads is 0"),
        ("lapwing", {"heads": -1}, "heads is -1; it must be at least 1"),
        ("lapwing", {"heads": 4, "selection": "all"}, "heads is 4, but selection `all` reads every head"),
        ("lapwing", {"selection": "best"}, "`best`; known are fdr"),
    ],
)
def test_options_that_a_recipe_does_not_have_are_refused(name: str, options: dict, says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        make_recipe(name, None, None, 4, **options)


def test_each_recipe_has_features_of_its_own() -> None:
    made = {name: make_recipe(name, None, None, 4).features for name in ("lapwing", "paper", "sink")}
    assert made == {"lapwing": (SCORE, LAPLACIAN), "paper": (LAPLACIAN,), "sink": ("sink_scores.v1",)}
    assert make_recipe("lapwing", (SCORE,), None, 4).features == (SCORE,)


@pytest.mark.filterwarnings("ignore:invalid value")  # PCA of a constant: its share of no variance
@pytest.mark.filterwarnings("ignore:Line search")  # and no way down from there
@pytest.mark.parametrize("recipe", [LapwingRecipe((LAPLACIAN,), 4), PaperRecipe((LAPLACIAN,), 4)])
def test_logits_have_mean_0_and_standard_deviation_1_on_the_rows_of_the_fit(recipe: Recipe) -> None:
    table = make_table(rows=300, planted=(2,))
    logits = recipe.fit(table, 0).logit(table)
    assert logits.mean() == pytest.approx(0.0, abs=1e-9)
    assert logits.std() == pytest.approx(1.0, abs=FOLDED)
    # Nothing to spread: a constant is not blown up.
    flat = replace(table, features={LAPLACIAN: np.zeros_like(table.features[LAPLACIAN])})
    assert not recipe.fit(flat, 0).logit(flat).any()


@pytest.mark.parametrize(("features", "says"), [((), "features is empty"), ((SCORE, SCORE), "name each once")])
def test_features_are_named_once_each(features: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        make_recipe("lapwing", features, None, 4)


def noise_beyond_five(rows: int, heads: int, seed: int) -> Table:
    """k = 10, of which only the first five values know anything."""
    table = make_table(rows=rows, layers=4, heads=heads, k=10, planted=(2, 5, 9), strength=0.7, seed=seed)
    values = table.features[LAPLACIAN].copy()
    values[..., 5:] = np.random.default_rng(seed).normal(size=(rows, 4, heads, 5))
    return replace(table, features={**table.features, LAPLACIAN: values})


def test_the_paper_chooses_k_on_rows_that_the_fit_did_not_see() -> None:
    table = noise_beyond_five(rows=150, heads=8, seed=0)
    folds = grouped_folds(table.labels, table.groups, 5, seed=0)

    def score(k: int, fitted: np.ndarray, tested: np.ndarray) -> float:
        columns = table.features[LAPLACIAN][..., :k].reshape(150, -1).astype(np.float64)
        pca, model = paper_classifier(columns[fitted], table.labels[fitted])
        return roc_auc_score(table.labels[tested], model.decision_function(pca.transform(columns[tested])))

    outside = {k: np.mean([score(k, *rows) for rows in folds]) for k in (5, 10)}
    inside = {k: np.mean([score(k, rows, rows) for rows, _ in folds]) for k in (5, 10)}
    assert PaperRecipe((LAPLACIAN,)).choose(table, seed=0) == max(outside, key=outside.get) == 5
    assert max(inside, key=inside.get) == 10  # control: rows that the fit saw prefer the larger k


def test_the_paper_chooses_k_of_a_large_store_on_whole_groups_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(rows=400, k=10, per_group=4, planted=(2,))
    some = some_groups(table, 100, seed=0)
    assert 90 < len(some) <= 100
    for group in set(some.groups.tolist()):
        assert (some.groups == group).sum() == 4
    assert set(some.groups) != set(some_groups(table, 100, seed=1).groups)
    assert some_groups(table, 400, seed=0) is table
    seen: set[int] = set()

    def score(recipe: PaperRecipe, rows: Table, k: int, fold: object, seed: int) -> float:
        seen.add(len(rows))
        return 0.5

    monkeypatch.setattr(PaperRecipe, "_inner_score", score)
    monkeypatch.setattr(paper_recipe, "CHOICE_NUMBERS", 100 * 16 * 10)
    PaperRecipe((LAPLACIAN,)).choose(table, seed=0)
    assert seen == {len(some)}


@pytest.mark.parametrize("noise_first", [False, True])
def test_lapwing_chooses_k_where_the_signal_lies(noise_first: bool) -> None:
    table = noise_beyond_five(rows=500, heads=4, seed=1)
    values = table.features[LAPLACIAN]
    values = values[..., ::-1].copy() if noise_first else values
    table = replace(table, features={LAPLACIAN: values})
    assert LapwingRecipe((LAPLACIAN,)).choose(table, seed=0).k == (10 if noise_first else 5)


def test_what_is_given_is_not_chosen() -> None:
    table = make_table(rows=300, planted=(2, 9))
    given = LapwingRecipe((LAPLACIAN,), 2, count=3, strength=0.01).fit(table, 0)
    assert (given.chosen["heads"], given.chosen["C"], given.chosen["k"]) == (3, 0.01, 2)
    whole = LapwingRecipe((LAPLACIAN,), selection="all").fit(table, 0)
    assert whole.selected.all()
    assert whole.chosen["selection"] == "all"
    assert not LapwingRecipe((LAPLACIAN,)).fit(table, 0).selected.all()  # control


def test_as_many_heads_are_read_as_are_asked_for() -> None:
    table = make_table(rows=600, planted=(2, 9))
    for selection in SELECTIONS:
        if selection != "all":
            probe = make_recipe("lapwing", (LAPLACIAN,), 4, 4, selection, heads=12).fit(table, 0)
            assert probe.chosen["heads"] == probe.selected.sum() == 12
    free = LapwingRecipe((LAPLACIAN,), 4).rank(table, table.scalars((LAPLACIAN,), 4), 0)
    assert len(free.heads) == free.significant < 12  # control: so many are significant
    with pytest.raises(InvalidOption, match="heads is 17; the store holds 16"):
        make_recipe("lapwing", (LAPLACIAN,), None, 4, heads=17).fit(table, 0)


def test_every_number_of_heads_and_every_c_is_tried_the_simplest_first() -> None:
    choices = LapwingRecipe((LAPLACIAN,)).choices(make_table(rows=20, k=10))
    assert len(choices) == 2 * 5 * len(STRENGTHS)
    assert {choice.k for choice in choices} == {5, 10}
    assert [choice.count for choice in choices] == sorted(choice.count for choice in choices)
    assert (choices[0].count, choices[0].k, choices[0].strength) == (1, 5, STRENGTHS[0])


def test_lapwing_never_copies_the_whole_store(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(rows=600, layers=8, heads=8, planted=(2, 9), strength=1.0)
    read: list[int] = []
    of_heads = Table.of_heads

    def spy(self: Table, features, k, heads):
        read.append(len(heads))
        return of_heads(self, features, k, heads)

    def forbidden(self: Table, *arguments: object) -> None:
        raise AssertionError("the whole store was copied")

    monkeypatch.setattr(Table, "of_heads", spy)
    monkeypatch.setattr(Table, "stacked", forbidden)
    probe = LapwingRecipe((LAPLACIAN,)).fit(table, 0)
    probe.logit(table)
    assert max(read) < 64
    assert read[-1] == probe.selected.sum()


def test_the_chosen_c_is_the_best_out_of_fold_and_not_the_worst() -> None:
    table = make_table(rows=240, layers=4, heads=8, planted=tuple(range(0, 32, 2)), strength=0.2, seed=1)
    heads = np.arange(32)
    columns = columns_of(table)
    folds = grouped_folds(table.labels, table.groups, 5, seed=0)

    def scores(strength: float) -> list[float]:
        # The four values of a head share its variance, and vary alike.
        model = LogisticRegression(C=strength / 4, class_weight="balanced", max_iter=2000)
        pipeline = make_pipeline(StandardScaler(), model)
        return [
            roc_auc_score(
                table.labels[tested],
                pipeline.fit(columns[fitted], table.labels[fitted]).decision_function(columns[tested]),
            )
            for fitted, tested in folds
        ]

    by_strength = {strength: scores(strength) for strength in STRENGTHS}
    means = {strength: np.mean(values) for strength, values in by_strength.items()}
    best = max(means, key=means.get)
    chosen = LapwingRecipe((LAPLACIAN,), 4, heads=heads).choose(table, seed=0).strength
    assert means[chosen] > means[best] - 0.01
    assert min(means.values()) < means[best] - 0.05  # control: there is something to be lost


@pytest.mark.parametrize("recipe", [LapwingRecipe((LAPLACIAN,)), SinkRecipe((LAPLACIAN,), 4)])
def test_the_same_seed_gives_the_same_probe(recipe: Recipe) -> None:
    table = make_table(rows=300, planted=(2,))
    first, second = (recipe.fit(table, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.bias == second.bias
