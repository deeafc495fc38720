"""The probes of a server, as a value: which were sound, which one scores, and what was wrong with the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lapwing_detector.probe import Probe

LONGEST_REASON = 1000
"""Characters of a reason; paths in it may have any name, on the wire there is only UTF-8."""

MOST_REJECTED = 20
"""Rejected revisions that are remembered of one name."""


@dataclass(frozen=True)
class Rejected:
    """A revision that failed its checks."""

    revision: str
    """Empty where nobody knows it, since it could not be read."""

    reason: str


@dataclass(frozen=True)
class Shelved:
    """One name, and what came of loading it."""

    name: str
    probe: Probe | None
    """None when it was rejected, and nothing was loaded under this name before."""

    reason: str = ""
    """Why it was rejected; empty where there is a probe."""

    revisions: tuple[str, ...] = ()
    """That there are of it, newest first."""

    rejected: tuple[Rejected, ...] = ()
    """What could not be loaded; with a probe, what should have taken its place."""

    def without(self, rejected: Rejected) -> Shelved:
        """The same, and one more revision that was rejected."""
        others = tuple(one for one in self.rejected if one.revision != rejected.revision)
        return replace(self, rejected=(rejected, *others)[:MOST_REJECTED])


@dataclass(frozen=True)
class Shelf:
    """Probes by name. A change makes another shelf; a request keeps the one that it began with."""

    entries: tuple[Shelved, ...]
    """Ordered by name, no name twice."""

    active: Probe
    """The one that scores; it stands among the entries."""

    shadows: tuple[Probe, ...] = ()
    """Score beside it, for the metrics."""

    directory: Path | None = None
    """Where they were loaded from; None for a shelf that was made in memory."""

    def find(self, name: str) -> Shelved | None:
        """The entry of this name; that of the active probe for an empty name."""
        wanted = name or self.active.name
        return next((entry for entry in self.entries if entry.name == wanted), None)

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [entry.name for entry in self.entries]

    def with_entry(self, entry: Shelved) -> Shelf:
        """The same with this entry in the place of that of its name."""
        others = (one for one in self.entries if one.name != entry.name)
        return replace(self, entries=ordered((*others, entry)))

    def with_active(self, probe: Probe, revisions: tuple[str, ...]) -> Shelf:
        """The same with a probe that scores from now on.

        Args:
            probe: takes the place of its name.
            revisions: of its name, newest first.
        """
        before = self.find(probe.name)
        rejected = tuple(one for one in (before.rejected if before else ()) if one.revision != probe.revision)
        changed = self.with_entry(Shelved(probe.name, probe, "", revisions, rejected))
        others = tuple(one for one in self.shadows if one.name != probe.name or one.revision != probe.revision)
        return replace(changed, active=probe, shadows=others)


def ordered(entries: tuple[Shelved, ...]) -> tuple[Shelved, ...]:
    """By name."""
    return tuple(sorted(entries, key=lambda entry: entry.name))
