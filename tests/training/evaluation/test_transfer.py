"""A probe on another store: judged on what it did not see, told with what moved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_fakes import FAST, SHARE, rows_of_the_store, run
from training_fakes import identity, make_table, write_store

from lapwing_detector.probe import Probe
from lapwing_training.cli import evaluate as cli_evaluate
from lapwing_training.errors import InvalidData, ModelMismatch, NotEnoughData
from lapwing_training.evaluation.transfer import evaluate_probe
from lapwing_training.probe.train import train_probe
from lapwing_training.report import transfer_report
from lapwing_training.statistics.splits import split_by_group
from lapwing_training.store.store import read_store

pytestmark = pytest.mark.usefixtures("few_draws")


def test_a_mode_that_is_not_that_of_the_probe_is_noted(trained: Path, store: Path, tmp_path: Path) -> None:
    assert Probe.from_pretrained(trained).training["mode"] == "generated"
    assert Probe.from_pretrained(trained).metrics["mode"] == "generated"
    supplied = write_store(tmp_path / "supplied", rows_of_the_store(), mode="supplied")
    result = evaluate_probe(trained, supplied, resamples=10)
    assert "only read (supplied)" in result["notes"][0]
    assert "only read (supplied)" in transfer_report(result)
    assert not [note for note in evaluate_probe(trained, store, resamples=10)["notes"] if "read" in note]


def test_another_store_is_judged_without_the_groups_that_were_fitted_on(trained: Path, tmp_path: Path) -> None:
    fresh = make_table(rows=400, planted=(2, 9), strength=0.8, seed=9)
    fresh = replace(fresh, ids=np.char.add("n", fresh.ids), groups=np.char.add("n", fresh.groups))
    result = evaluate_probe(trained, write_store(tmp_path / "fresh", fresh), resamples=100)
    assert result["drift"]["heads"]["tested"] == int(Probe.from_pretrained(trained).selected.sum())
    assert result["drift"]["heads"]["drifted"] == 0
    assert "AUROC" in transfer_report(result)
    assert result["seen_groups_left_out"] == 0
    assert result["test"]["rows"] == 400
    assert result["test"]["auroc"]["low"] > 0.6
    change = result["drift"]["auroc"]["change"]
    assert change["low"] < change["value"] < change["high"]
    assert result["notes"] == []
    assert {"token_count", "log_probability", "log_probability+attention"} <= set(result["comparison"])


def test_on_its_own_store_only_the_tested_rows_remain(trained: Path, store: Path) -> None:
    result = evaluate_probe(trained, store, resamples=100)
    metrics = Probe.from_pretrained(trained).metrics
    assert result["test"]["rows"] == metrics["test"]["rows"]
    assert result["test"]["auroc"]["value"] == pytest.approx(metrics["test"]["auroc"]["value"])
    # They are those of its own report: what they differ by is nothing, and has no interval.
    assert result["drift"]["auroc"]["change"] == {"value": pytest.approx(0.0), "low": None, "high": None}
    assert "judges groups of these rows, too: the change of AUROC has no interval" in result["notes"][0]
    everything = evaluate_probe(trained, store, resamples=100, seen_groups=True)
    assert everything["test"]["rows"] == 400


def test_after_nested_cross_validation_no_group_of_the_store_is_unseen(nested: Path, store: Path) -> None:
    with pytest.raises(NotEnoughData, match="--seen-groups"):
        evaluate_probe(nested, store, resamples=10)


@pytest.fixture
def bare(undrawn: None, trained: Path, tmp_path: Path) -> Path:
    """A probe without its predictions."""
    return Probe.from_pretrained(trained).save_pretrained(tmp_path / "bare")


def test_a_probe_that_does_not_say_what_it_was_fitted_on_is_not_judged_in_silence(bare: Path, store: Path) -> None:
    with pytest.raises(NotEnoughData, match=r"predictions.jsonl is missing, .* --seen-groups"):
        evaluate_probe(bare, store, resamples=20)
    judged = evaluate_probe(bare, store, resamples=20, seen_groups=True)
    assert judged["test"]["rows"] == 400
    assert "heads" not in judged["drift"]
    assert "no drift by head" in judged["notes"][0]


def test_a_probe_of_the_hub_is_judged_without_the_groups_of_its_predictions(
    trained: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def snapshot(repo_id: str, **options: object) -> str:
        asked.append(repo_id)
        return str(trained)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    result = evaluate_probe("me/my-probe", store, resamples=20)
    assert set(asked) == {"me/my-probe"}
    assert result["test"]["rows"] == Probe.from_pretrained(trained).metrics["test"]["rows"]


def test_predictions_that_are_none_are_refused(bare: Path, store: Path) -> None:
    for text in ('{"fold": "out-of-fold"}\n', "[1]\n", "{"):
        (bare / "predictions.jsonl").write_text(text)
        with pytest.raises(InvalidData, match=r"predictions.jsonl: no predictions of lapwing train"):
            evaluate_probe(bare, store, resamples=20)


def test_a_baseline_that_training_did_not_know_points_the_known_way(undrawn: None, store: Path, tmp_path: Path) -> None:
    known = read_store(store).table
    unknown = replace(known, log_probabilities=np.full(400, np.nan))
    train_probe(write_store(tmp_path / "store", unknown), tmp_path / "probe", FAST)
    result = evaluate_probe(tmp_path / "probe", store, resamples=20)
    assert result["comparison"]["log_probability"]["auroc"]["value"] > 0.5
    missing = replace(known, log_probabilities=np.where(np.arange(400) % 2, known.log_probabilities, np.nan))
    result = evaluate_probe(tmp_path / "probe", write_store(tmp_path / "half", missing), resamples=20)
    assert f"> {result['log_probability_missing']} rows have no log-probability" in transfer_report(result)
    assert result["log_probability_missing"] > 0


def test_a_store_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    foreign = write_store(tmp_path / "foreign", make_table(rows=60), identity(weights="9"))
    with pytest.raises(ModelMismatch, match=r"weights cccccccccccc, the store comes from tiny with 999999999999"):
        evaluate_probe(trained, foreign)


def test_a_store_of_seen_groups_only_says_what_to_do(trained: Path, store: Path, tmp_path: Path) -> None:
    table = read_store(store).table
    rows, _ = split_by_group(table, SHARE, FAST.seed)
    with pytest.raises(NotEnoughData, match="--seen-groups"):
        evaluate_probe(trained, write_store(tmp_path / "seen", table.take(rows)))


def test_evaluate_tells_its_notes_apart_from_its_result(bare: Path, store: Path) -> None:
    done = run(cli_evaluate.evaluate, bare, store, "--seen-groups", "--resamples", 5, "--json")
    assert json.loads(done.stdout)["test"]["rows"] == 400
    assert "lapwing evaluate: The probe came without a sample" in done.stderr
    assert run(cli_evaluate.evaluate, bare, store, "--resamples", 0).exit_code == 2
