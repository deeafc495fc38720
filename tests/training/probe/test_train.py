"""What training leaves: a probe that verifies, and numbers that are of rows that it did not see."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score
from train_fakes import FAST, NESTED, SHARE, predictions, rows_of_the_store
from training_fakes import LAPLACIAN, SCORE, identity, make_table, write_store

from lapwing_detector.probe import Probe
from lapwing_training.evaluation.drift import REFERENCE
from lapwing_training.probe.train import train_probe
from lapwing_training.statistics.metrics import NAMES
from lapwing_training.statistics.selection import rank_heads
from lapwing_training.statistics.splits import split_by_group
from lapwing_training.store.store import read_items, read_store

pytestmark = pytest.mark.usefixtures("few_draws")


def test_the_directory_holds_a_probe_that_verifies(trained: Path) -> None:
    probe = Probe.from_pretrained(trained)
    assert probe.name == "my-probe"
    assert probe.features == (LAPLACIAN,)
    assert probe.k == 4
    assert probe.identity == identity()
    for name in (
        "report.md",
        "report.html",
        "predictions.jsonl",
        "README.md",
        "p_value.png",
        "selected.png",
        REFERENCE,
    ):
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
        names = ("Q_VALUE", "AUROC", "EFFECT_SIZE", "HEAD_PROBE")
        assert {f"{feature}/{name}" for name in names} <= probe.statistics.keys()
        alone = probe.statistics[f"{feature}/HEAD_PROBE"].ravel()
        assert set(np.argsort(alone)[-2:].tolist()) == {2, 9}


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


def test_training_never_looks_at_tested_rows(undrawn: None, trained: Path, tmp_path: Path) -> None:
    table = rows_of_the_store()
    _, tested = split_by_group(table, SHARE, FAST.seed)
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


def test_the_same_store_and_seed_give_the_same_bytes_wherever_they_lie(
    store: Path, nested: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(store, tmp_path / "store")
    train_probe(elsewhere, tmp_path / "nested", replace(NESTED, guarantee=True))
    for path in nested.iterdir():
        assert path.read_bytes() == (tmp_path / "nested" / path.name).read_bytes(), path.name


def test_nested_is_the_default_and_all_rows_are_judged_out_of_fold(nested: Path) -> None:
    probe, rows = Probe.from_pretrained(nested), list(predictions(nested).values())
    metrics = probe.metrics
    assert metrics["protocol"] == probe.training["protocol"] == "nested"
    held_out = [row for row in rows if row["fold"] == "out-of-fold"]
    assert metrics["test"]["rows"] == len(held_out)
    labels, logits, said = ([row[name] for row in held_out] for name in ("label", "logit", "probability"))
    assert metrics["test"]["auroc"]["value"] == pytest.approx(roc_auc_score(labels, logits))
    assert metrics["test"]["brier"]["value"] == pytest.approx(brier_score_loss(labels, said))
    assert {row["outer_fold"] for row in held_out} == set(range(5))
    assert metrics["comparison"]["shuffled_labels"]["draws"] == 2
    assert "2 times only" in " ".join(metrics["notes"])


def test_a_guarantee_is_what_the_saved_probe_says_of_groups_that_were_set_apart(nested: Path, store: Path) -> None:
    probe, table, rows = Probe.from_pretrained(nested), read_store(store).table, predictions(nested)
    apart = [row for row, id in enumerate(table.ids) if rows[str(id)]["fold"] == "calibration"]
    assert 0.15 < len(apart) / 400 < 0.25
    logits = probe.logit(table.stacked(probe.features, probe.k))[apart]
    np.testing.assert_allclose([rows[str(id)]["logit"] for id in table.ids[apart]], logits, atol=1e-6)
    groups = table.groups[apart][table.labels[apart] == 0]
    guarantee = probe.metrics["guarantee"]
    assert guarantee["calibration_groups"] == len(set(table.groups[apart]))
    assert [point.logit for point in probe.thresholds] == [
        entry["logit"] for entry in guarantee["rates"] if entry["logit"] is not None
    ]
    for entry in guarantee["rates"]:
        assert entry["negatives"] == len(set(groups))
    # Beside it stands the out-of-fold rule.
    assert [entry["logit"] for entry in probe.metrics["thresholds"]] != [entry["logit"] for entry in guarantee["rates"]]


def test_what_the_report_draws_is_that_of_scikit_learn(nested: Path) -> None:
    metrics = Probe.from_pretrained(nested).metrics
    held_out = [row for row in predictions(nested).values() if row["fold"] == "out-of-fold"]
    labels, logits, said = (np.array([row[name] for row in held_out]) for name in ("label", "logit", "probability"))
    curve = metrics["roc"]
    assert len(curve["false_positive_rate"]) <= 200
    area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
    assert area == pytest.approx(roc_auc_score(labels, logits), abs=0.005)  # 200 of some 300 points
    assert curve["false_positive_rate"][0] == 0.0
    assert curve["true_positive_rate"][-1] == 1.0
    assert metrics["pr"]["recall"] == sorted(metrics["pr"]["recall"])
    assert len(metrics["pr"]["recall"]) <= 200
    bars = metrics["histogram"]
    assert sum(bars["hallucinated"]) == labels.sum()
    assert bars["other"] == np.histogram(said[labels == 0], bars["edges"])[0].tolist()
    assert metrics["calibration"]["kind"] == "platt"
    assert "isotonic needs 1000" in metrics["calibration"]["reason"]


def test_the_worst_examples_are_the_surest_mistakes(nested: Path, store: Path) -> None:
    found = Probe.from_pretrained(nested).metrics["examples"]
    rows = [row for row in predictions(nested).values() if row["fold"] == "out-of-fold"]
    texts = read_items(store)
    for side, label, sign in (("missed", 1, 1), ("false_alarms", 0, -1)):
        mine = [row for row in rows if row["label"] == label]
        expected = sorted(mine, key=lambda row: (sign * row["probability"], sign * row["logit"]))[:10]
        assert {one["id"] for one in found[side]} == {row["id"] for row in expected}
        said = [sign * one["probability"] for one in found[side]]
        assert said == sorted(said)
        for one in found[side]:
            assert one["response"] == texts[one["id"]].response
            assert one["tokens"] is one["contributions"] is None


def test_the_paper_reads_all_heads_and_stages_of_the_store_become_the_probes(undrawn: None, tmp_path: Path) -> None:
    table = make_table(rows=300, planted=(2, 9), strength=1.0, stages=(0.25, 0.5))
    out = tmp_path / "probe"
    train_probe(write_store(tmp_path / "store", table), out, replace(FAST, recipe="paper", k=2))
    probe = Probe.from_pretrained(out)
    assert probe.selected.all()
    assert probe.metrics["probe"] == f"paper/{LAPLACIAN}"
    for of_a_selection in ("random_heads", "all_heads"):
        assert of_a_selection not in probe.metrics["comparison"]
    assert "curve" not in probe.metrics
    assert "against_paper" not in probe.metrics
    listed = probe.metrics["stages"]
    assert [stage["fraction"] for stage in listed] == [0.25, 0.5, 1.0]
    assert [stage.fraction for stage in probe.stages] == [0.25, 0.5]
    for kept, stage in zip(probe.stages, listed, strict=False):
        assert vars(kept) == {name: stage[name] for name in ("fraction", "tokens", "slope", "intercept")}
    assert listed[0]["auroc"]["value"] < listed[-1]["auroc"]["value"]


def test_noise_gives_a_probe_that_says_so(undrawn: None, tmp_path: Path) -> None:
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


def test_how_often_heads_were_selected_is_kept_where_groups_were_resampled(
    undrawn: None, trained: Path, store: Path, tmp_path: Path
) -> None:
    probe = train_probe(store, tmp_path / "stable", replace(FAST, selection="stability", k=4))
    table = read_store(store).table
    rows, _ = split_by_group(table, SHARE, FAST.seed)
    fitted = table.take(rows)
    expected = rank_heads(fitted.scalars((LAPLACIAN,), 4), fitted.labels, fitted.groups, "stability", FAST.seed)
    found = probe.metrics["stability"]
    np.testing.assert_array_equal(np.array(found["frequency"]).ravel(), expected.frequency)
    assert np.array(found["frequency"]).shape == (4, 4)
    assert found["resamples"] == 200
    assert (np.array(found["frequency"])[probe.selected] >= 0.5).all()
    assert "Selection frequencies" not in (trained / "report.md").read_text()  # no heading hides a table in Markdown
    assert "| layer 0 head 2 | 100.0% | yes |" in (tmp_path / "stable" / "report.md").read_text()
    # Control: where nothing is resampled there is nothing to keep.
    assert "stability" not in Probe.from_pretrained(trained).metrics
