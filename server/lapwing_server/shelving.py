"""From a directory to a shelf. What fails its checks is left out, says why, and leaves what served before."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from lapwing_detector import embedded
from lapwing_detector.errors import ProbeCorrupt, UnknownProbe
from lapwing_detector.head_map import escaped
from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from lapwing_detector.registry_files import is_registry
from lapwing_server.finding import Found, Require, fault, fitted, found_in_directory, found_in_registry
from lapwing_server.shelf import Rejected, Shelf, Shelved, ordered

log = logging.getLogger("lapwing.server")


def shelve(
    directory: Path | None = None,
    active: str | None = None,
    *,
    require: Require | None = None,
    previous: Shelf | None = None,
) -> Shelf:
    """Loads the probes of a directory; one that fails its checks is skipped, and its reason kept.

    Args:
        directory: a registry, a probe directory or a directory of probe directories; the embedded probe without one.
        active: name of the probe that scores; the first sound one without a name. A registry says it itself.
        require: refuses a probe of another model.
        previous: the shelf so far: what it has under a name stays where the new one fails its checks.

    Raises:
        ProbeCorrupt: there is no sound probe, or none of that name, and no previous shelf.
        RegistryError: it is a registry that can't be read.
    """
    place = directory or embedded.probe_path()
    if is_registry(place):
        found = found_in_registry(place, active, require)
    else:
        wanted = active or (previous.active.name if previous is not None else "")
        found = found_in_directory(place, wanted, require)
    shelf = first_shelf(found, place) if previous is None else next_shelf(found, place, previous)
    for name, orphan in found.orphans:
        shelf = shelf.with_entry((shelf.find(name) or Shelved(name, None, orphan.reason)).without(orphan))
    for entry in shelf.entries:
        for rejected in entry.rejected:
            log.error("probe %s %s rejected: %s", entry.name, rejected.revision, rejected.reason)
    return shelf


def resolved(shelf: Shelf, name: str, revision: str | None) -> str:
    """The revision that is meant: without one, the one that the name stands for.

    Raises:
        UnknownProbe: there is no such name or revision.
    """
    if (registry := registry_of(shelf)) is not None:
        return registry.current().resolve(name, revision)[1]
    entry = shelf.find(name) if name else None
    if entry is None:
        raise UnknownProbe("name", f"no probe is called {name[:63]!r}", shelf.names)
    held = entry.probe.revision if entry.probe is not None else ""
    if revision and revision != held:
        raise UnknownProbe("revision", f"{name} has no revision {revision[:63]!r}", entry.revisions)
    return held


def activated(shelf: Shelf, name: str, revision: str, require: Require) -> Shelf:
    """The shelf with another probe, or another revision of it, as the active one; a registry keeps it.

    Args:
        shelf: so far.
        name: of the probe.
        revision: of the probe, from `resolved`.
        require: refuses a probe of another model.

    Raises:
        UnknownProbe: there is no such name or revision.
        ProbeCorrupt: it is not sound, or ProbeMismatch: it is of another model; nothing has changed.
        OSError: the registry can't be written; nothing has changed.
    """
    registry = registry_of(shelf)
    if registry is None:
        entry = shelf.find(name)
        if entry is None or entry.probe is None:
            raise ProbeCorrupt(f"probe {name} was rejected: {entry.reason if entry else 'it is gone'}")
        return shelf.with_active(entry.probe, entry.revisions)
    probe = registry.activate(name, revision, require=require)
    current = registry.current()
    changed = shelf.with_active(probe, current.newest_first(name))
    references = current.shadow_references
    return replace(changed, shadows=tuple(one for one in changed.shadows if (one.name, one.revision) in references))


def registry_of(shelf: Shelf) -> Registry | None:
    """What the shelf was loaded from, if that is a registry."""
    return Registry(shelf.directory) if shelf.directory is not None and is_registry(shelf.directory) else None


def fitting(shelf: Shelf, require: Require) -> Shelf:
    """The shelf without the probes of another model, each of which is logged and noted under its name.

    Raises:
        ProbeMismatch: the active one is of another model.
    """
    require(shelf.active)
    entries = {entry.name: fitted(entry, require) for entry in shelf.entries}
    foreign = {shadow.name: (shadow, said) for shadow in shelf.shadows if (said := fault(shadow, require))}
    for name, (shadow, said) in foreign.items():
        entries[name] = entries[name].without(Rejected(shadow.revision, said))
    for before in shelf.entries:
        for rejected in entries[before.name].rejected:
            if rejected not in before.rejected:
                log.error("probe %s %s rejected: %s", before.name, rejected.revision, rejected.reason)
    shadows = tuple(shadow for shadow in shelf.shadows if not fault(shadow, require))
    return replace(shelf, entries=tuple(entries.values()), shadows=shadows)


def first_shelf(found: Found, place: Path) -> Shelf:
    """What a server begins with; raises ProbeCorrupt without a sound probe that scores."""
    sound = [entry.probe for _, entry in sorted(found.entries.items()) if entry.probe is not None]
    chosen = [probe for probe in sound if found.active in ("", probe.name)]
    if not chosen:
        wanted = f"sound probe named {found.active!r}" if found.active else "sound probe"
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in found.entries.values() if entry.reason)
        mend = (
            f"go back: lapwing probes rollback --registry {place}"
            if is_registry(place)
            else "give --probes a directory that lapwing train wrote"
        )
        raise ProbeCorrupt(
            f"{place} holds no {wanted}, only {[probe.name for probe in sound]}"
            + (f" ({reasons})" if reasons else "")
            + f"; {mend}"
        )
    return settled(found.entries, chosen[0], found.shadows, place)


def next_shelf(found: Found, place: Path, previous: Shelf) -> Shelf:
    """What a server goes on with; the active probe stays where the one that should take over failed its checks."""
    entries = {name: kept(entry, previous.find(name)) for name, entry in found.entries.items()}
    wanted = found.entries.get(found.active)
    if wanted is not None and wanted.probe is not None:
        return settled(entries, wanted.probe, found.shadows, place)
    active = previous.active
    gone = Rejected("", f"{escaped(str(place))} does not hold it any more; it scores until another one is activated")
    entry = entries.get(active.name) or Shelved(active.name, None, "", (active.revision,), (gone,))
    entries[active.name] = replace(entry, probe=active, reason="")
    return settled(entries, active, found.shadows, place)


def settled(entries: dict[str, Shelved], active: Probe, shadows: tuple[Probe, ...], place: Path) -> Shelf:
    """The shelf of these parts."""
    beside = tuple(one for one in shadows if (one.name, one.revision) != (active.name, active.revision))
    return Shelf(ordered(tuple(entries.values())), active, beside, place)


def kept(entry: Shelved, before: Shelved | None) -> Shelved:
    """The entry with what was loaded before, if it brings nothing itself."""
    if entry.probe is not None or before is None or before.probe is None:
        return entry
    return replace(entry, probe=before.probe, reason="", revisions=entry.revisions or before.revisions)
