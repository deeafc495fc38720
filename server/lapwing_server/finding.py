"""What a directory of probes or a registry holds: each is loaded and checked, or says why it can't be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lapwing_detector.errors import DetectorError, RegistryError
from lapwing_detector.head_map import escaped
from lapwing_detector.probe import NAME, Probe
from lapwing_detector.probe_files import MANIFEST, load_directory
from lapwing_detector.registry import Registry
from lapwing_detector.registry_current import Current
from lapwing_detector.registry_files import load_revision
from lapwing_detector.registry_strays import lying, strays
from lapwing_server.shelf import LONGEST_REASON, Rejected, Shelved

Require = Callable[[Probe], None]
"""Raises ProbeMismatch for a probe that the model can't be scored with."""

MOST_ORPHANS = 10
"""Few, so that they never crowd out what was published and rejected."""


@dataclass(frozen=True)
class Found:
    """What a directory holds."""

    entries: dict[str, Shelved]
    active: str
    """Name of the probe that should score; empty for whichever is sound."""

    shadows: tuple[Probe, ...] = ()
    orphans: tuple[tuple[str, Rejected], ...] = ()
    """Name and fault of what lies there like a revision and was never published."""


def found_in_registry(root: Path, active: str | None, require: Require | None) -> Found:
    """The revisions that the names of a registry stand for.

    Raises:
        RegistryError: it can't be read, is empty, or a name is given that it should say itself.
    """
    places = lying(root)
    current = Registry(root).current()
    if not current.active:
        raise RegistryError(f"{root} is an empty registry; publish a probe: lapwing probes publish PROBE")
    if active is not None and active != current.active:
        raise RegistryError(
            f"{root} is a registry, which says itself that {current.active} scores; leave --probe {active} out, "
            f"or run: lapwing probes activate {active} --registry {root}"
        )
    entries = {name: registered(root, current, name, require) for name in current.revisions}
    shadows = []
    for name, revision in current.shadow_references:
        outcome: Probe | Rejected | None = entries[name].probe
        if revision != current.revisions[name]:
            outcome = taken(root, current, name, revision, require)
        if isinstance(outcome, Rejected):
            entries[name] = entries[name].without(outcome)
        elif outcome is not None:
            shadows.append(outcome)
    return Found(entries, current.active, tuple(shadows), orphans(root, places, current))


def orphans(root: Path, places: Sequence[Path], current: Current) -> tuple[tuple[str, Rejected], ...]:
    """What `Found` tells of them; the first ones, if there are many."""
    found = (
        (stray.name, Rejected(stray.revision, escaped(stray.reason, LONGEST_REASON)))
        for stray in strays(root, places, current)
        if stray.revision
    )
    return tuple(islice(found, MOST_ORPHANS))


def registered(root: Path, current: Current, name: str, require: Require | None) -> Shelved:
    """The revision that a name stands for."""
    outcome = taken(root, current, name, current.revisions[name], require)
    revisions = current.newest_first(name)
    if isinstance(outcome, Rejected):
        return Shelved(name, None, outcome.reason, revisions, (outcome,))
    return Shelved(name, outcome, "", revisions)


def taken(root: Path, current: Current, name: str, revision: str, require: Require | None) -> Probe | Rejected:
    """A published revision, or why it can't be used."""
    try:
        probe = load_revision(root, name, revision, current.published[name][revision])
        reason = fault(probe, require)
    except DetectorError as error:
        reason = escaped(str(error), LONGEST_REASON)
    except OSError as error:
        reason = f"it can't be read: {type(error).__name__}"
    return Rejected(revision, reason) if reason else probe


def found_in_directory(directory: Path, active: str, require: Require | None) -> Found:
    """The probe that it is, or the probes in it."""
    entries: dict[str, Shelved] = {}
    for path in probe_directories(directory):
        entry = fitted(load(path), require)
        if entry.name in entries:
            reason = f"a probe of the name {entry.name} was loaded before; rename one of them"
            entry = Shelved(path.name, None, reason, (), (Rejected("", reason),))
        entries.setdefault(entry.name, entry)
    return Found(entries, active)


def probe_directories(directory: Path) -> list[Path]:
    """The directory itself when it is a probe, whatever its name; else the folders in it that may hold one, by name.

    They are named as probes are, so that hidden and half-written ones are left alone, and do not lead out of it.
    """
    if (directory / MANIFEST).is_file():
        return [directory]
    if not directory.is_dir():
        return []
    root = directory.resolve()
    return [
        path
        for path in sorted(directory.iterdir())
        if NAME.fullmatch(path.name) and path.is_dir() and path.resolve().is_relative_to(root)
    ]


def load(path: Path) -> Shelved:
    """One probe directory."""
    try:
        probe = load_directory(path)
        return Shelved(probe.name, probe, "", (probe.revision,))
    except DetectorError as error:
        reason = escaped(str(error), LONGEST_REASON)
    except OSError as error:
        reason = f"it can't be read: {type(error).__name__}"
    return Shelved(escaped(path.name), None, reason, (), (Rejected("", reason),))


def fitted(entry: Shelved, require: Require | None) -> Shelved:
    """The entry, without its probe if that is of another model."""
    reason = fault(entry.probe, require) if entry.probe is not None else ""
    if entry.probe is None or not reason:
        return entry
    rejected = Rejected(entry.probe.revision, reason)
    return replace(entry, probe=None, reason=reason, rejected=(rejected, *entry.rejected))


def fault(probe: Probe, require: Require | None) -> str:
    """Why the model can't be scored with the probe; empty if it can."""
    try:
        if require is not None:
            require(probe)
    except DetectorError as error:
        return escaped(str(error), LONGEST_REASON)
    return ""
