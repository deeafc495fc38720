from __future__ import annotations

import errno
import gzip
import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_fakes import LAPLACIAN, SCORE, make_table, write_store

from lapwing_training import files
from lapwing_training.errors import NonFiniteFeatures, NotEnoughData, StoreCorrupt, StoreMismatch
from lapwing_training.store.inspect import describe, inspect_store
from lapwing_training.store.plan import open_plan
from lapwing_training.store.shards import WHOLE, shard_paths
from lapwing_training.store.store import mode_of, read_items, read_store

STAGES = (0.25, 0.5)


def test_what_is_stored_is_read_in_the_order_of_the_index(tmp_path: Path) -> None:
    table = make_table(rows=450, stages=STAGES)
    store = read_store(write_store(tmp_path / "store", table))
    for name in (SCORE, LAPLACIAN):
        np.testing.assert_array_equal(store.table.feature(name, table.k), table.features[name])
    np.testing.assert_array_equal(store.table.labels, table.labels)
    np.testing.assert_array_equal(store.table.log_probabilities, table.log_probabilities)
    np.testing.assert_array_equal(store.table.response_tokens, table.response_tokens)
    assert store.table.ids.tolist() == table.ids.tolist()
    assert store.layers == (0, 1, 2, 3)
    assert store.mode == "generated"
    assert store.table.stages == STAGES
    for fraction in STAGES:
        (read, rows), (made, made_rows) = store.table.at_stage(fraction), table.at_stage(fraction)
        assert 0 < len(rows) < 450  # some are too short
        np.testing.assert_array_equal(rows, made_rows)
        np.testing.assert_array_equal(read.stacked((SCORE, LAPLACIAN), 3), made.stacked((SCORE, LAPLACIAN), 3))
        np.testing.assert_array_equal(read.token_counts, made.token_counts)
        np.testing.assert_array_equal(read.response_tokens, made.response_tokens)


def test_the_order_of_the_shards_does_not_matter(tmp_path: Path) -> None:
    table = make_table(rows=90)
    directory = write_store(tmp_path / "store", table, shard_rows=40)
    path = directory / "index.json"
    index = json.loads(path.read_text())
    index["shards"] = dict(reversed(index["shards"].items()))
    path.write_text(json.dumps(index))
    np.testing.assert_array_equal(read_store(directory).table.feature(LAPLACIAN, 4), table.features[LAPLACIAN])


def test_texts_are_kept_and_labels_lie_apart(tmp_path: Path) -> None:
    table = make_table(rows=50)
    directory = write_store(tmp_path / "store", table)
    items = read_items(directory)
    assert list(items) == table.ids.tolist()
    assert items["q7"].prompt == "what is q7?"
    assert [item.label for item in items.values()] == table.labels.tolist()
    kept = gzip.decompress((directory / "items.jsonl.gz").read_bytes())
    assert b'"label": null' in kept
    assert b'"label": 1' not in kept
    labels = json.loads((directory / "labels.json").read_text())
    labels["labels"]["q7"], labels["labelling"]["q7"] = None, {"rule": "judge", "reason": "refused"}
    (directory / "labels.json").write_text(json.dumps(labels))
    changed = read_items(directory)["q7"]
    assert (changed.label, changed.labelling["reason"]) == (None, "refused")
    (directory / "items.jsonl.gz").write_bytes(b"")
    assert len(read_store(directory).table) == 50  # the features do not need them
    with pytest.raises(StoreCorrupt, match=r"items.jsonl.gz is .*, the index says"):
        read_items(directory)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    table = make_table(rows=50, stages=STAGES)
    first, second = (write_store(tmp_path / name, table) for name in ("one", "two"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    other = write_store(tmp_path / "three", make_table(rows=50, seed=1))
    # Control: shards are named by their content.
    assert {path.name for path in shard_paths(first, WHOLE)}.isdisjoint(path.name for path in shard_paths(other, WHOLE))


@pytest.mark.parametrize("kind", ["shard", "stage-0.5"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_a_damaged_shard_is_refused(tmp_path: Path, damage: str, kind: str) -> None:
    store = write_store(tmp_path / "store", make_table(rows=450, stages=STAGES))
    first, path, *_ = shard_paths(store, kind)
    assert inspect_store(store)["whole"]  # control
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-8])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(first.read_bytes())
    with pytest.raises(StoreCorrupt, match=rf"{path.name} is .*, the index says"):
        read_store(store)
    found = inspect_store(store)
    assert [file["name"] for file in found["files"] if not file["whole"]] == [path.name]
    assert re.search(r"1 of \d+ files damaged", describe(found))


def test_an_unfinished_store_and_no_store_are_told_apart_from_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreCorrupt, match=r"index.json is missing"):
        read_store(tmp_path)
    store = write_store(tmp_path / "store", make_table(rows=50))
    (store / "index.json").write_text("{")
    with pytest.raises(StoreCorrupt, match="not JSON"):
        read_store(store)
    (store / "index.json").write_text('{"schema_version": 99}')
    with pytest.raises(StoreCorrupt, match="schema version 99, this lapwing reads 2 and 3; install a newer lapwing"):
        read_store(store)
    (store / "index.json").write_text('{"schema_version": 1}')
    with pytest.raises(StoreCorrupt, match=r"schema version 1, .* extract again"):
        read_store(store)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", make_table(rows=50))
    [path] = shard_paths(store, WHOLE)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreCorrupt, match=f"{path.name} is missing"):
        read_store(store)
    (store / "index.json").unlink()
    (store / "index.json").mkdir()
    with pytest.raises(OSError, match=r"index.json"):
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


def test_a_store_that_lacks_nothing_may_have_been_begun_otherwise(tmp_path: Path) -> None:
    open_plan(tmp_path, {"k": 10, "generated": "x"})
    open_plan(tmp_path, {"k": 10, "items": "y"}, lacking=[])
    with pytest.raises(StoreMismatch, match=r"\(items, generated\) and holds no undamaged .* `q1` and 1 others"):
        open_plan(tmp_path, {"k": 10, "items": "y"}, lacking=["q1", "q2"])
    with pytest.raises(StoreMismatch, match=r"\(k, items, generated\)"):
        open_plan(tmp_path, {"k": 9, "items": "y"}, lacking=[])


def test_what_a_killed_run_left_is_swept_up_and_nothing_else(tmp_path: Path) -> None:
    left = (".plan.json.x1.tmp", ".shard-00001-0123456789abcdef.safetensors.x2.tmp", ".index.json.x3.tmp")
    for name in (*left, ".items.jsonl.gz.x4.tmp", ".stage-0.5-00000-0123456789abcdef.safetensors.x5.tmp"):
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


def with_labels_of_some(store: Path) -> None:
    labels = json.loads((store / "labels.json").read_text())
    labels["labels"] = dict(list(labels["labels"].items())[:20])
    (store / "labels.json").write_text(json.dumps(labels))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_labels_of_some, r"index.json and .*labels.json list different items; run lapwing extract again, which"),
        (without("shards"), "KeyError: 'shards'"),
        (without("stages"), "KeyError: 'stages'"),
        (without("items", "group"), "KeyError: 'group'"),
        (with_entry("shards", 7), "AttributeError"),
        (with_entry("shards", {}), "different items"),
        (with_entry("stages", {"half": {}}), "ValueError"),
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


def test_features_that_are_not_finite_are_refused_with_the_item(tmp_path: Path) -> None:
    table = make_table(rows=50)
    table.features[LAPLACIAN][7, 1, 2, 0] = np.nan
    table.features[LAPLACIAN][9, 1, 2, 0] = np.inf
    stored = read_store(write_store(tmp_path / "store", table)).table
    for bad in (table, stored):
        with pytest.raises(NonFiniteFeatures, match=r"laplacian_eigenvalues.v1 of item `q7` \(and 1 others\)"):
            bad.labelled()


def test_the_mode_of_a_store_is_that_of_its_items() -> None:
    assert mode_of(["supplied", "supplied"]) == "supplied"
    assert mode_of([None]) == "unknown"
    assert mode_of(["supplied", "generated"]) == mode_of(["generated", None]) == "mixed"


def test_inspect_counts_what_is_there(tmp_path: Path) -> None:
    table = replace(make_table(rows=90, stages=STAGES), splits=np.array(["train", "test", ""] * 30))
    store = write_store(tmp_path / "store", table)
    found = inspect_store(store)
    assert found["items"] == sum(found["labels"].values()) == 90
    assert found["labels"]["hallucinated"] == int((table.labels == 1).sum())
    assert found["strata"]["r1"]["items"] == 30
    assert found["splits"] == {"test": 30, "train": 30}
    assert found["stages"] == {str(fraction): len(table.at_stage(fraction)[0]) for fraction in STAGES}
    assert found["tokens"]["most"] == table.token_counts.max()
    assert found["bytes"] == sum(path.stat().st_size for path in store.iterdir())
    assert (found["mode"], found["modes"]) == ("generated", {"generated": 90})
    assert json.loads(json.dumps(found)) == found
    text = describe(found)
    assert "4 layers x 4 heads" in text
    assert f"{found['labels']['hallucinated']} hallucinated" in text


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; .*make room.*/file'") as caught:
        files.write_atomically(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # Python ignores the signal, so the write fails
    try:
        with pytest.raises(OSError, match=r"File too large; .*make room"):
            files.write_atomically(path, bytes(1 << 17))
        files.write_atomically(path, bytes(1 << 15))  # control
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size == 1 << 15


def test_a_copy_is_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(range(256)) * 9000)
    files.copy_atomically(tmp_path / "one", tmp_path / "two")
    assert files.digest_of(tmp_path / "two") == files.digest((tmp_path / "one").read_bytes())
