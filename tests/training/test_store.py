from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_fakes import LAPLACIAN, SCORE, make_table, write_store

from lapwing_training import files
from lapwing_training.errors import NonFiniteFeatures, NotEnoughData, StoreCorrupt, StoreMismatch
from lapwing_training.store import open_plan, read_store, shard_name


def test_what_is_stored_is_read_in_the_order_of_the_index(tmp_path: Path) -> None:
    table = make_table(rows=450)
    store = read_store(write_store(tmp_path / "store", table))
    for name in (SCORE, LAPLACIAN):
        np.testing.assert_array_equal(store.table.features[name], table.features[name])
    np.testing.assert_array_equal(store.table.labels, table.labels)
    np.testing.assert_array_equal(store.table.log_probabilities, table.log_probabilities)
    assert store.table.ids.tolist() == table.ids.tolist()
    assert store.layers == (0, 1, 2, 3)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    table = make_table(rows=50)
    first, second = (write_store(tmp_path / name, table) for name in ("one", "two"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_a_damaged_shard_is_refused(tmp_path: Path, damage: str) -> None:
    store = write_store(tmp_path / "store", make_table(rows=450))
    path = store / shard_name(1)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-8])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes((store / shard_name(0)).read_bytes())
    with pytest.raises(StoreCorrupt, match=r"shard-00001.safetensors is .*, the index says"):
        read_store(store)


def test_an_unfinished_store_and_no_store_are_told_apart_from_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreCorrupt, match=r"index.json is missing"):
        read_store(tmp_path)
    store = write_store(tmp_path / "store", make_table(rows=50))
    (store / "index.json").write_text("{")
    with pytest.raises(StoreCorrupt, match="not JSON"):
        read_store(store)
    (store / "index.json").write_text('{"schema_version": 99}')
    with pytest.raises(StoreCorrupt, match="schema version 99"):
        read_store(store)


def test_another_plan_and_other_files_are_not_mixed_in(tmp_path: Path) -> None:
    open_plan(tmp_path / "store", {"k": 10, "model": "a"})
    open_plan(tmp_path / "store", {"k": 10, "model": "a"})
    with pytest.raises(StoreMismatch, match=r"\(k\)"):
        open_plan(tmp_path / "store", {"k": 5, "model": "a"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreMismatch, match="holds other files"):
        open_plan(tmp_path / "full", {"k": 10})


def test_what_a_killed_run_left_is_swept_up_and_nothing_else(tmp_path: Path) -> None:
    for name in (".plan.json.x1.tmp", ".shard-00001.safetensors.x2.tmp", ".index.json.x3.tmp"):
        (tmp_path / name).write_bytes(b"half")
    open_plan(tmp_path, {"k": 10})
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "plan.json").write_bytes(b"\x00\xff")
    with pytest.raises(StoreMismatch, match=r"plan.json is damaged"):
        open_plan(tmp_path, {"k": 10})
    other = tmp_path / "other"
    other.mkdir()
    (other / ".thesis.tmp").write_text("mine")
    with pytest.raises(StoreMismatch, match="holds other files"):
        open_plan(other, {"k": 10})
    assert (other / ".thesis.tmp").exists()


def without(*path: str) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        index = json.loads((store / "index.json").read_text())
        holder = index
        for name in path[:-1]:
            holder = holder[name]
        del holder[path[-1]]
        (store / "index.json").write_text(json.dumps(index))

    return change


def with_entry(name: str, value: object) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        index = json.loads((store / "index.json").read_text())
        (store / "index.json").write_text(json.dumps({**index, name: value}))

    return change


def with_label(text: str) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        labels = store / "labels.json"
        labels.write_text(labels.read_text().replace('"q3": ', f'"q3": {text}', 1))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("shards"), "KeyError: 'shards'"),
        (without("items", "group"), "KeyError: 'group'"),
        (with_entry("shards", 7), "AttributeError"),
        (with_entry("shards", {}), "different items"),
        (with_entry("features", ["magic.v1"]), "KeyError"),
        (with_entry("k", 9), r"laplacian_eigenvalues.v1 should be \(4, 4, 9\) .* \(4, 4, 4\)"),
        (with_entry("heads", 5), r"should be \(4, 5, 1\)"),
        (with_entry("schema_version", [1]), "schema version"),
        (with_label('2, "z": '), "the label of `q3` is 2;"),
        (with_label('"x", "z": '), 'the label of `q3` is "x"; expected 0, 1 or null'),
        (with_label('true, "z": '), "the label of `q3` is true"),
        (with_label(f"1{'0' * 400}"), "the label of `q3` is 10000"),
        (with_label(f"{'1' * 5000}"), "is not JSON"),
        (with_label('NaN, "z": '), "is not JSON"),
    ],
)
def test_an_index_or_labels_that_are_not_ours_are_refused(
    tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    store = write_store(tmp_path / "store", make_table(rows=50))
    assert len(read_store(store).table) == 50  # control
    change(store)
    with pytest.raises(StoreCorrupt, match=says):
        read_store(store)


def test_labels_lie_in_a_file_of_their_own_and_may_be_unknown(tmp_path: Path) -> None:
    table = make_table(rows=50)
    store = write_store(tmp_path / "store", table)
    labels = json.loads((store / "labels.json").read_text())
    labels["labels"]["q3"] = None
    (store / "labels.json").write_text(json.dumps(labels))
    read = read_store(store).table
    assert read.labels[3] == -1
    assert len(read.labelled()) == 49
    assert "q3" not in read.labelled().ids


def test_one_class_or_no_label_at_all_is_refused() -> None:
    table = make_table(rows=50)
    with pytest.raises(NotEnoughData, match=r"50 hallucinated \(1\) and 0 other"):
        table.with_labels(np.ones(50)).labelled()
    with pytest.raises(NotEnoughData, match=r"0 hallucinated \(1\) and 0 other"):
        table.with_labels(np.full(50, -1)).labelled()


def test_features_that_are_not_finite_are_refused_with_the_item() -> None:
    table = make_table(rows=50)
    table.features[LAPLACIAN][7, 1, 2, 0] = np.nan
    table.features[LAPLACIAN][9, 1, 2, 0] = np.inf
    with pytest.raises(NonFiniteFeatures, match=r"laplacian_eigenvalues.v1 of item `q7` \(and 1 others\)"):
        table.labelled()


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
