"""What does not belong into a registry is never read, never served, and said."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lapwing_detector import probe_files, registry_files
from lapwing_detector.errors import ProbeCorrupt, RegistryError
from lapwing_detector.identity import sha256
from lapwing_detector.registry import Registry
from lapwing_detector.registry_current import digest_of
from tests.detector.registries import DAMAGES, a_revision, damage, resign, sources

REVISION = a_revision(0).revision


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sources(tmp_path_factory.mktemp("saved"), 2)


@pytest.fixture
def registry(tmp_path: Path, saved: list[Path]) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.publish(saved[0])
    return registry


@pytest.fixture
def source(tmp_path: Path, saved: list[Path]) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "source"))


def vouch(registry: Registry, name: str = "alpha", revision: str = REVISION) -> None:
    """Makes CURRENT vouch for a manifest as it is, as a forger would who may write the registry."""
    path = registry.root / "CURRENT"
    content = json.loads(path.read_text())
    digest = sha256((registry.root / name / revision / "manifest.json").read_bytes())
    content["published"][name] = [[revision, digest]]
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": digest_of(content)}))


# Sources.

FORGERIES = [
    (lambda tensors: tensors | {"weights": np.full_like(tensors["weights"], np.nan)}, "finite"),
    (lambda tensors: tensors | {"weights": tensors["weights"] * np.float32(np.inf)}, "finite"),
    (lambda tensors: tensors | {"extra": np.zeros(3, np.float32)}, "extra"),
    (lambda tensors: tensors | {"weights": tensors["weights"][:1]}, "weights"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("forge", "said"), FORGERIES, ids=["nan", "infinity", "extra tensor", "shape"])
def test_a_forged_probe_is_neither_published_nor_loaded(
    registry: Registry, source: Path, forge: object, said: str
) -> None:
    save_file(forge(load_file(source / "probe.safetensors")), source / "probe.safetensors")  # type: ignore[operator]
    resign(source)
    with pytest.raises(ProbeCorrupt, match=said):
        registry.publish(source, activate=True)
    assert registry.current().published.keys() == {"alpha"}
    place = registry.root / "alpha" / REVISION
    save_file(forge(load_file(place / "probe.safetensors")), place / "probe.safetensors")  # type: ignore[operator]
    resign(place)
    vouch(registry)
    with pytest.raises(ProbeCorrupt, match=said):
        registry.load("alpha")


def test_control_a_forger_who_changes_nothing_is_let_in(registry: Registry) -> None:
    resign(registry.root / "alpha" / REVISION)
    with pytest.raises(ProbeCorrupt, match=r"manifest\.json is not the file"):
        registry.load("alpha")
    vouch(registry)
    assert registry.load("alpha").revision == REVISION


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 99}, "schema version 99, known are .*; update lapwing"),
        ({"name": "../../etc"}, "must match"),
        ({"name": "beta"}, "its content is"),
        ({"revision": "../../../x"}, "its content is"),
    ],
)
def test_a_manifest_of_another_kind_is_neither_published_nor_loaded(
    registry: Registry, source: Path, changes: dict[str, object], said: str
) -> None:
    resign(source, **changes)
    with pytest.raises(ProbeCorrupt, match=said):
        registry.publish(source)
    resign(registry.root / "alpha" / REVISION, **changes)
    vouch(registry)
    with pytest.raises(ProbeCorrupt, match=said):
        registry.load("alpha")


def test_what_is_too_large_is_not_read(registry: Registry, saved: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as small:
        small.setattr(probe_files, "MAX_TENSORS", 100)
        with pytest.raises(ProbeCorrupt, match="at most 100 are read"):
            registry.load("alpha")
        with pytest.raises(ProbeCorrupt, match="at most 100 are read"):
            registry.publish(saved[1])
    monkeypatch.setattr(registry_files, "MAX_CURRENT", (registry.root / "CURRENT").stat().st_size)
    assert registry.current().active == "alpha", "control"
    with pytest.raises(RegistryError, match="holds too many revisions"):
        registry.publish(saved[1])
    monkeypatch.setattr(registry_files, "MAX_CURRENT", 100)
    with pytest.raises(RegistryError, match="more than 100 bytes"):
        registry.current()


def test_a_registry_is_not_begun_for_a_probe_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ProbeCorrupt, match="manifest"):
        Registry(tmp_path / "registry").publish(tmp_path / "nothing")
    assert not (tmp_path / "registry").exists()


def test_a_place_that_is_in_use_for_something_else_is_no_registry(saved: list[Path], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for ask in (lambda one: one.publish(saved[0]), lambda one: one.current(), lambda one: one.activate("alpha")):
        with pytest.raises(RegistryError, match="is no registry"):
            ask(Registry(tmp_path / "home"))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]
    with pytest.raises(RegistryError, match="is a file"):
        Registry(tmp_path / "home" / "thesis.tex").publish(saved[0])
    with pytest.raises(RegistryError, match="begin one: lapwing probes publish"):
        Registry(tmp_path / "nowhere").current()


# Links.


def replace_by_link(place: Path, target: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(target)


def test_links_that_lead_out_are_refused(registry: Registry, saved: list[Path], tmp_path: Path) -> None:
    outside = Path(shutil.copytree(registry.root / "alpha", tmp_path / "outside"))
    place = registry.root / "alpha" / REVISION
    for link, target in (
        (place / "README.md", outside / REVISION / "README.md"),
        (place, outside / REVISION),
        (place.parent, outside),
    ):
        replace_by_link(link, target)
        with pytest.raises(ProbeCorrupt, match="lead"):
            registry.load("alpha")
        with pytest.raises(ProbeCorrupt, match="lead"):
            registry.publish(saved[0])
        link.unlink()
        shutil.copytree(target, link) if target.is_dir() else shutil.copy(target, link)
        assert registry.load("alpha").revision == REVISION, "control: the same without the link"
    assert not list(outside.glob("*/.tmp*"))


def test_a_link_from_one_revision_to_another_is_refused(registry: Registry, saved: list[Path]) -> None:
    registry.publish(saved[1])
    other = a_revision(1).revision
    replace_by_link(registry.root / "alpha" / other, registry.root / "alpha" / REVISION)
    with pytest.raises(ProbeCorrupt, match="leads elsewhere"):
        registry.load("alpha", other)


def test_a_CURRENT_or_lock_that_leads_out_is_refused(  # noqa: N802
    registry: Registry, saved: list[Path], tmp_path: Path
) -> None:
    path, outside = registry.root / "CURRENT", tmp_path / "outside"
    shutil.copy(path, outside)
    replace_by_link(path, outside)
    with pytest.raises(RegistryError, match="leads out"):
        registry.current()
    path.unlink()
    shutil.copy(outside, path)
    replace_by_link(registry.root / ".lock", outside)
    with pytest.raises(OSError, match="symbolic"):
        registry.publish(saved[1])


def test_a_link_that_stands_for_the_root_is_followed(registry: Registry, saved: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(registry.root)
    linked = Registry(tmp_path / "link")
    linked.publish(saved[1], activate=True)
    assert registry.load("alpha").bias == 1.0


def test_leftovers_that_are_links_are_swept_and_not_followed(
    registry: Registry, saved: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (registry.root / ".tmp-link").symlink_to(tmp_path / "home")
    (registry.root / ".tmp-file").write_text("half")
    (registry.root / ".tmp-folder").mkdir()
    registry.publish(saved[1])
    assert list(registry.root.glob(".tmp-*")) == []
    assert (tmp_path / "home" / "thesis.tex").exists()


# CURRENT.


@pytest.mark.parametrize("number", range(60))
def test_a_damaged_CURRENT_is_never_believed(registry: Registry, number: int) -> None:  # noqa: N802
    damage(registry.root / "CURRENT", DAMAGES[number % 3], random.Random(number))
    with pytest.raises(RegistryError, match=r"damaged|known is 1"):
        registry.current()
    with pytest.raises(RegistryError):
        registry.activate("alpha")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema 2, known is 1; update lapwing"),
        ({"active": "beta"}, "active probe was not published"),
        ({"previous": "beta"}, "previous probe was not published"),
        ({"revisions": {}}, "stands for no revision"),
        ({"revisions": {"alpha": "0" * 12}}, "not published"),
        ({"revisions": {"alpha": "../../other"}}, "not published"),
        ({"history": {"alpha": ["0" * 12]}}, "not published"),
        ({"history": {"beta": ["0" * 12]}}, "not published"),
        ({"shadows": ["beta"]}, "shadow"),
        ({"shadows": [7]}, "another kind"),
        ({"published": {"../../etc": [["0" * 12, "0" * 64]]}}, "no name"),
        ({"published": {"alpha": [["../../../etc", "0" * 64]]}}, "which is none"),
        ({"published": {"alpha": []}}, "no name of a probe with revisions"),
        ({"published": 7}, "another kind"),
        ({"active": ["alpha"]}, "another kind"),
    ],
)
def test_a_CURRENT_that_says_impossible_things_is_not_believed(  # noqa: N802
    registry: Registry, changes: dict[str, object], said: str
) -> None:
    path = registry.root / "CURRENT"
    content = json.loads(path.read_text()) | changes
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": digest_of(content)}))
    with pytest.raises(RegistryError, match=said):
        registry.current()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 200_000, "7"])
def test_what_is_no_CURRENT_is_not_believed(registry: Registry, text: str) -> None:  # noqa: N802
    (registry.root / "CURRENT").write_text(text)
    with pytest.raises(RegistryError, match="damaged"):
        registry.current()


def test_a_pipe_in_the_place_of_a_file_hangs_nobody(registry: Registry) -> None:
    (registry.root / "CURRENT").unlink()
    os.mkfifo(registry.root / "CURRENT")
    with pytest.raises(RegistryError):
        registry.current()


# Revisions.


def test_another_probe_in_the_place_of_a_revision_is_refused(registry: Registry, saved: list[Path]) -> None:
    place = registry.root / "alpha" / REVISION
    shutil.rmtree(place)
    shutil.copytree(saved[1], place)
    with pytest.raises(ProbeCorrupt, match="not what was published"):
        registry.load("alpha")
    vouch(registry)
    with pytest.raises(ProbeCorrupt, match=f"holds revision {a_revision(1).revision}"):
        registry.load("alpha")


def test_a_damaged_revision_is_neither_published_over_nor_activated_nor_gone_back_to(
    registry: Registry, saved: list[Path]
) -> None:
    registry.publish(saved[1], activate=True)
    damage(registry.root / "alpha" / REVISION / "predictions.jsonl", DAMAGES[0], random.Random(0))
    before = registry.current()
    for ask in (
        lambda: registry.publish(saved[0], activate=True),
        lambda: registry.activate("alpha", REVISION),
        lambda: registry.shadow("alpha", REVISION),
        lambda: registry.rollback(),
    ):
        with pytest.raises(ProbeCorrupt, match=r"predictions\.jsonl is not the file"):
            ask()
    with pytest.raises(ProbeCorrupt, match=f"remove {registry.root / 'alpha' / REVISION} first"):
        registry.publish(saved[0])
    assert registry.current() == before
    assert registry.load("alpha").bias == 1.0


def test_an_orphan_that_is_not_what_is_being_published_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    [mine] = sources(tmp_path, 1, "beta")
    revision = a_revision(0, "beta").revision
    orphan = Path(shutil.copytree(mine, registry.root / "beta" / revision))
    resign(orphan, training={"items": 13})
    with pytest.raises(ProbeCorrupt, match=r"remove .* first"):
        registry.publish(mine)
    assert (orphan / "manifest.json").exists()
    assert registry.current().published.keys() == {"alpha"}


def test_the_statistics_are_checked_too(registry: Registry) -> None:
    """They are in no revision, only in the digest of their file."""
    place = registry.root / "alpha" / REVISION
    tensors = load_file(place / "probe.safetensors")
    name = "statistics/attention_score.v1/AUROC"
    save_file(tensors | {name: tensors[name] + np.float32(0.01)}, place / "probe.safetensors")
    assert replace(a_revision(0), statistics={}).revision == REVISION
    with pytest.raises(ProbeCorrupt, match=r"probe\.safetensors is not the file"):
        registry.load("alpha")
