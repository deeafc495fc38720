from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from training_fakes import LAPLACIAN, make_table

from lapwing_training.recipes.fit import SinkRecipe
from lapwing_training.recipes.sink import SHARES


def test_folded_logit_of_the_sinks_is_that_of_the_l1_regression() -> None:
    table = make_table(planted=(2, 9))
    probe = SinkRecipe((LAPLACIAN,), table.k, share=0.125).fit(table, seed=0)
    model = LogisticRegression(
        C=probe.chosen["C"], l1_ratio=1.0, solver="saga", class_weight="balanced", tol=1e-8, max_iter=5000
    )
    columns = table.features[LAPLACIAN].reshape(len(table), -1).astype(np.float64)
    oracle = make_pipeline(StandardScaler(), model).fit(columns, table.labels)
    expected = oracle.decision_function(columns)
    # The path is followed until no logit moves by more than 1e-3.
    np.testing.assert_allclose(probe.logit(table), (expected - expected.mean()) / expected.std(), atol=1e-2)
    weights = model.coef_[0].reshape(16, -1)
    assert np.flatnonzero(probe.selected).tolist() == np.flatnonzero(weights.any(axis=1)).tolist()
    assert 0 < probe.selected.sum() < 16


def test_the_l1_penalty_leaves_the_heads_that_know_something() -> None:
    table = make_table(rows=800, layers=8, heads=8, planted=(3, 30, 61), strength=0.8)
    probe = SinkRecipe((LAPLACIAN,), table.k).fit(table, seed=0)
    found = set(np.flatnonzero(probe.selected).tolist())
    assert {3, 30, 61} <= found
    assert len(found) < 20
    assert probe.chosen["heads"] == len(found)
    loose = SinkRecipe((LAPLACIAN,), table.k, share=SHARES[-1]).fit(table, seed=0)
    assert loose.selected.sum() > 50  # control: with a weak penalty nearly all


def test_the_strongest_l1_penalty_leaves_a_head_to_look_at_even_on_noise() -> None:
    table = make_table(rows=300, seed=3)
    assert SinkRecipe((LAPLACIAN,), table.k, share=SHARES[0]).fit(table, seed=0).selected.any()
    flat = replace(table, features={LAPLACIAN: np.zeros_like(table.features[LAPLACIAN])})
    assert not SinkRecipe((LAPLACIAN,), table.k).fit(flat, seed=0).logit(flat).any()
