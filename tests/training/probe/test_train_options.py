"""What is asked of training: commands and options that make sense, rows that are enough."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_fakes import FAST, NESTED, rows_of_the_store, run
from training_fakes import LAPLACIAN, make_table, write_store

from lapwing_detector.probe import Probe
from lapwing_training.cli import train as cli_train
from lapwing_training.errors import InvalidData, InvalidOption, NonFiniteFeatures, NotEnoughData
from lapwing_training.probe import train as train_module
from lapwing_training.probe.train import TrainOptions, name_from, train_probe

pytestmark = pytest.mark.usefixtures("few_draws")


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


def test_the_command_line_says_all_options(trained: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.parent)
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
