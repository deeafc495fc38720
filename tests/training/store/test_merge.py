"""Stores of several machines become one, or are refused with what tells them apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from training_fakes import LAPLACIAN, SCORE, identity, make_table, write_store
from typer.testing import CliRunner, Result

from lapwing_detector.language_model import LanguageModel
from lapwing_training.cli.inspect import inspect
from lapwing_training.cli.merge import merge
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import InvalidOption, StoreCorrupt, StoreMismatch
from lapwing_training.files import copy_atomically
from lapwing_training.store import merge as merge_module
from lapwing_training.store.extract import ExtractOptions, extract_features
from lapwing_training.store.merge import merge_stores
from lapwing_training.store.shards import WHOLE, shard_paths
from lapwing_training.store.store import read_items, read_store
from lapwing_training.store.table import Table

BOTH = (SCORE, LAPLACIAN)


@pytest.fixture(scope="module")
def whole() -> Table:
    return make_table(rows=90, stages=(0.5,))


@pytest.fixture
def parts(whole: Table, tmp_path: Path) -> list[Path]:
    """The same rows on three machines."""
    pieces = (np.arange(20), np.arange(20, 65), np.arange(65, 90))
    return [
        write_store(tmp_path / f"part{number}", whole.take(rows), shard_rows=20) for number, rows in enumerate(pieces)
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_stores_that_are_put_together_hold_the_rows_of_all(whole: Table, parts: list[Path], tmp_path: Path) -> None:
    told = merge_stores(parts, tmp_path / "all")
    assert (told["items"], told["labelled"]) == (90, 90)
    merged = read_store(tmp_path / "all")
    assert merged.table.ids.tolist() == whole.ids.tolist()
    assert merged.mode == "generated"
    np.testing.assert_array_equal(merged.table.stacked(BOTH, 4), whole.stacked(BOTH, 4))
    np.testing.assert_array_equal(merged.table.labels, whole.labels)
    (cut, rows), (known, known_rows) = merged.table.at_stage(0.5), whole.at_stage(0.5)
    np.testing.assert_array_equal(rows, known_rows)
    np.testing.assert_array_equal(cut.stacked(BOTH, 4), known.stacked(BOTH, 4))
    assert list(read_items(tmp_path / "all")) == whole.ids.tolist()
    assert len({path.name.split("-")[1] for path in shard_paths(tmp_path / "all", WHOLE)}) == 6  # numbered anew


def test_the_same_stores_give_the_same_bytes_also_after_a_kill(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_stores(parts, tmp_path / "all")
    calls: list[Path] = []

    def failing(source: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        copy_atomically(source, path)

    with monkeypatch.context() as patched:
        patched.setattr(merge_module, "copy_atomically", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            merge_stores(parts, tmp_path / "cut")
    with pytest.raises(StoreCorrupt, match=r"index.json is missing"):
        read_store(tmp_path / "cut")
    calls[0].write_bytes(b"rot")
    merge_stores(parts, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "all")
    with pytest.raises(StoreMismatch, match="merged"):
        merge_stores(parts[:2], tmp_path / "cut")


def test_what_does_not_belong_together_is_refused_with_both_values(
    whole: Table, parts: list[Path], tmp_path: Path
) -> None:
    rest = replace(whole, ids=np.array([f"other{row}" for row in range(90)]))
    write_store(tmp_path / "fits", rest)
    merge_stores([parts[0], tmp_path / "fits"], tmp_path / "control")
    differently = {
        "weights": (rest, identity(weights="f"), f"weights is {'c' * 64} in .*part0 and {'f' * 64} in "),
        "dtype": (rest, replace(identity(), dtype="bfloat16"), "dtype is float32 in .*part0 and bfloat16 in "),
        "features": (
            replace(rest, features={SCORE: rest.features[SCORE]}, prefixes={}),
            None,
            r"features is \['attention_score.v1', 'lap.* and \['attention_score.v1'\] in ",
        ),
        "k": (make_table(rows=30, k=3, stages=(0.5,)), None, "k is 4 in .* and 3 in "),
        "stages": (replace(rest, prefixes={}), None, r"stages is \['0.5'\] in .* and \[\] in "),
        "heads": (make_table(rows=30, heads=5, stages=(0.5,)), identity(), "heads is 4 in .* and 5 in "),
        "items": (whole.take(np.arange(19, 40)), None, "item `q19` lies in .*part0 and in .*items"),
    }
    for name, (table, model, says) in differently.items():
        write_store(tmp_path / name, table, model)
        with pytest.raises(StoreMismatch, match=says):
            merge_stores([parts[0], tmp_path / name], tmp_path / "none")
    stratified = json.loads((parts[1] / "index.json").read_text())
    (parts[1] / "index.json").write_text(json.dumps({**stratified, "stratum": "meta.kind"}))
    with pytest.raises(StoreMismatch, match=r"stratum is meta.relation in .* and meta.kind in "):
        merge_stores(parts, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_one_store_or_a_damaged_one_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="1 store given; expected at least two"):
        merge_stores(parts[:1], tmp_path / "none")
    shard_paths(parts[2], WHOLE)[0].write_bytes(b"half")
    with pytest.raises(StoreCorrupt, match=r"part2.*the index says"):
        merge_stores(parts, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_relabelling_a_merged_store_asks_no_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, options = LanguageModel.load(str(tiny_model)), ExtractOptions(k=3)
    items = [
        LabelledGeneration(id=f"i{number}", prompt="the capital of france", response="is paris rome"[: 3 + number])
        for number in range(8)
    ]
    for name, some in (("a", items[:5]), ("b", items[5:])):
        extract_features(some, tmp_path / name, loaded, options)
    merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    monkeypatch.setattr(type(loaded.model), "forward", None)  # any forward would fail
    parts = [read_store(tmp_path / name).table.token_statistics for name in "ab"]
    np.testing.assert_array_equal(read_store(tmp_path / "all").table.token_statistics, np.concatenate(parts))
    extract_features([replace(item, label=1) for item in items[1:]], tmp_path / "all", loaded, options)
    assert read_store(tmp_path / "all").table.labels.tolist() == [1] * 7


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("merge")(merge)
    app.command("inspect")(inspect)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_verb_merges_and_refuses(parts: list[Path], tmp_path: Path) -> None:
    done = run("merge", *parts, "--out", tmp_path / "all", "--json")
    assert json.loads(done.stdout)["items"] == 90
    assert json.loads(run("inspect", tmp_path / "all", "--json").stdout)["whole"]
    assert run("merge", parts[0], "--out", tmp_path / "none").exit_code == 2
    again = run("merge", parts[0], parts[0], "--out", tmp_path / "none")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "item `q0` lies in" in again.stderr
