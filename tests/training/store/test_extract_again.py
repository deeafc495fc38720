"""A store that is begun, damaged, relabelled or cut off ends as one that was made at once."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from extract_fakes import OPTIONS, contents, items, without_log_probabilities
from training_fakes import LAPLACIAN, SCORE

from lapwing_detector.language_model import LanguageModel
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import TokenIds
from lapwing_training import files
from lapwing_training.errors import StoreCorrupt
from lapwing_training.store import extract as extract_module
from lapwing_training.store.extract import Reading, extract_features
from lapwing_training.store.inspect import inspect_store
from lapwing_training.store.shards import WHOLE, read_shard, shard_paths
from lapwing_training.store.store import read_items, read_store


def test_a_run_that_failed_goes_on_and_ends_with_the_same_bytes(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "whole", loaded, OPTIONS)
    plain, calls = extract_module.read_with_log_probabilities, []

    def failing(model: LanguageModel, batch: list[TokenIds]) -> list[Reading]:
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return plain(model, batch)

    monkeypatch.setattr(extract_module, "read_with_log_probabilities", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        extract_features(items(), tmp_path / "cut", loaded, OPTIONS)
    assert len(shard_paths(tmp_path / "cut", WHOLE)) == 1
    before = len(calls)
    extract_features(items(), tmp_path / "cut", loaded, OPTIONS)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    whole_run = sum(-(-min(8, 30) // 3) for _ in range(4))
    assert len(calls) - before < whole_run  # the finished shard was not made again


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["flip", "swap"])
def test_a_damaged_shard_is_made_again_and_the_others_are_kept(
    loaded: LanguageModel, tmp_path: Path, finished: bool, damage: str
) -> None:
    extract_features(items(), tmp_path / "whole", loaded, OPTIONS)
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    first, path, *_ = shard_paths(tmp_path / "store", WHOLE)
    data = bytearray((path if damage == "flip" else first).read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    path.write_bytes(data)
    assert read_shard(path).ids  # control: it can be read all the same
    if not finished:
        (tmp_path / "store" / "index.json").unlink()
    kept = first.stat().st_ino
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert first.stat().st_ino == kept


def test_relabelling_writes_labels_anew_and_no_features(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    monkeypatch.setattr(type(loaded.model), "forward", None)  # any forward would fail
    extract_features([replace(item, label=1) for item in items()], tmp_path / "store", loaded, OPTIONS)
    assert set(read_store(tmp_path / "store").table.labels.tolist()) == {1}


def test_labels_of_other_items_are_refused_and_mended_without_the_model(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    extract_features(items(), store, loaded, OPTIONS)
    whole = contents(store)
    monkeypatch.setattr(type(loaded.model), "forward", None)  # any forward would fail
    extract_features(items()[5:25], store, loaded, OPTIONS)
    (store / "index.json").write_bytes(whole["index.json"])  # as if killed before the index was written
    with pytest.raises(StoreCorrupt, match="run lapwing extract again, which keeps the shards"):
        read_store(store)
    extract_features(items(), store, loaded, OPTIONS)
    assert contents(store) == whole


def test_relabelling_some_of_the_items_keeps_stages_and_strata(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    extract_features(items(), store, loaded, replace(OPTIONS, stages=(0.5,)))
    before = read_store(store).table
    shards = {path: path.read_bytes() for path in store.glob("*.safetensors")}
    monkeypatch.setattr(type(loaded.model), "forward", None)  # any forward would fail
    some = [replace(item, label=0, labelling={"rule": "f1"}) for item in items()[5:25]]
    told = extract_features(some, store, loaded, replace(OPTIONS, stratum=""))
    table = read_store(store).table
    assert set(table.ids) == set(before.ids) & {item.id for item in some}
    assert told["items"] == len(table) < len(before)
    rows = np.flatnonzero(np.isin(before.ids, table.ids))
    for name in (SCORE, LAPLACIAN):
        np.testing.assert_array_equal(table.feature(name, 4), before.take(rows).feature(name, 4))
    assert set(table.strata) == {"k0", "k1", "k2"}
    (cut, _), (cut_before, _) = table.at_stage(0.5), before.take(rows).at_stage(0.5)
    np.testing.assert_array_equal(cut.feature(LAPLACIAN, 4), cut_before.feature(LAPLACIAN, 4))
    assert read_items(store)[str(table.ids[0])].labelling == {"rule": "f1"}
    assert {path: path.read_bytes() for path in store.glob("*.safetensors")} == shards
    extract_features(items(), store, loaded, OPTIONS)  # and back again
    assert read_store(store).table.ids.tolist() == before.ids.tolist()


def test_stages_that_are_added_later_read_the_cut_texts_only(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "whole", loaded, replace(OPTIONS, stages=(0.5,)))
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    plain, read = LanguageModel.summaries, []

    def counted(model: LanguageModel, batch: list[tuple[int, ...]]) -> list[AttentionSummary]:
        read.extend(batch)
        return plain(model, batch)

    monkeypatch.setattr(LanguageModel, "summaries", counted)
    extract_features(items(), tmp_path / "store", loaded, replace(OPTIONS, stages=(0.5,)))
    assert len(read) == len(read_store(tmp_path / "store").table.at_stage(0.5)[0])
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_leaves_whole_files_and_the_run_goes_on(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, stages=(0.5,))
    plain, calls, fails_at = files.os.fsync, [], 0

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    extract_features(items(), tmp_path / "whole", loaded, options)
    writes = len(calls)  # plan, shards, those of the stage, texts, labels, index
    assert writes >= 8
    for fails_at in (1, 2, writes // 2, writes - 1, writes):
        store = tmp_path / str(fails_at)
        calls.clear()
        with pytest.raises(OSError, match=r"No space left on device; .*make room"):
            extract_features(items(), store, loaded, options)
        assert not (store / "index.json").exists()
        found = contents(store) if store.exists() else {}
        assert found.items() <= contents(tmp_path / "whole").items()
        extract_features(items(), store, loaded, options)
        assert contents(store) == contents(tmp_path / "whole")


def test_a_store_of_the_version_before_log_probabilities_is_read_and_relabelled_as_it_is(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    extract_features(items(), store, loaded, replace(OPTIONS, stages=(0.5,)))
    before = read_store(store).table
    features = before.feature(LAPLACIAN, 4)
    assert before.token_statistics is not None
    without_log_probabilities(store)
    old = read_store(store).table
    assert old.token_statistics is old.at_stage(0.5)[0].token_statistics is None
    np.testing.assert_array_equal(old.feature(LAPLACIAN, 4), features)
    assert inspect_store(store)["log_probabilities"] == 0
    monkeypatch.setattr(type(loaded.model), "forward", None)  # any forward would fail
    extract_features([replace(item, label=1) for item in items()], store, loaded, OPTIONS)
    table = read_store(store).table
    assert set(table.labels.tolist()) == {1}
    assert table.token_statistics is None
