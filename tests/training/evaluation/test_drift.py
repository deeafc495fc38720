"""What moved from one store to another is found, and what did not move is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from training_fakes import LAPLACIAN, SCORE, identity, make_table, write_store

from lapwing_detector.calibration import Calibration
from lapwing_detector.probe import Probe, Threshold
from lapwing_training.errors import InvalidData
from lapwing_training.evaluation.drift import REFERENCE, Reference, drift_of, independent_rows, selected_scalars
from lapwing_training.evaluation.notes import mode_note
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.scores import Scores
from lapwing_training.evaluation.transfer import evaluate_probe, probe_logits
from lapwing_training.store.store import read_store
from lapwing_training.store.table import Table

SELECTED = (1, 2, 5, 9, 14)


def probe(features: tuple[str, ...] = (LAPLACIAN,), slope: float = 1.0) -> Probe:
    """Reads five heads of sixteen; head 2 and 9 with the same weight, the others with a small one."""
    selected = np.zeros(16, dtype=bool)
    selected[list(SELECTED)] = True
    width = 4 * (LAPLACIAN in features) + (SCORE in features)
    weights = np.zeros((16, width), dtype=np.float32)
    weights[list(SELECTED)] = 0.1
    weights[[2, 9]] = 2.0
    return Probe(
        name="probe",
        features=features,
        k=4,
        layers=(0, 1, 2, 5),
        weights=weights.reshape(4, 4, width),
        bias=0.0,
        selected=selected.reshape(4, 4),
        calibration=Calibration(slope, 0.0),
        thresholds=(),
        identity=identity(),
        metrics={"test": {"base_rate": 0.4, "auroc": {"value": 0.8, "low": 0.77, "high": 0.83}}},
    )


def with_head_moved(table: Table, head: int, by: float) -> Table:
    values = table.features[LAPLACIAN].reshape(len(table), 16, 4).copy()
    values[:, head] += by
    return replace(table, features={**table.features, LAPLACIAN: values.reshape(table.features[LAPLACIAN].shape)})


def found(
    fitted: Probe, before: Table, here: Table, resamples: int = 50, seen_groups: bool = False
) -> dict[str, object]:
    logits = probe_logits(fitted, here)
    scores = Scores(logits, fitted.calibration.probabilities(logits), {}, None)
    sample = Sample.of(here, resamples)
    result = drift_of(fitted, Reference.of(fitted, before, 0), here, sample, scores, seed=0, seen_groups=seen_groups)
    json.dumps(result, allow_nan=False)
    return result


def test_a_head_that_moved_is_named_and_no_other() -> None:
    before, here = (make_table(rows=800, seed=seed) for seed in (0, 1))
    heads = found(probe(), before, with_head_moved(here, 9, by=0.05))["heads"]  # half a standard deviation
    assert (heads["tested"], heads["drifted"]) == (5, 1)
    first, *others = heads["list"]
    assert (first["layer"], first["head"]) == (2, 1)  # flat 9 is row 2, of layer 2
    assert first["q_value"] < 1e-6
    assert min(one["q_value"] for one in others) > 0.05


def test_control_a_head_that_the_probe_does_not_read_may_move() -> None:
    before, here = (make_table(rows=800, seed=seed) for seed in (0, 1))
    assert found(probe(), before, with_head_moved(here, 0, by=0.05))["heads"]["drifted"] == 0


def test_the_test_is_scipys_one_head_at_a_time() -> None:
    fitted = probe((SCORE, LAPLACIAN))
    before, here = make_table(rows=300, seed=0), make_table(rows=200, planted=(5,), seed=1)
    heads = found(fitted, before, here)["heads"]["list"]
    p_values = {}
    for name in (SCORE, LAPLACIAN):
        first, second = (table.scalars((name,), 4).reshape(len(table), 16) for table in (before, here))
        for head in SELECTED:
            result = stats.ks_2samp(
                first[:, head].astype(np.float32), second[:, head].astype(np.float32), method="asymp"
            )
            p_values[name, fitted.layers[head // 4], head % 4] = result.pvalue
    q_values = dict(zip(p_values, stats.false_discovery_control(list(p_values.values())), strict=True))
    assert len(heads) == 10
    for one in heads:
        key = (one["feature"], one["layer"], one["head"])
        assert one["p_value"] == pytest.approx(p_values[key])
        assert one["q_value"] == pytest.approx(q_values[key])


def test_rows_of_one_group_count_once() -> None:
    groups = np.repeat(np.arange(50), 4)
    rows = independent_rows(groups, 1000, seed=0)
    assert sorted(groups[rows].tolist()) == list(range(50))
    assert len(set((rows % 4).tolist())) == 4  # not always the first
    assert len(independent_rows(groups, 20, seed=0)) == 20


def false_alarms(rows_of_a_group: int, by_group: bool) -> float:
    """Share of null comparisons below p = .05 when the rows of a group are nearly the same."""
    hits = []
    for seed in range(60):
        sides = [
            make_table(rows=200, layers=1, heads=1, per_group=rows_of_a_group, group_effect=0.95, seed=2 * seed + side)
            for side in (0, 1)
        ]
        scalars = [side.scalars((SCORE,), 1).ravel() for side in sides]
        if by_group:
            scalars = [
                values[independent_rows(side.groups, 1000, seed)] for values, side in zip(scalars, sides, strict=True)
            ]
        hits.append(stats.ks_2samp(*scalars, method="asymp").pvalue < 0.05)
    return float(np.mean(hits))


def test_under_the_null_groups_raise_no_more_alarms_than_promised_and_plain_rows_do() -> None:
    # 60 comparisons: a standard error of .028.
    assert false_alarms(4, by_group=True) < 0.05 + 3 * 0.028
    assert false_alarms(4, by_group=False) > 0.2


def test_longer_answers_are_seen() -> None:
    before, here = (make_table(rows=400, seed=seed) for seed in (0, 1))
    same = found(probe(), before, here)["length"]
    longer = found(probe(), before, replace(here, token_counts=here.token_counts + 5))["length"]
    assert same["p_value"] > 0.01
    assert longer["p_value"] < 1e-6
    assert longer["median_here"] == same["median_here"] + 5


def test_a_calibration_that_no_longer_fits_is_fitted_anew() -> None:
    before, here = (make_table(rows=1500, planted=(2, 9), strength=1.0, seed=seed) for seed in (0, 1))
    right = found(probe(), before, here)["calibration"]["here"]
    shift = found(probe(slope=4.0 * right["slope"]), before, here)["calibration"]
    assert shift["before"]["slope"] == 4.0 * right["slope"]
    assert shift["here"] == right
    assert shift["ece_here"]["high"] < shift["ece_before"]["low"]


def test_the_auroc_is_held_against_the_probes_own() -> None:
    before, here = make_table(rows=800, seed=0), make_table(rows=800, seed=1)  # nothing planted: .5
    change = found(probe(), before, here)["auroc"]
    assert change["before"]["value"] == 0.8
    assert change["change"]["value"] == pytest.approx(change["here"]["value"] - 0.8)
    assert change["change"]["high"] < 0.0
    wide = change["change"]["high"] - change["change"]["low"]
    assert wide > change["here"]["high"] - change["here"]["low"]  # the error of the first counts, too


def test_the_change_of_auroc_has_no_interval_where_its_error_is_unknown() -> None:
    before, here = make_table(rows=200, seed=0), make_table(rows=200, seed=1)
    no_interval = {"base_rate": 0.4, "auroc": {"value": 0.8, "low": None, "high": None}}
    known = found(probe(), before, here)["auroc"]
    for unknown in (
        found(probe(), before, here, seen_groups=True)["auroc"],  # rows may be the same
        found(replace(probe(), metrics={"test": no_interval}), before, here)["auroc"],
        without_interval_here(probe(), here),
    ):
        assert unknown["change"] == {"value": known["change"]["value"], "low": None, "high": None}
    assert known["change"]["low"] < known["change"]["value"] < known["change"]["high"]  # control


def without_interval_here(fitted: Probe, here: Table) -> dict[str, Any]:
    """The change of AUROC where no resample tells how sure that of this store is."""
    sample = Sample.of(here, 50)
    alone = replace(sample, weights=sample.weights[:1])
    logits = probe_logits(fitted, here)
    scores = Scores(logits, fitted.calibration.probabilities(logits), {}, None)
    found = drift_of(fitted, None, here, alone, scores, seed=0)["auroc"]
    assert found["here"]["low"] is None
    return dict(found)


def test_a_guarantee_is_counted_by_group_on_another_store_too(tmp_path: Path) -> None:
    table = make_table(rows=120, seed=3)
    sizes = [1] * 20 + [5] * 20
    table = replace(table, groups=np.repeat([f"g{number}" for number in range(40)], sizes).astype(table.groups.dtype))
    here = write_store(tmp_path / "here", table)
    limit = float(np.median(probe_logits(probe(), table)))
    rates = {}
    for guaranteed in (False, True):
        fitted = replace(
            probe(),
            layers=(0, 1, 2, 3),
            thresholds=(Threshold(0.05, limit, None, 90),),
            training={"guarantee": guaranteed},
            metrics={},
        )
        directory = tmp_path / f"probe-{guaranteed}"
        fitted.save_pretrained(directory)
        [entry] = evaluate_probe(directory, here, resamples=20, seen_groups=True)["thresholds"]
        rates[guaranteed] = entry["realised_rate"]
    negatives = read_store(here).table.labelled()
    negatives = negatives.take(negatives.labels == 0)
    flagged = probe_logits(probe(), negatives) > limit
    by_group = [flagged[negatives.groups == group].mean() for group in np.unique(negatives.groups)]
    assert rates[False] == pytest.approx(flagged.mean())
    assert rates[True] == pytest.approx(np.mean(by_group))
    assert abs(rates[True] - rates[False]) > 0.005  # control: they differ


def test_the_reference_comes_back_from_its_file(tmp_path: Path) -> None:
    reference = Reference.of(probe((SCORE, LAPLACIAN)), make_table(rows=60, per_group=2), seed=0)
    assert reference.scalars.shape == (30, 2, 5)
    assert Reference.load(tmp_path) is None
    (tmp_path / REFERENCE).write_bytes(reference.to_bytes())
    again = Reference.load(tmp_path)
    assert again is not None
    np.testing.assert_array_equal(again.scalars, reference.scalars)
    np.testing.assert_array_equal(again.token_counts, reference.token_counts)
    for damage in (b"", b"{}", reference.to_bytes()[:-1]):
        (tmp_path / REFERENCE).write_bytes(damage)
        with pytest.raises(InvalidData, match=r"reference.safetensors: not as lapwing train writes it"):
            Reference.load(tmp_path)


def test_scalars_are_those_of_the_heads_in_their_order() -> None:
    table = make_table(rows=20)
    values = table.features[LAPLACIAN].reshape(20, 16, 4).mean(axis=-1)
    np.testing.assert_allclose(selected_scalars(probe(), table)[:, 0], values[:, list(SELECTED)], atol=1e-6)


def test_a_probe_of_generated_texts_warns_of_supplied_ones_and_the_other_way_round() -> None:
    assert "only read" in mode_note("generated", "supplied")[0]
    assert "wrote itself" in mode_note("supplied", "generated")[0]
    for same in (("generated", "generated"), ("unknown", "supplied"), (None, "generated"), ("supplied", "unknown")):
        assert mode_note(*same) == []
