"""What lies in a registry and was never published is told, with what to do; and doing it helps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapwing_detector.registry import Registry
from lapwing_detector.registry_current import Current
from lapwing_detector.registry_strays import Stray, lying, strays
from tests.detector.registries import a_revision, sources

REVISIONS = [a_revision(number).revision for number in range(3)]
ELSEWHERE = "0" * 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sources(tmp_path_factory.mktemp("saved"), 3)


@pytest.fixture
def registry(tmp_path: Path, saved: list[Path]) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.publish(saved[0])
    registry.publish(saved[1])
    return registry


def only(found: list[Stray]) -> Stray:
    [stray] = found
    return stray


def test_control_a_whole_registry_has_none(registry: Registry) -> None:
    assert registry.strays() == registry.missing() == []


def test_an_orphan_says_how_to_finish_it_and_that_helps(registry: Registry, saved: list[Path]) -> None:
    place = Path(shutil.copytree(saved[2], registry.root / "alpha" / REVISIONS[2]))
    stray = only(registry.strays())
    assert (stray.path, stray.name, stray.revision) == (place, "alpha", REVISIONS[2])
    assert f"lapwing probes publish {place} --registry {registry.root}" in stray.reason
    assert registry.publish(place).new
    assert registry.strays() == []
    assert registry.load("alpha", REVISIONS[2]).bias == 2.0


@pytest.mark.parametrize("name", ["alpha", "gamma"])
def test_an_orphan_in_the_wrong_place_says_what_it_is(registry: Registry, saved: list[Path], name: str) -> None:
    place = Path(shutil.copytree(saved[2], registry.root / name / ELSEWHERE))
    stray = only(registry.strays())
    assert (stray.name, stray.revision) == (name, ELSEWHERE)
    assert f"it holds alpha@{REVISIONS[2]}, which belongs elsewhere; remove {place}" in stray.reason


def test_a_half_of_an_orphan_says_what_it_lacks(registry: Registry, saved: list[Path]) -> None:
    place = Path(shutil.copytree(saved[2], registry.root / "alpha" / REVISIONS[2]))
    (place / "probe.safetensors").unlink()
    reason = only(registry.strays()).reason
    assert "probe.safetensors is missing" in reason
    assert reason.endswith(f"remove {place}")


def test_what_a_killed_writer_left_is_told_and_swept_by_the_next_change(registry: Registry, saved: list[Path]) -> None:
    (registry.root / ".tmp-killed").mkdir()
    stray = only(registry.strays())
    assert (stray.path.name, stray.revision) == (".tmp-killed", "")
    assert "half-written" in stray.reason
    registry.publish(saved[2])
    assert registry.strays() == []


def test_what_is_no_part_of_a_registry_is_told(registry: Registry, tmp_path: Path) -> None:
    (registry.root / "notes.txt").touch()
    (registry.root / "alpha" / "old").mkdir()
    (registry.root / "link").symlink_to(tmp_path)
    found = registry.strays()
    assert {stray.path.name for stray in found} == {"old", "link", "notes.txt"}
    assert all("move it away" in stray.reason and not stray.revision for stray in found)


def test_a_published_revision_that_is_gone_is_told_and_published_again(registry: Registry, saved: list[Path]) -> None:
    shutil.rmtree(registry.root / "alpha" / REVISIONS[0])
    gone = only(registry.missing())
    assert (gone.name, gone.revision) == ("alpha", REVISIONS[0])
    assert "publish the probe again" in gone.reason
    registry.publish(saved[0])
    assert registry.missing() == []


def test_what_is_published_while_one_looks_is_no_stray(registry: Registry, saved: list[Path]) -> None:
    before = registry.current()
    places = lying(registry.root)
    registry.publish(saved[2])
    assert not list(strays(registry.root, places, registry.current()))
    late = [stray.revision for stray in strays(registry.root, lying(registry.root), before)]
    assert late == [REVISIONS[2]], "control: with CURRENT from before it would be one"


@pytest.mark.parametrize("closed", ["", "private", "alpha"])
def test_what_can_not_be_listed_stops_nobody(registry: Registry, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    """As a folder of somebody else's; whoever tests as root may list every one, so that the refusal is played."""
    (registry.root / "private").mkdir()
    (registry.root / "notes.txt").touch()
    there = Path.iterdir

    def listing(path: Path) -> Iterator[Path]:
        if path == registry.root / closed:
            raise PermissionError
        return there(path)

    assert only(registry.strays()).path.name == "notes.txt", "control"
    monkeypatch.setattr(Path, "iterdir", listing)
    assert [stray.path.name for stray in registry.strays()] == (["notes.txt"] if closed else [])
    assert registry.load("alpha").bias == 0.0


def test_without_a_CURRENT_everything_is_an_orphan(registry: Registry) -> None:  # noqa: N802
    (registry.root / "CURRENT").unlink()
    assert registry.current() == Current()
    assert [stray.revision for stray in registry.strays()] == sorted(REVISIONS[:2])
