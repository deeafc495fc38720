"""Any order of changes, damages and reloads: the registry and the server do what a few dictionaries say."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
from engine_fakes import FakeEngine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from probe_registries import a_revision

from lapwing_detector.errors import DetectorError, ProbeCorrupt, RegistryError
from lapwing_detector.registry import Registry
from lapwing_server.shelf import Shelf
from lapwing_server.shelving import shelve
from tests.detector.registries import DAMAGES, damage, write_probe

SOAK = bool(os.environ.get("LAPWING_SOAK"))
NAMES, EACH = ("alpha", "beta"), 3
PROBES = {(name, number): a_revision(number, name) for name in NAMES for number in range(EACH)}
REVISION = {key: probe.revision for key, probe in PROBES.items()}

names, numbers = st.sampled_from(NAMES), st.integers(0, EACH - 1)
Key = tuple[str, int]


@dataclass
class Model:
    """A registry, told once more in the plainest way."""

    active: str = ""
    previous: str = ""
    order: dict[str, list[int]] = field(default_factory=dict)
    """Of each name what was published, oldest first."""

    stands: dict[str, int] = field(default_factory=dict)
    before: dict[str, list[int]] = field(default_factory=dict)
    shadows: list[tuple[str, int | None]] = field(default_factory=list)
    broken: set[Key] = field(default_factory=set)

    @property
    def whole(self) -> list[Key]:
        """What was published and not spoiled."""
        return [(name, one) for name, known in self.order.items() for one in known if (name, one) not in self.broken]

    def exact(self, name: str, number: int | None) -> Key:
        return name, self.stands[name] if number is None else number

    def stand(self, name: str, number: int) -> None:
        if self.stands.get(name, number) != number:
            self.before.setdefault(name, []).append(self.stands[name])
        self.stands[name] = number

    def score(self, name: str, number: int) -> None:
        if (name, number) == (self.active, self.stands.get(name)):
            return
        self.previous = self.active if name != self.active else ""
        self.stand(name, number)
        self.active = name
        self.forget_shadows()

    def forget_shadows(self) -> None:
        self.shadows = [one for one in self.shadows if self.exact(*one) != (self.active, self.stands[self.active])]


class Machine(RuleBasedStateMachine):
    """Changes a registry in every way, beside the model; a server reloads now and then."""

    saved: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="lapwing-machine-"))
        self.registry = Registry(self.place / "registry")
        self.model = Model()
        self.shelf: Shelf | None = None
        self.served: dict[str, int] = {}
        self.scores: Key | None = None
        self.fsync = mock.patch.object(os, "fsync")  # nobody pulls a plug here
        self.fsync.start()

    def teardown(self) -> None:
        self.fsync.stop()
        shutil.rmtree(self.place)

    # Changes.

    @rule(name=names, number=numbers, activate=st.booleans())
    def publish(self, name: str, number: int, activate: bool) -> None:
        model, source = self.model, self.saved / f"{name}-{number}"
        if (name, number) in model.broken:
            with pytest.raises(ProbeCorrupt, match="first"):
                self.registry.publish(source, activate=activate)
            return
        new = number not in model.order.get(name, [])
        assert self.registry.publish(source, activate=activate).new == new
        if new:
            model.order.setdefault(name, []).append(number)
        if activate or not model.active:
            model.score(name, number)
        elif new and name != model.active:
            model.stand(name, number)

    @rule(name=names, number=st.none() | numbers)
    def activate(self, name: str, number: int | None) -> None:
        key = self.tried(lambda: self.registry.activate(name, self.revision(name, number)), name, number)
        if key is not None:
            self.model.score(*key)

    @rule(name=st.none() | names)
    def roll_back(self, name: str | None) -> None:
        model = self.model
        if not model.active:
            return
        if name is None and model.previous:
            if (model.previous, model.stands[model.previous]) in model.broken:
                with pytest.raises(ProbeCorrupt):
                    self.registry.rollback()
                return
            self.registry.rollback()
            model.active, model.previous = model.previous, ""
        else:
            wanted = name or model.active
            older = model.before.get(wanted, [])
            if wanted not in model.order or not older or (wanted, older[-1]) in model.broken:
                with pytest.raises((RegistryError, ProbeCorrupt)):
                    self.registry.rollback(name)
                return
            self.registry.rollback(name)
            model.stands[wanted] = older.pop()
        model.forget_shadows()

    @rule(name=names, number=st.none() | numbers, on=st.booleans())
    def shadow(self, name: str, number: int | None, on: bool) -> None:
        model, revision = self.model, self.revision(name, number)
        if not on:
            if (name, number) not in model.shadows:
                with pytest.raises(RegistryError):
                    self.registry.shadow(name, revision, on=False)
                return
            self.registry.shadow(name, revision, on=False)
            model.shadows.remove((name, number))
            return
        if name in model.order and model.exact(name, number) == (model.active, model.stands[model.active]):
            with pytest.raises(RegistryError, match="is the active probe"):
                self.registry.shadow(name, revision)
            return
        if self.tried(lambda: self.registry.shadow(name, revision), name, number) is not None:
            model.shadows = [one for one in model.shadows if one != (name, number)] + [(name, number)]

    # What nobody wants.

    @precondition(lambda self: self.model.whole)
    @rule(data=st.data(), seed=st.integers(0, 10_000))
    def spoil(self, data: Any, seed: int) -> None:
        self.spoil_one(*data.draw(st.sampled_from(self.model.whole)), seed)

    def spoil_one(self, name: str, number: int, seed: int) -> None:
        if (name, number) in self.model.broken:
            return
        draw = random.Random(seed)
        path = draw.choice(sorted((self.registry.root / name / REVISION[name, number]).iterdir()))
        damage(path, draw.choice(DAMAGES), draw)
        self.model.broken.add((name, number))

    @precondition(lambda self: self.model.broken)
    @rule(data=st.data())
    def mend(self, data: Any) -> None:
        """As one is told to: remove it, and publish it again."""
        name, number = data.draw(st.sampled_from(sorted(self.model.broken)))
        shutil.rmtree(self.registry.root / name / REVISION[name, number])
        self.registry.publish(self.saved / f"{name}-{number}")
        self.model.broken.discard((name, number))

    @rule(name=names, number=numbers, late=st.booleans())
    def leave_half(self, name: str, number: int, late: bool) -> None:
        """What a publisher leaves that is killed: early, or just before it could say that it was done."""
        if not self.registry.root.exists():
            return
        left = self.registry.root / (f"{name}/{REVISION[name, number]}" if late else ".tmp-killed")
        if not left.exists() and number not in self.model.order.get(name, []):
            shutil.copytree(self.saved / f"{name}-{number}", left)
            if not late:
                (left / "manifest.json").unlink()

    # The server.

    @precondition(lambda self: self.model.active)
    @rule(times=st.integers(1, 2))
    def reload(self, times: int) -> None:
        for _ in range(times):
            self.reload_once()

    @precondition(lambda self: self.shelf is not None)
    @rule(number=numbers, seed=st.integers(0, 10_000))
    def activate_something_broken(self, number: int, seed: int) -> None:
        """As when the disk loses it between two looks; what is rare by chance is what this is about."""
        name = self.model.active
        if number != self.model.stands[name]:
            self.publish(name, number, True)
        self.spoil_one(name, self.model.stands[name], seed)
        self.reload_once()

    def reload_once(self) -> None:
        model, require = self.model, FakeEngine().require
        sound = {name: number for name, number in model.stands.items() if (name, number) not in model.broken}
        if self.shelf is None and model.active not in sound:
            with pytest.raises(ProbeCorrupt, match="no sound probe named"):
                shelve(self.registry.root, require=require)
            return
        self.shelf = shelve(self.registry.root, require=require, previous=self.shelf)
        before = self.served
        self.served = {name: sound.get(name, before.get(name, -1)) for name in model.order}
        if model.active in sound:
            self.scores = model.active, sound[model.active]
        else:
            assert self.scores is not None
            self.served[self.scores[0]] = self.scores[1]
        wanted = {model.exact(*one) for one in model.shadows} - model.broken - {self.scores}
        assert {(one.name, one.revision) for one in self.shelf.shadows} == {
            (name, REVISION[name, number]) for name, number in wanted
        }
        for name, number in model.stands.items():
            entry = self.shelf.find(name)
            assert entry is not None
            assert ((name, number) in model.broken) == (
                REVISION[name, number] in {rejected.revision for rejected in entry.rejected}
            )

    @invariant()
    def the_server_serves_what_it_should(self) -> None:
        if self.shelf is None or self.scores is None:
            return
        assert (self.shelf.active.name, self.shelf.active.revision) == (self.scores[0], REVISION[self.scores])
        held = {entry.name: entry.probe.revision for entry in self.shelf.entries if entry.probe is not None}
        assert held == {name: REVISION[name, number] for name, number in self.served.items() if number >= 0}
        bias = {probe.revision: probe.bias for probe in PROBES.values()}
        assert all(entry.probe.bias == bias[entry.probe.revision] for entry in self.shelf.entries if entry.probe)

    @invariant()
    def the_registry_says_what_the_model_says(self) -> None:
        if not self.registry.root.exists():
            return
        model, current = self.model, Registry(self.registry.root).current()
        assert (current.active, current.previous) == (model.active, model.previous)
        assert current.revisions == {name: REVISION[name, number] for name, number in model.stands.items()}
        assert {name: list(older) for name, older in current.history.items() if older} == {
            name: [REVISION[name, number] for number in older] for name, older in model.before.items() if older
        }
        assert {name: list(known) for name, known in current.published.items()} == {
            name: [REVISION[name, number] for number in known] for name, known in model.order.items()
        }
        assert [one.partition("@")[::2] for one in current.shadows] == [
            (name, "" if number is None else REVISION[name, number]) for name, number in model.shadows
        ]

    @invariant()
    def what_is_sound_loads_and_what_is_spoiled_does_not(self) -> None:
        if self.registry.root.exists():
            verdicts = {(one.name, one.revision): bool(one.reason) for one in self.registry.verify()}
            broken = {(name, REVISION[name, number]) for name, number in self.model.broken}
            assert {key for key, wrong in verdicts.items() if wrong} == broken

    def revision(self, name: str, number: int | None) -> str | None:
        return None if number is None else REVISION[name, number]

    def tried(self, change: Callable[[], object], name: str, number: int | None) -> Key | None:
        """What was meant, if the change was made; it must fail just where the model says so."""
        model = self.model
        known = name in model.order and (number is None or number in model.order[name])
        if known and model.exact(name, number) not in model.broken:
            change()
            assert not list(self.registry.root.glob(".tmp-*")), "whoever changes something sweeps"
            return model.exact(name, number)
        with pytest.raises(ProbeCorrupt if known else RegistryError) as caught:
            change()
        assert isinstance(caught.value, DetectorError)
        return None


def test_the_registry_and_the_server_do_what_the_model_does(tmp_path: Path) -> None:
    Machine.saved = tmp_path
    for (name, number), probe in PROBES.items():
        write_probe(tmp_path / f"{name}-{number}", probe)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=1000 if SOAK else 40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
