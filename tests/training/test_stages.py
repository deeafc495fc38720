"""A score while the response is being written: how good it is by then, and what its calibration is set on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score
from training_fakes import LAPLACIAN, make_table

from lapwing_training.calibrate import platt
from lapwing_training.fit import LapwingRecipe
from lapwing_training.nested import Trial, fit, trial_of
from lapwing_training.plan import plan_rows
from lapwing_training.prefix import Prefix
from lapwing_training.sample import Sample
from lapwing_training.stages import judge_stages, stage_logits
from lapwing_training.table import Table

RECIPE = LapwingRecipe((LAPLACIAN,), 4, heads=np.array([2, 9]), strength=0.1)


def written_in_parts(rows: int = 500, seed: int = 0) -> Table:
    """Half a response says less, and all its logits are lower; the first twenty are too short for a half."""
    table = make_table(rows=rows, planted=(2, 9), strength=1.0, seed=seed)
    rng = np.random.default_rng(seed)
    whole = table.features[LAPLACIAN]
    half = (whole - 0.15 + 0.25 * rng.normal(size=(*whole.shape[:3], 1))).astype(np.float32)
    kept = np.arange(20, rows)
    tokens = rng.integers(4, 12, rows)
    prefix = Prefix(kept, table.token_counts[kept], (tokens[kept] + 1) // 2, {LAPLACIAN: half[kept]})
    return replace(table, response_tokens=tokens, prefixes={0.5: prefix})


def trial_for(table: Table, test_share: float | None) -> Trial:
    plan = plan_rows(table, test_share, guarantee=False, seed=0)
    return trial_of(fit(table.take(plan.fitted), RECIPE, 0), table, plan)


@pytest.fixture(scope="module", params=[None, 0.3], ids=["nested", "split"])
def trial(request: pytest.FixtureRequest) -> Trial:
    return trial_for(written_in_parts(), request.param)


def test_a_stage_is_judged_by_probes_that_did_not_see_the_group(trial: Trial) -> None:
    logits, part = stage_logits(trial, 0.5)
    assert len(part) == 480
    assert np.isnan(logits[:20]).all()
    scored = np.zeros(500)
    for rows, probe in trial.scorers:
        long = rows[rows >= 20]
        scored[rows] += 1
        values = trial.table.prefixes[0.5].features[LAPLACIAN][long - 20].reshape(len(long), 16, 4)[:, [2, 9]]
        weights = probe.weights.reshape(16, 4)[[2, 9]].astype(np.float64)
        np.testing.assert_allclose(logits[long], np.einsum("nhw,hw->n", values, weights) + probe.bias, atol=1e-6)
    assert (scored == 1).all()  # each row by one probe


def test_half_a_response_is_known_less_well_than_the_whole(trial: Trial) -> None:
    half, whole = judge_stages(trial, Sample.of(trial.tested, 50))
    logits, part = stage_logits(trial, 0.5)
    rows = trial.rows[np.isfinite(logits[trial.rows])]
    labels = trial.table.labels
    assert (half["fraction"], half["rows"], half["tokens"]) == (0.5, len(rows), np.median(part.response_tokens))
    assert half["auroc"]["value"] == pytest.approx(roc_auc_score(labels[rows], logits[rows]))
    assert whole["auroc"]["value"] == pytest.approx(roc_auc_score(trial.tested.labels, trial.logits))
    assert half["auroc"]["value"] < whole["auroc"]["value"]
    assert whole["fraction"] == 1.0


def test_the_calibration_of_a_stage_is_platts_on_held_out_logits_of_that_stage(trial: Trial) -> None:
    half, _ = judge_stages(trial, Sample.of(trial.tested, 10))
    logits, _ = stage_logits(trial, 0.5)
    fitted = trial.plan.fitted[np.isfinite(logits[trial.plan.fitted])]
    expected = platt(logits[fitted], trial.table.labels[fitted])
    assert (half["slope"], half["intercept"]) == pytest.approx(expected)
    # Judged, it is fitted without the fold: in a split the same, in nested folds one for each.
    said, labels = np.full(500, np.nan), trial.table.labels
    for known, tested in trial.folds:
        rows = known[np.isfinite(logits[known])]
        slope, intercept = platt(logits[rows], labels[rows])
        said[tested] = expit(slope * logits[tested] + intercept)
    rows = trial.rows[np.isfinite(logits[trial.rows])]
    assert half["brier"]["value"] == pytest.approx(brier_score_loss(labels[rows], said[rows]))


def test_the_calibration_of_whole_responses_is_worse_for_half_a_response(trial: Trial) -> None:
    half, whole = judge_stages(trial, Sample.of(trial.tested, 50))
    assert half["brier"]["value"] < half["brier_final"]["value"] - 0.01
    # Control: for the whole they are about the same.
    assert whole["brier"]["value"] == pytest.approx(whole["brier_final"]["value"], abs=0.01)


def test_a_stage_that_hardly_any_response_reaches_is_absent() -> None:
    table = written_in_parts()
    few = table.prefixes[0.5].take(np.arange(28), 500)  # eight of them long enough
    trial = trial_for(replace(table, prefixes={0.25: few, **table.prefixes}), None)
    assert [stage["fraction"] for stage in judge_stages(trial, Sample.of(trial.tested, 5))] == [0.5, 1.0]


def test_a_store_without_parts_has_no_stages() -> None:
    trial = trial_for(replace(written_in_parts(), prefixes={}), None)
    assert judge_stages(trial, Sample.of(trial.tested, 5)) == []
