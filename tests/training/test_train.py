from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, SCORE, identity, make_table, write_store

from lapwing_detector.probe import Probe
from lapwing_training.errors import InvalidData, InvalidOption, ModelMismatch, NotEnoughData
from lapwing_training.metrics import NAMES
from lapwing_training.report import transfer_report
from lapwing_training.splits import split_by_group
from lapwing_training.store import read_store
from lapwing_training.train import TrainOptions, name_from, train_probe
from lapwing_training.transfer import evaluate_probe

FAST = TrainOptions(resamples=100)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = make_table(rows=900, planted=(2, 9), strength=0.8, per_group=2)
    return write_store(tmp_path_factory.mktemp("stores") / "store", table)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probes") / "My Probe"
    train_probe(store, out, FAST)
    return out


def predictions(trained: Path) -> dict[str, dict[str, object]]:
    lines = (trained / "predictions.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def test_the_directory_holds_a_probe_that_verifies(trained: Path) -> None:
    probe = Probe.from_pretrained(trained)
    assert probe.name == "my-probe"
    assert probe.features == (LAPLACIAN,)
    assert probe.k == 4
    assert probe.identity == identity()
    for name in ("report.md", "predictions.jsonl", "README.md", "p_value.png", "selected.png"):
        assert (trained / name).stat().st_size > 0
    for picture in ("p_value.png", "auroc.png", "selected.png"):
        assert f"({picture})" in (trained / "README.md").read_text()


def test_planted_heads_are_read_and_significant(trained: Path) -> None:
    probe = Probe.from_pretrained(trained)
    assert {2, 9} <= set(np.flatnonzero(probe.selected).tolist())
    for feature in (SCORE, LAPLACIAN):
        p_value = probe.statistics[f"{feature}/P_VALUE"].ravel()
        assert p_value[[2, 9]].max() < 1e-4
        assert probe.metrics["significance"][feature]["share_p"] == float((p_value < 0.05).mean())
        assert {f"{feature}/{name}" for name in ("Q_VALUE", "AUROC", "EFFECT_SIZE")} <= probe.statistics.keys()


def test_test_predictions_are_the_saved_probes_own(trained: Path, store: Path) -> None:
    probe, table = Probe.from_pretrained(trained), read_store(store).table
    rows = predictions(trained)
    logits = probe.logit(table.stacked(probe.features, probe.k))
    tested = [row for row, id in enumerate(table.ids) if rows[str(id)]["fold"] == "test"]
    np.testing.assert_allclose([rows[table.ids[row]]["logit"] for row in tested], logits[tested], atol=1e-9)
    said = [rows[table.ids[row]]["probability"] for row in tested]
    np.testing.assert_allclose(said, probe.probability(table.stacked(probe.features, probe.k))[tested], atol=1e-9)
    np.testing.assert_allclose(
        said, expit(probe.calibration.slope * logits[tested] + probe.calibration.intercept), atol=1e-9
    )
    assert probe.metrics["test"]["auroc"]["value"] == pytest.approx(roc_auc_score(table.labels[tested], logits[tested]))


def test_no_group_is_both_fitted_on_and_tested(trained: Path) -> None:
    rows = predictions(trained).values()
    sides = {fold: {row["group"] for row in rows if row["fold"] == fold} for fold in ("out-of-fold", "test")}
    assert sides["test"]
    assert not sides["test"] & sides["out-of-fold"]


def test_everything_it_must_beat_stands_beside_it(trained: Path) -> None:
    metrics = Probe.from_pretrained(trained).metrics
    both = f"{SCORE}+{LAPLACIAN}"
    assert set(metrics["comparison"]) == {
        *(f"lapwing/{features}" for features in (LAPLACIAN, SCORE, both)),
        f"paper/{LAPLACIAN}",
        *("token_count", "log_probability", "summed_attention_score", "log_probability+attention"),
        *("random_heads", "all_heads", "shuffled_labels"),
    }
    for row in (metrics["test"], *metrics["comparison"].values()):
        for name in NAMES:
            assert row[name]["low"] <= row[name]["high"]
        assert sorted(row["within"]["strata"]) == ["r0", "r1", "r2"]
    comparison = metrics["comparison"]
    assert comparison[metrics["probe"]]["auroc"] == metrics["test"]["auroc"]
    assert comparison["random_heads"]["auroc"]["value"] < metrics["test"]["auroc"]["value"]
    shuffled = comparison["shuffled_labels"]["auroc"]
    assert shuffled["low"] <= 0.5 <= shuffled["high"]
    report = (trained / "report.md").read_text()
    for title in ("length only", "mean token log-probability", "random heads", "shuffled labels", "paper: Laplacian"):
        assert title in report


def test_training_never_looks_at_tested_rows(store: Path, trained: Path, tmp_path: Path) -> None:
    table = read_store(store).table
    _, tested = split_by_group(table, FAST.test_share, FAST.seed)
    labels = table.labels.copy()
    labels[tested] = 1 - labels[tested]
    for values in table.features.values():
        values[tested] *= -3.0
    train_probe(write_store(tmp_path / "other", table.with_labels(labels)), tmp_path / "probe", FAST)
    first, second = Probe.from_pretrained(trained), Probe.from_pretrained(tmp_path / "probe")
    np.testing.assert_array_equal(first.weights, second.weights)
    assert (first.bias, first.calibration) == (second.bias, second.calibration)
    assert [point.logit for point in first.thresholds] == [point.logit for point in second.thresholds]
    for name, values in first.statistics.items():
        np.testing.assert_array_equal(values, second.statistics[name])


def test_the_same_store_and_seed_give_the_same_bytes(store: Path, trained: Path, tmp_path: Path) -> None:
    train_probe(store, tmp_path / "My Probe", FAST)
    for path in trained.iterdir():
        assert path.read_bytes() == (tmp_path / "My Probe" / path.name).read_bytes(), path.name


def test_the_paper_recipe_reads_all_heads(store: Path, tmp_path: Path) -> None:
    probe = train_probe(store, tmp_path / "paper", replace(FAST, recipe="paper"))
    assert probe.selected.all()
    assert probe.metrics["probe"] == f"paper/{LAPLACIAN}"
    assert "random_heads" not in probe.metrics["comparison"]  # all heads are all heads


def test_noise_gives_a_probe_that_says_so(tmp_path: Path) -> None:
    table = make_table(rows=200, seed=1)
    unknown = replace(table, log_probabilities=np.full(200, np.nan), strata=np.full(200, "", dtype=np.str_))
    probe = train_probe(write_store(tmp_path / "store", unknown), tmp_path / "noise", FAST)
    notes = " ".join(probe.metrics["notes"])
    assert "No head separates the classes" in notes
    assert "No threshold at 1%: " in notes
    assert "no log-probability" in notes
    assert "paired" not in probe.metrics
    assert [point.false_positive_rate for point in probe.thresholds] == [0.05, 0.1]
    assert "> No head separates" in (tmp_path / "noise" / "README.md").read_text()


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughData):
        train_probe(write_store(tmp_path / "store", make_table(rows=12)), tmp_path / "probe", FAST)
    assert not (tmp_path / "probe").exists()


def test_a_place_or_name_that_can_not_be_is_refused_before_the_fit(store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for options, out, says in (
        (FAST, tmp_path, "exists and is no probe directory"),
        (FAST, tmp_path / "thesis.txt", "exists and is no probe directory"),
        (replace(FAST, name="My Probe"), tmp_path / "probe", r"`My Probe`; .* such as my-probe"),
    ):
        with pytest.raises(InvalidOption, match=says):
            train_probe(store, out, options)


def test_names_come_from_directories() -> None:
    assert name_from(Path("/x/My Probe_2")) == "my-probe-2"
    with pytest.raises(InvalidOption, match="--name"):
        name_from(Path("/x/东京"))


def test_another_store_is_judged_without_the_groups_that_were_fitted_on(trained: Path, tmp_path: Path) -> None:
    fresh = make_table(rows=400, planted=(2, 9), strength=0.8, seed=9)
    fresh = replace(fresh, ids=np.char.add("n", fresh.ids), groups=np.char.add("n", fresh.groups))
    result = evaluate_probe(trained, write_store(tmp_path / "fresh", fresh), resamples=100)
    assert result["seen_groups_left_out"] == 0
    assert result["test"]["rows"] == 400
    assert result["test"]["auroc"]["low"] > 0.6
    assert {"token_count", "log_probability", "log_probability+attention"} <= set(result["comparison"])


def test_on_its_own_store_only_the_tested_rows_remain(trained: Path, store: Path) -> None:
    result = evaluate_probe(trained, store, resamples=100)
    metrics = Probe.from_pretrained(trained).metrics
    assert result["test"]["rows"] == metrics["test"]["rows"]
    assert result["test"]["auroc"]["value"] == pytest.approx(metrics["test"]["auroc"]["value"])
    everything = evaluate_probe(trained, store, resamples=100, seen_groups=True)
    assert everything["test"]["rows"] == 900


def without_predictions(trained: Path, directory: Path) -> Path:
    return Probe.from_pretrained(trained).save_pretrained(directory)


def test_a_probe_that_does_not_say_what_it_was_fitted_on_is_not_judged_in_silence(
    trained: Path, store: Path, tmp_path: Path
) -> None:
    bare = without_predictions(trained, tmp_path / "bare")
    with pytest.raises(NotEnoughData, match=r"predictions.jsonl is missing, .* --seen-groups"):
        evaluate_probe(bare, store, resamples=20)
    assert evaluate_probe(bare, store, resamples=20, seen_groups=True)["test"]["rows"] == 900


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


def test_predictions_that_are_none_are_refused(trained: Path, store: Path, tmp_path: Path) -> None:
    bare = without_predictions(trained, tmp_path / "bare")
    for text in ('{"fold": "out-of-fold"}\n', "[1]\n", "{"):
        (bare / "predictions.jsonl").write_text(text)
        with pytest.raises(InvalidData, match=r"predictions.jsonl: no predictions of lapwing train"):
            evaluate_probe(bare, store, resamples=20)


def test_a_baseline_that_training_did_not_know_points_the_known_way(store: Path, tmp_path: Path) -> None:
    known = read_store(store).table
    unknown = replace(known, log_probabilities=np.full(900, np.nan))
    train_probe(write_store(tmp_path / "store", unknown), tmp_path / "probe", FAST)
    result = evaluate_probe(tmp_path / "probe", store, resamples=20)
    assert result["comparison"]["log_probability"]["auroc"]["value"] > 0.5
    missing = replace(known, log_probabilities=np.where(np.arange(900) % 2, known.log_probabilities, np.nan))
    result = evaluate_probe(tmp_path / "probe", write_store(tmp_path / "half", missing), resamples=20)
    assert f"> {result['log_probability_missing']} rows have no log-probability" in transfer_report(result)
    assert result["log_probability_missing"] > 0


def test_a_store_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    foreign = write_store(tmp_path / "foreign", make_table(rows=60), identity(weights="9"))
    with pytest.raises(ModelMismatch, match=r"weights cccccccccccc, the store comes from tiny with 999999999999"):
        evaluate_probe(trained, foreign)


def test_a_store_of_seen_groups_only_says_what_to_do(trained: Path, store: Path, tmp_path: Path) -> None:
    table = read_store(store).table
    rows, _ = split_by_group(table, FAST.test_share, FAST.seed)
    with pytest.raises(NotEnoughData, match="--seen-groups"):
        evaluate_probe(trained, write_store(tmp_path / "seen", table.take(rows)))
