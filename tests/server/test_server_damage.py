"""Bit flips, truncations and zeros over every file of a revision: it never serves, and the previous one stays."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from engine_fakes import FakeEngine, a_probe
from probe_registries import a_registry, a_revision, publish

from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from lapwing_server.shelf import Shelf
from lapwing_server.shelving import shelve
from tests.detector.registries import DAMAGES, damage

TIMES = 1000
SOUND = a_revision(0)
SPOILED = a_revision(1, statistics=a_probe().statistics, metrics={"auroc": 0.75})

REQUIRE = FakeEngine().require


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The registry says that the revision scores that is going to be spoiled."""
    registry = a_registry(tmp_path_factory.mktemp("damage") / "registry", SOUND)
    publish(registry, SPOILED, activate=True)
    return registry


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """What the server had before: the sound revision alone."""
    return shelve(a_registry(tmp_path_factory.mktemp("before") / "registry", SOUND).root, require=REQUIRE)


def served(registry: Registry, before: Shelf) -> tuple[Probe, Shelf]:
    """What scores after a reload."""
    shelf = shelve(registry.root, require=REQUIRE, previous=before)
    entry = shelf.find("alpha")
    assert entry is not None
    assert entry.probe is shelf.active
    return shelf.active, shelf


def test_what_is_damaged_never_serves_and_the_previous_one_stays(registry: Registry, before: Shelf) -> None:
    place = registry.root / "alpha" / SPOILED.revision
    files = sorted(place.iterdir())
    assert {"manifest.json", "probe.safetensors", "README.md", "predictions.jsonl"} == {path.name for path in files}
    done: Counter[tuple[str, str]] = Counter()
    for number in range(TIMES):
        draw = random.Random(number)
        path, how = files[number % len(files)], DAMAGES[number // len(files) % len(DAMAGES)]
        whole = damage(path, how, draw)
        active, shelf = served(registry, before)
        assert active is before.active, (number, path.name, how.__name__)
        [rejected] = shelf.entries[0].rejected
        assert rejected.revision == SPOILED.revision, number
        assert rejected.reason, number
        path.write_bytes(whole)
        done[path.name, how.__name__] += 1
    assert len(done) == len(files) * len(DAMAGES)
    # Control: untouched again, it serves.
    active, shelf = served(registry, before)
    assert active.revision == SPOILED.revision
    assert shelf.entries[0].rejected == ()


def test_every_missing_and_every_strange_file_counts_too(registry: Registry, before: Shelf, tmp_path: Path) -> None:
    place = registry.root / "alpha" / SPOILED.revision
    for path in sorted(place.iterdir()):
        path.rename(tmp_path / "aside")
        for spoil in (lambda path=path: None, path.mkdir, lambda path=path: path.symlink_to(tmp_path / "aside")):
            spoil()
            assert served(registry, before)[0] is before.active, path.name
            if path.is_symlink():
                path.unlink()
            elif path.is_dir():
                path.rmdir()
        (tmp_path / "aside").rename(path)
    assert served(registry, before)[0].revision == SPOILED.revision
