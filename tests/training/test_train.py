from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score
from training_fakes import LAPLACIAN, SCORE, identity, make_table, write_store
from typer.testing import CliRunner, Result

from lapwing_detector import probe_files
from lapwing_detector.probe import Probe
from lapwing_training import baselines
from lapwing_training import train as train_module
from lapwing_training.cli import evaluate as cli_evaluate
from lapwing_training.cli import train as cli_train
from lapwing_training.drift import REFERENCE
from lapwing_training.errors import InvalidData, InvalidOption, ModelMismatch, NonFiniteFeatures, NotEnoughData
from lapwing_training.metrics import NAMES
from lapwing_training.report import transfer_report
from lapwing_training.splits import split_by_group
from lapwing_training.store import read_items, read_store
from lapwing_training.table import Table
from lapwing_training.train import TrainOptions, name_from, train_probe
from lapwing_training.transfer import evaluate_probe

NESTED = TrainOptions(features=(LAPLACIAN,), resamples=50)
SHARE = 0.35
FAST = replace(NESTED, test_share=SHARE)


def rows_of_the_store() -> Table:
    return make_table(rows=400, planted=(2, 9), strength=0.8, per_group=2)


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    """Each is a fit of its own; how often controls are drawn is of no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SHUFFLES", "RANDOM_DRAWS", "NESTED_DRAWS"):
            patch.setattr(baselines, name, 2)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than fitting, for tests that look at numbers only."""
    monkeypatch.setattr(train_module, "html_report", lambda probe: "")
    monkeypatch.setattr(probe_files, "card_pictures", lambda probe: {})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "store", rows_of_the_store())


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged on a fixed split."""
    out = tmp_path_factory.mktemp("probes") / "My Probe"
    train_probe(store, out, FAST)
    return out


@pytest.fixture(scope="module")
def nested(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged by nested cross-validation, with a guarantee."""
    out = tmp_path_factory.mktemp("probes") / "nested"
    train_probe(store, out, replace(NESTED, guarantee=True))
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


def test_the_command_makes_the_same_options(nested: Path) -> None:
    probe = Probe.from_pretrained(nested)
    assert (
        probe.metrics["command"]
        == probe.training["command"]
        == (
            "lapwing train store --out nested --recipe lapwing --selection fdr "
            f"--features {LAPLACIAN} --resamples 50 --seed 0 --guarantee"
        )
    )
    odd = TrainOptions(recipe="paper", k=5, heads=None, test_share=0.3, name="x").command(Path("a b"), Path("x/c"))
    assert odd == (
        "lapwing train 'a b' --out c --recipe paper --k 5 --test-share 0.3 --name x --resamples 1000 --seed 0"
    )


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


def test_a_group_on_both_sides_of_the_given_split_is_refused(tmp_path: Path) -> None:
    table = rows_of_the_store()
    splits = np.where(np.arange(400) < 101, "test", "train")
    with pytest.raises(InvalidData, match="group `g50`"):
        train_probe(write_store(tmp_path / "store", replace(table, splits=splits)), tmp_path / "probe", FAST)
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize(("label", "says"), [(1, r"400 hallucinated \(1\) and 0 other"), (0, "0 hal"), (-1, "0 hal")])
def test_one_class_or_none_is_refused(tmp_path: Path, label: int, says: str) -> None:
    table = rows_of_the_store()
    alone = write_store(tmp_path / "store", table.with_labels(np.full(400, label)))
    with pytest.raises(NotEnoughData, match=says):
        train_probe(alone, tmp_path / "probe", NESTED)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    table = rows_of_the_store()
    table.features[LAPLACIAN][7, 1, 2, 0] = np.nan
    with pytest.raises(NonFiniteFeatures, match="of item `q7`"):
        train_probe(write_store(tmp_path / "store", table), tmp_path / "probe", NESTED)


def test_a_mode_that_is_not_that_of_the_probe_is_noted(trained: Path, store: Path, tmp_path: Path) -> None:
    assert Probe.from_pretrained(trained).training["mode"] == "generated"
    assert Probe.from_pretrained(trained).metrics["mode"] == "generated"
    supplied = write_store(tmp_path / "supplied", rows_of_the_store(), mode="supplied")
    result = evaluate_probe(trained, supplied, resamples=10)
    assert "only read (supplied)" in result["notes"][0]
    assert "only read (supplied)" in transfer_report(result)
    assert not [note for note in evaluate_probe(trained, store, resamples=10)["notes"] if "read" in note]


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


def run(verb: Callable[..., None], *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_says_all_options(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(store: Path, out: Path, options: TrainOptions, language_model: object) -> Probe:
        asked.append((store, out, options, language_model))
        return Probe.from_pretrained(trained)

    monkeypatch.setattr(train_module, "train_probe", spy)
    words = "store --out probe --recipe lapwing --selection l1 --features sink_scores --k 3 --heads 5 --test-share 0.3"
    done = run(
        cli_train.train, *words.split(), *["--guarantee", "--resamples", "7", "--seed", "2", "--name", "x", "--json"]
    )
    assert json.loads(done.stdout)["metrics"]["protocol"] == "split"
    options = TrainOptions(
        recipe="lapwing",
        features=("sink_scores.v1",),
        k=3,
        seed=2,
        test_share=0.3,
        name="x",
        resamples=7,
        selection="l1",
        heads=5,
        guarantee=True,
    )
    assert run(cli_train.train, "store", "--out", "probe").exit_code == 0
    places = (Path("store"), Path("probe"))
    assert asked == [(*places, options, None), (*places, TrainOptions(), None)]
    # What a probe says of its making leads to the same options.
    again = shlex.split(options.command(*places))[2:]
    run(cli_train.train, *again)
    assert asked[2] == asked[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--resamples 0", "resamples is 0"),
        ("--selection magic", "selection is `magic`"),
        ("--recipe magic", "recipe is `magic`"),
        ("--recipe paper --selection l1", "selects no heads"),
        ("--test-share 1.5", "test share is 1.5"),
        ("--heads -1", "heads is -1"),
        ("--k 9", "k is 9"),
        ("--seed -1", "seed is -1"),
        ("--features ,", "features is empty"),
        ("--features sink_scores", "the store holds"),
    ],
)
def test_an_option_that_makes_no_sense_is_status_2(store: Path, tmp_path: Path, words: str, says: str) -> None:
    done = run(cli_train.train, store, "--out", tmp_path / "probe", *words.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr
    assert not (tmp_path / "probe").exists()


def test_evaluate_tells_its_notes_apart_from_its_result(bare: Path, store: Path) -> None:
    done = run(cli_evaluate.evaluate, bare, store, "--seen-groups", "--resamples", 5, "--json")
    assert json.loads(done.stdout)["test"]["rows"] == 400
    assert "lapwing evaluate: The probe came without a sample" in done.stderr
    assert run(cli_evaluate.evaluate, bare, store, "--resamples", 0).exit_code == 2
