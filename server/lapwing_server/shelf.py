"""The probes of a server: which it found, which were sound, which one scores."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from lapwing_detector import embedded
from lapwing_detector.errors import DetectorError, ProbeCorrupt
from lapwing_detector.head_map import escaped
from lapwing_detector.probe import NAME, Probe

log = logging.getLogger("lapwing.server")

MANIFEST = "manifest.json"

LONGEST_REASON = 1000
"""Characters of a reason; paths in it may have any name, on the wire there is only UTF-8."""


@dataclass(frozen=True)
class Shelved:
    """One probe directory and what came of it."""

    name: str
    probe: Probe | None
    """None when it was rejected."""

    reason: str
    """Why it was rejected; empty otherwise."""


@dataclass(frozen=True)
class Shelf:
    """Probes by name."""

    entries: tuple[Shelved, ...]
    """Ordered by name, no name twice."""

    active: Probe
    """The one that scores."""

    def find(self, name: str) -> Shelved | None:
        """The probe of this name; the active one for an empty name."""
        wanted = name or self.active.name
        return next((entry for entry in self.entries if entry.name == wanted), None)

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [entry.name for entry in self.entries]


def shelve(directory: Path | None = None, active: str | None = None) -> Shelf:
    """Loads every probe of a directory; a corrupt one is skipped, and its reason kept.

    Args:
        directory: a probe directory or a directory of probe directories; the embedded probe without one.
        active: name of the probe that scores; the first sound one without a name.

    Raises:
        ProbeCorrupt: there is no sound probe, or none of that name.
    """
    entries: dict[str, Shelved] = {}
    for path in probe_directories(directory or embedded.probe_path()):
        entry = load(path)
        if entry.name in entries:
            entry = Shelved(path.name, None, f"a probe of the name {entry.name} was loaded before; rename one of them")
        entries.setdefault(entry.name, entry)
    sound = [entry.probe for _, entry in sorted(entries.items()) if entry.probe is not None]
    chosen = [probe for probe in sound if active in (None, probe.name)]
    if not chosen:
        wanted = "sound probe" if active is None else f"sound probe named {active!r}"
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in entries.values() if entry.reason)
        raise ProbeCorrupt(
            f"{directory or embedded.probe_path()} holds no {wanted}, only {[probe.name for probe in sound]}"
            + (f" ({reasons})" if reasons else "")
            + "; give --probes a directory that lapwing train wrote"
        )
    return Shelf(tuple(entry for _, entry in sorted(entries.items())), chosen[0])


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
        probe = Probe.from_pretrained(path)
        return Shelved(probe.name, probe, "")
    except DetectorError as error:
        reason = escaped(str(error), LONGEST_REASON)
    except OSError as error:
        reason = f"it can't be read: {type(error).__name__}"
    log.error("probe %s rejected: %s", escaped(path.name), reason)
    return Shelved(escaped(path.name), None, reason)
