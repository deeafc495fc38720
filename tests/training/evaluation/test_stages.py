"""A score while the response is being written: how good it is by then, and what its calibration is set on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score
from training_fakes import LAPLACIAN, make_table, write_store

from lapwing_detector.probe import Probe
from lapwing_training.evaluation.calibrate import platt
from lapwing_training.evaluation.nested import Trial, fit, trial_of
from lapwing_training.evaluation.plan import plan_rows
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.stages import judge_stages, stage_of, stages_elsewhere
from lapwing_training.evaluation.transfer import evaluate_probe, probe_logits
from lapwing_training.probe.train import TrainOptions, train_probe
from lapwing_training.recipes.fit import LapwingRecipe
from lapwing_training.report import transfer_report
from lapwing_training.store.prefix import Prefix
from lapwing_training.store.table import Table

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
    logits = stage_of(trial, 0.5).held_out
    assert np.isnan(logits[:20]).all()
    scored = np.zeros(500)
    for rows, probe in trial.scorers:
        long = rows[rows >= 20]
        scored[rows] += 1
        values = trial.table.prefixes[0.5].features[LAPLACIAN][long - 20].reshape(len(long), 16, 4)[:, [2, 9]]
        weights = probe.weights.reshape(16, 4)[[2, 9]].astype(np.float64)
        np.testing.assert_allclose(logits[long], np.einsum("nhw,hw->n", values, weights) + probe.bias, atol=1e-6)
    assert (scored == 1).all()  # each row by one probe


def test_what_a_fold_knows_of_a_stage_comes_from_probes_that_saw_neither_side(trial: Trial) -> None:
    half = trial.table.prefixes[0.5].features[LAPLACIAN].reshape(480, 16, 4)[:, [2, 9]]
    pairs = zip(trial.known_scorers, stage_of(trial, 0.5).known, trial.folds, strict=True)
    for scorers, logits, (known, tested) in pairs:
        assert np.isnan(logits[tested]).all()
        assert np.isfinite(logits[known[known >= 20]]).all()
        for rows, probe in scorers:  # who saw what is tested where they are fitted
            long = rows[rows >= 20]
            weights = probe.weights.reshape(16, 4)[[2, 9]].astype(np.float64)
            expected = np.einsum("nhw,hw->n", half[long - 20], weights) + probe.bias
            np.testing.assert_allclose(logits[long], expected, atol=1e-6)


def test_half_a_response_is_known_less_well_than_the_whole(trial: Trial) -> None:
    half, whole = judge_stages(trial, Sample.of(trial.tested, 50))
    logits = stage_of(trial, 0.5).held_out
    rows = trial.rows[np.isfinite(logits[trial.rows])]
    labels = trial.table.labels
    assert (half["fraction"], half["rows"]) == (0.5, len(rows))
    assert half["auroc"]["value"] == pytest.approx(roc_auc_score(labels[rows], logits[rows]))
    assert whole["auroc"]["value"] == pytest.approx(roc_auc_score(labels[rows], trial.held_out[rows]))
    assert half["auroc"]["value"] < whole["auroc"]["value"]
    assert whole["fraction"] == 1.0


def test_all_stages_are_judged_on_the_rows_of_the_earliest_and_calibrated_on_all_of_their_own(trial: Trial) -> None:
    quarter = replace(trial.table.prefixes[0.5].take(np.arange(200, 500), 500), rows=np.arange(200, 500))
    staged = replace(trial, table=replace(trial.table, prefixes={0.25: quarter, **trial.table.prefixes}))
    stages = judge_stages(staged, Sample.of(staged.tested, 10))
    judged, labels = trial.rows[trial.rows >= 200], trial.table.labels
    assert [(stage["fraction"], stage["rows"]) for stage in stages] == [(at, len(judged)) for at in (0.25, 0.5, 1.0)]
    for stage, first in zip(stages, (200, 20, 0), strict=True):
        logits = stage_of(staged, stage["fraction"]).held_out
        assert stage["auroc"]["value"] == pytest.approx(roc_auc_score(labels[judged], logits[judged]))
        fitted = trial.plan.fitted[trial.plan.fitted >= first]
        assert (stage["slope"], stage["intercept"]) == pytest.approx(platt(logits[fitted], labels[fitted]))
    # Control: on all its rows the whole is judged otherwise.
    assert stages[-1]["auroc"]["value"] != pytest.approx(roc_auc_score(trial.tested.labels, trial.logits))


@pytest.mark.parametrize("guarantee", [False, True])
def test_the_tokens_of_a_stage_are_those_of_fitted_rows(guarantee: bool) -> None:
    table = written_in_parts()
    plan = plan_rows(table, 0.3, guarantee=guarantee, seed=0)
    fitted = np.isin(np.arange(500), plan.fitted)
    half = table.prefixes[0.5]
    longer = replace(half, response_tokens=np.where(fitted[half.rows], half.response_tokens, 1000))
    tokens = np.where(fitted, table.response_tokens, 1000)
    table = replace(table, response_tokens=tokens, prefixes={0.5: longer})
    trial = trial_of(fit(table.take(plan.fitted), RECIPE, 0), table, plan)
    found = [stage["tokens"] for stage in judge_stages(trial, Sample.of(trial.tested, 5))]
    assert found == [np.median(half.response_tokens[fitted[half.rows]]), np.median(tokens[fitted])]
    # Control: the others would move it.
    assert found[0] < np.median(longer.response_tokens)


def test_the_calibration_of_a_stage_is_platts_on_held_out_logits_of_that_stage(trial: Trial) -> None:
    half, _ = judge_stages(trial, Sample.of(trial.tested, 10))
    stage = stage_of(trial, 0.5)
    logits = stage.held_out
    fitted = trial.plan.fitted[np.isfinite(logits[trial.plan.fitted])]
    expected = platt(logits[fitted], trial.table.labels[fitted])
    assert (half["slope"], half["intercept"]) == pytest.approx(expected)
    # Judged, it is fitted without the fold: in a split the same, in nested folds one for each.
    said, labels = np.full(500, np.nan), trial.table.labels
    for before, (known, tested) in zip(stage.known, trial.folds, strict=True):
        rows = known[np.isfinite(before[known])]
        slope, intercept = platt(before[rows], labels[rows])
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


@pytest.fixture(scope="module")
def transferred(tmp_path_factory: pytest.TempPathFactory) -> tuple[Probe, Table, list[dict[str, Any]]]:
    """A probe with stages, another store of parts, and what evaluate says of them."""
    folder = tmp_path_factory.mktemp("transfer")
    home = make_table(rows=400, planted=(2, 9), strength=1.0, stages=(0.25, 0.5))
    options = TrainOptions(features=(LAPLACIAN,), k=4, heads=2, resamples=20, test_share=0.3)
    probe = train_probe(write_store(folder / "home", home), folder / "probe", options)
    away = make_table(rows=400, planted=(2, 9), strength=1.0, stages=(0.25, 0.6), seed=1)
    away = replace(away, groups=np.char.add("n", away.groups))
    result = evaluate_probe(folder / "probe", write_store(folder / "away", away), resamples=20)
    assert "While the answer is being written" in transfer_report(result)
    plain = replace(away, prefixes={})
    assert evaluate_probe(folder / "probe", write_store(folder / "plain", plain), resamples=5)["stages"] == []
    return probe, away, result["stages"]


def test_on_another_store_every_part_is_judged_on_the_rows_of_the_earliest(transferred: Any) -> None:
    probe, away, stages = transferred
    assert [stage["fraction"] for stage in stages] == [0.25, 0.6, 1.0]
    rows = away.prefixes[0.25].rows
    assert {stage["rows"] for stage in stages} == {len(rows)}
    assert len(rows) < 400
    for stage in stages:
        part, own = (away, np.arange(400)) if stage["fraction"] == 1.0 else away.at_stage(stage["fraction"])
        part = part.take(np.isin(own, rows))
        logits = probe.logit(part.stacked((LAPLACIAN,), 4))
        assert stage["auroc"]["value"] == pytest.approx(roc_auc_score(part.labels, logits))
        assert stage["tokens"] == np.median(part.response_tokens)
    assert stages[0]["auroc"]["value"] < stages[-1]["auroc"]["value"]


def test_there_the_probability_is_the_one_that_is_said_while_so_much_is_written(transferred: Any) -> None:
    probe, away, stages = transferred
    part, rows = away.at_stage(0.6)  # of which the probe knows no stage
    part = part.take(np.isin(rows, away.prefixes[0.25].rows))
    logits = probe.logit(part.stacked((LAPLACIAN,), 4))
    said = [
        probe.running_probability(logit, tokens) for logit, tokens in zip(logits, part.response_tokens, strict=True)
    ]
    assert stages[1]["brier"]["value"] == pytest.approx(brier_score_loss(part.labels, said))
    final = probe.calibration.probabilities(logits)
    assert stages[1]["brier_final"]["value"] == pytest.approx(brier_score_loss(part.labels, final))
    assert stages[1]["brier"]["value"] != pytest.approx(stages[1]["brier_final"]["value"])  # control
    assert stages[2]["brier"] == stages[2]["brier_final"]


def test_there_too_a_part_of_too_few_rows_is_absent(transferred: Any) -> None:
    probe, away, _ = transferred
    few = replace(away, prefixes={0.1: away.prefixes[0.25].take(np.arange(15), 400), 0.6: away.prefixes[0.6]})
    stages = stages_elsewhere(probe, probe_logits, few, Sample.of(few, 5))
    assert [stage["fraction"] for stage in stages] == [0.6, 1.0]
