"""A probe directory comes back as it was saved, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lapwing_detector import probe_files
from lapwing_detector.errors import ProbeCorrupt
from lapwing_detector.identity import sha256
from lapwing_detector.probe import Probe
from lapwing_detector.token_statistics import TOKEN_STATISTICS
from tests.detector.probes import random_probe

MEAN = next(iter(TOKEN_STATISTICS))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("original") / "probe"
    return random_probe().save_pretrained(place, files={"predictions.jsonl": b'{"id": "a"}\n'})


@pytest.fixture
def saved(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "probe"))


def threshold(**changes: object) -> dict[str, object]:
    return {"false_positive_rate": 0.05, "logit": 1.0, "realised_rate": None, "negatives": 400} | changes


def resign(directory: Path, **changes: object) -> None:
    """Makes the manifest vouch for the files as they are, as a careful forger would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= changes
    if "files" not in changes:
        manifest["files"] = {name: sha256((directory / name).read_bytes()) for name in manifest["files"]}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_saved_comes_back(saved):
    before, after = random_probe(), Probe.from_pretrained(saved)
    assert after.revision == before.revision
    for name in ("name", "features", "k", "layers", "bias", "calibration", "thresholds", "identity", "metrics"):
        assert getattr(after, name) == getattr(before, name)
    assert np.array_equal(after.weights, before.weights)
    assert np.array_equal(after.selected, before.selected)
    assert after.statistics.keys() == before.statistics.keys()


def test_the_directory_holds_card_pictures_and_given_files_and_vouches_for_all(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    listed = {path.name for path in saved.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == listed
    assert {"README.md", "p_value.png", "selected.png", "predictions.jsonl", "probe.safetensors"} <= listed
    assert (saved / "p_value.png").read_bytes().startswith(b"\x89PNG")


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    again = random_probe().save_pretrained(tmp_path / "again", files={"predictions.jsonl": b'{"id": "a"}\n'})
    for path in saved.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["probe.safetensors", "README.md", "p_value.png", "predictions.jsonl"])
def test_one_flipped_bit_anywhere_is_refused(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ProbeCorrupt, match=f"{name} is not the file that was saved"):
        Probe.from_pretrained(saved)


@pytest.mark.parametrize("name", ["probe.safetensors", "manifest.json", "README.md"])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(ProbeCorrupt, match=f"{name} is missing"):
        Probe.from_pretrained(saved)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda tensors: tensors | {"extra": np.zeros(3, np.float32)},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "selected"},
        lambda tensors: tensors | {"weights": np.full_like(tensors["weights"], np.nan)},
        lambda tensors: tensors | {"weights": tensors["weights"][:1]},
        lambda tensors: tensors | {"weights": tensors["weights"].astype(np.float64)},
        lambda tensors: tensors | {"statistics/attention_score.v1/AUROC": np.full((2, 4), np.inf, np.float32)},
        lambda tensors: tensors | {"weights": tensors["weights"] * np.float32(1.001)},
        lambda tensors: tensors | {"selected": np.array(1, np.uint8)},
        lambda tensors: tensors | {"statistics/astrology.v1/AUROC": np.zeros((2, 4), np.float32)},
    ],
    ids=lambda tamper: f"line-{tamper.__code__.co_firstlineno}",
)
def test_tensors_that_should_not_be_are_refused_though_the_digest_is_right(saved, tamper):
    save_file(tamper(load_file(saved / "probe.safetensors")), saved / "probe.safetensors")
    resign(saved)
    with pytest.raises(ProbeCorrupt):
        Probe.from_pretrained(saved)


def test_a_forger_who_changes_nothing_is_let_in(saved):
    save_file(load_file(saved / "probe.safetensors"), saved / "probe.safetensors")
    resign(saved)
    assert Probe.from_pretrained(saved).revision == random_probe().revision


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema_version": 3}, "schema version 3"),
        ({"schema_version": True}, "schema version True"),
        ({"schema_version": 2}, "statistic_weights if and only if"),
        ({"statistic_weights": {MEAN: 0.5}}, "statistic_weights if and only if"),
        ({"schema_version": 2, "statistic_weights": {"astrology.v1": 0.5}}, "astrology"),
        ({"schema_version": 2, "statistic_weights": {MEAN: float("nan")}}, "finite"),
        ({"schema_version": 2, "statistic_weights": {MEAN: "0.5"}}, "must be int or float"),
        ({"schema_version": 2, "statistic_weights": [MEAN]}, "must be dict"),
        ({"schema_version": 2, "statistic_weights": {MEAN: 0.5}}, "its content is"),
        ({"files": {}}, "must list"),
        ({"files": {"probe.safetensors": "0", "../outside": "0"}}, "outside|not the file"),
        ({"calibration": {"method": "magic"}}, "magic"),
        ({"features": ["attention_score.v9"]}, "attention_score.v9"),
        ({"identity": {}}, "whole probe"),
        ({"thresholds": [{"rate": 1}]}, "whole probe"),
        ({"thresholds": [threshold(logit=float("nan"))]}, "finite"),
        ({"thresholds": [threshold(logit="abc")]}, "'abc' must be"),
        ({"thresholds": [threshold(false_positive_rate=1.5)]}, "rate"),
        ({"thresholds": {}}, "must be list"),
        ({"calibration": {"method": "platt", "slope": float("nan"), "intercept": 0.0}}, "finite"),
        ({"revision": "0" * 12}, "its content is"),
        ({"k": 3.7}, "must be int"),
        ({"k": True}, "must be int"),
        ({"k": 0}, "at least 1"),
        ({"k": float("inf")}, "must be int"),
        ({"features": []}, "one or more"),
        ({"features": ["attention_score.v1", "attention_score.v1"]}, "each once"),
        ({"layers": [5, -5]}, "ascending"),
        ({"layers": [0.5, 1.9]}, "must be int"),
        ({"layers": "01"}, "must be list"),
        ({"heads": 99}, "whole probe"),
        ({"heads": float("inf")}, "whole probe"),
        ({"bias": 10**400}, "whole probe"),
        ({"name": "../../etc"}, "must match"),
        ({"name": {}}, "must be str"),
        ({"metrics": []}, "must be dict"),
        ({"training": "long"}, "must be dict"),
    ],
)
def test_manifests_of_another_kind_are_refused(saved, changes, expected):
    resign(saved, **changes)
    with pytest.raises(ProbeCorrupt, match=expected):
        Probe.from_pretrained(saved)


def test_a_file_that_leads_out_of_the_directory_is_refused(saved, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (saved / "README.md").unlink()
    (saved / "README.md").symlink_to(tmp_path / "secret")
    resign(saved)
    with pytest.raises(ProbeCorrupt, match="leads out"):
        Probe.from_pretrained(saved)


def test_a_missing_revision_and_endless_nesting_are_refused(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["revision"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ProbeCorrupt, match="revision"):
        Probe.from_pretrained(saved)
    (saved / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(ProbeCorrupt, match="no manifest"):
        Probe.from_pretrained(saved)


def test_a_probe_in_the_cache_of_the_hub_is_loaded_though_its_files_are_links(saved, tmp_path):
    repository = tmp_path / "models--me--probe"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(saved.iterdir()):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert Probe.from_pretrained(snapshot).revision == random_probe().revision
    # Control: a link out of the repository is refused there, too.
    (tmp_path / "secret").write_bytes((saved / "README.md").read_bytes())
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../../secret")
    with pytest.raises(ProbeCorrupt, match="leads out"):
        Probe.from_pretrained(snapshot)


def test_a_file_over_its_cap_is_refused_before_it_is_read(saved, monkeypatch):
    monkeypatch.setattr(probe_files, "MAX_TENSORS", 100)
    with pytest.raises(ProbeCorrupt, match="at most 100 are read"):
        Probe.from_pretrained(saved)


def test_no_json_is_refused(saved):
    (saved / "manifest.json").write_text("{")
    with pytest.raises(ProbeCorrupt, match="no manifest"):
        Probe.from_pretrained(saved)


def test_a_place_that_is_no_probe_is_named(tmp_path):
    with pytest.raises(ProbeCorrupt, match="lapwing train"):
        Probe.from_pretrained(tmp_path / "nowhere")


def test_saving_replaces_a_probe_but_nothing_else(saved, tmp_path):
    replace(random_probe(), bias=0.5).save_pretrained(saved)
    assert Probe.from_pretrained(saved).bias == 0.5
    assert not (saved / "predictions.jsonl").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no probe directory"):
        random_probe().save_pretrained(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_failure_while_saving_leaves_the_old_probe_and_no_litter(saved, monkeypatch):
    def broken(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            raise OSError("no space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(probe_files, "_write", broken)
    with pytest.raises(OSError, match="no space"):
        replace(random_probe(), bias=0.5).save_pretrained(saved)
    assert Probe.from_pretrained(saved).bias == 0.25
    assert [path.name for path in saved.parent.iterdir()] == ["probe"]


def test_a_failure_in_the_very_swap_puts_the_old_probe_back(saved, monkeypatch):
    real, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("cable pulled")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="cable pulled"):
        replace(random_probe(), bias=0.5).save_pretrained(saved)
    assert Probe.from_pretrained(saved).bias == 0.25
    assert [path.name for path in saved.parent.iterdir()] == ["probe"]


def test_the_next_save_cleans_up_after_one_that_was_killed_in_the_swap(saved, monkeypatch):
    aside = saved.parent / ".probe.old.killed" / "old"
    aside.parent.mkdir()
    saved.rename(aside)  # the old probe was moved away, and the process ended there
    (saved.parent / ".probe.killed").mkdir()
    with monkeypatch.context() as failing:
        failing.setattr(probe_files, "_write", lambda path, data: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            random_probe().save_pretrained(saved)
    assert Probe.from_pretrained(saved).bias == 0.25, "it is back before anything new is written"
    assert (saved.parent / ".probe.killed").exists(), "it may be of a save at work"
    monkeypatch.setattr(probe_files, "LEFT_SECONDS", -1.0)
    replace(random_probe(), bias=0.5).save_pretrained(saved)
    assert Probe.from_pretrained(saved).bias == 0.5
    assert [path.name for path in saved.parent.iterdir()] == ["probe"]


def test_a_link_to_a_probe_is_followed_and_a_file_is_never_replaced(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    replace(random_probe(), bias=0.5).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Probe.from_pretrained(saved).bias == 0.5
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        random_probe().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_with_a_manifest_of_something_else_is_not_replaced(saved, tmp_path):
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "my web app", "icons": []}')
    (web / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no probe directory"):
        random_probe().save_pretrained(web)
    (saved / "notes.txt").write_text("what I saw")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        random_probe().save_pretrained(saved)
    assert (saved / "notes.txt").exists()


@pytest.mark.parametrize("name", ["../escaped.txt", ".hidden", "README.md", "manifest.json", "probe.safetensors"])
def test_further_files_can_neither_leave_the_directory_nor_take_a_place(tmp_path, name):
    with pytest.raises(ValueError, match="plain name"):
        random_probe().save_pretrained(tmp_path / "probe", files={name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "Upper", "../up", "a" * 64, "-a"])
def test_names_that_are_no_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must match"):
        random_probe(name=name).save_pretrained(tmp_path / "probe")
