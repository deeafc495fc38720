"""Probes by name and revision in a directory that several processes read and change. Knows no torch.

ROOT/CURRENT           what is in force; replaced as a whole
ROOT/NAME/REVISION/    a probe directory; never changed once it is there
ROOT/.lock             held by whoever changes something
ROOT/.tmp-*            what is being written, or was when somebody was killed
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lapwing_detector import durable
from lapwing_detector.errors import DetectorError, ProbeCorrupt
from lapwing_detector.identity import sha256
from lapwing_detector.probe import Probe
from lapwing_detector.probe_files import MANIFEST, listed_files, load_directory, located, read
from lapwing_detector.registry_current import Current
from lapwing_detector.registry_files import (
    load_revision,
    read_current,
    require_free,
    require_inside,
    sweep,
    write_current,
)
from lapwing_detector.registry_lock import held
from lapwing_detector.registry_strays import Stray, lying, missing, strays


@dataclass(frozen=True)
class Published:
    """What came of publishing."""

    name: str
    revision: str
    new: bool
    """False: the registry had it already."""

    current: Current
    """The registry afterwards."""


@dataclass(frozen=True)
class Verdict:
    """Whether a published revision can be loaded."""

    name: str
    revision: str
    reason: str
    """Why not; empty if it can."""


class Registry:
    """Probes by name, their revisions, and which of them score.

    Reading takes no lock: what is in force changes in one step, and revisions never do.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def current(self) -> Current:
        """What is in force; empty before anything was published.

        Raises:
            RegistryError: there is no registry, or what it says can't be read.
        """
        return read_current(self.root)

    def load(self, name: str, revision: str | None = None) -> Probe:
        """A revision, verified; without one, that which the name stands for.

        Raises:
            UnknownProbe: it was not published.
            ProbeCorrupt: it is not what was published.
        """
        return self._load(self.current(), name, revision)

    def publish(self, source: str | Path, *, activate: bool = False) -> Published:
        """Copies a probe into the registry, whole or not at all; makes the registry if there is none.

        Args:
            source: a probe directory, or the id of one on the Hugging Face Hub.
            activate: whether it scores from now on; see `Current.with_published` for what holds otherwise.

        Raises:
            ProbeCorrupt: the source is damaged, or the registry's copy of the same revision is.
            RegistryError: the root holds other things, or another process holds the registry.
            OSError: it can't be written.
        """
        directory = located(source)
        load_directory(directory)  # a registry is not begun for a probe that is none
        with self._changing(begin=True) as current, self._copied(directory) as copy:
            digest = sha256(read(copy, MANIFEST))
            probe = load_directory(copy, digest)
            name, revision, known = probe.name, probe.revision, current.published.get(probe.name, {})
            if os.path.lexists(self.root / name / revision):
                digest = known.get(revision, digest)  # not known: its publisher was killed before it could tell
            self._place(copy, name, revision, digest)
            after = self._put(current, current.with_published(name, revision, digest, activate=activate))
            return Published(name, revision, revision not in known, after)

    def activate(
        self, name: str, revision: str | None = None, *, require: Callable[[Probe], None] | None = None
    ) -> Probe:
        """Makes a probe the one that scores, after it was verified; returns it.

        Args:
            name: of the probe.
            revision: which its name stands for from now on; without it, that which it stands for now.
            require: raises if the probe can't be used; then nothing changes.

        Raises:
            UnknownProbe: it was not published.
            ProbeCorrupt: it is not what was published.
            OSError: the registry can't be written.
        """
        with self._changing() as current:
            probe = self._load(current, name, revision)
            if require is not None:
                require(probe)
            self._put(current, current.with_active(name, revision))
        return probe

    def rollback(self, name: str | None = None) -> Current:
        """Undoes the last change; see `Current.rolled_back`. What comes back is verified first.

        Raises:
            RegistryError: there is nothing to go back to.
            ProbeCorrupt: what would come back is not what was published.
        """
        with self._changing() as current:
            back = current.rolled_back(name)
            self._load(back, name or back.active, None)
            return self._put(current, back)

    def shadow(self, name: str, revision: str | None = None, *, on: bool = True) -> Current:
        """Lets a probe score beside the active one, for the metrics only, or ends that.

        Raises:
            UnknownProbe: it was not published, or is no shadow that could end.
            ProbeCorrupt: it is not what was published.
        """
        with self._changing() as current:
            changed = current.with_shadow(name, revision, on=on)
            if on:
                self._load(current, name, revision)
            return self._put(current, changed)

    def verify(self) -> list[Verdict]:
        """Every published revision, by name and then oldest first."""
        current = self.current()
        return [
            Verdict(name, revision, self._fault(current, name, revision))
            for name in sorted(current.published)
            for revision in current.published[name]
        ]

    def strays(self) -> list[Stray]:
        """What lies here and was never published."""
        places = lying(self.root)
        return list(strays(self.root, places, self.current()))

    def missing(self) -> list[Stray]:
        """Published revisions that are gone; whether those that are there are sound, `verify` says."""
        return list(missing(self.root, self.current()))

    def _fault(self, current: Current, name: str, revision: str) -> str:
        try:
            self._load(current, name, revision)
        except (DetectorError, OSError) as error:
            return str(error)
        return ""

    def _load(self, current: Current, name: str, revision: str | None) -> Probe:
        name, revision = current.resolve(name, revision)
        return load_revision(self.root, name, revision, current.published[name][revision])

    @contextmanager
    def _changing(self, *, begin: bool = False) -> Iterator[Current]:
        """Keeps other processes from changing the registry, and sweeps up after those that were killed.

        Args:
            begin: makes a registry where there is none.
        """
        if begin:
            require_free(self.root)
            durable.make(self.root)
        else:
            self.current()  # no lock is left where there is no registry
        with held(self.root):
            sweep(self.root)
            yield self.current()

    @contextmanager
    def _copied(self, source: Path) -> Iterator[Path]:
        """The files of a probe in a new directory that belongs to nobody yet, and is gone afterwards."""
        copy = Path(tempfile.mkdtemp(prefix=durable.UNFINISHED, dir=self.root))
        try:
            for name in listed_files(source):
                durable.write(copy / name, read(source, name))
            copy.chmod(0o755)
            durable.sync(copy)
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _place(self, copy: Path, name: str, revision: str, digest: str) -> None:
        """Gives the copy its final name, unless the revision is there and sound; `digest` is of its manifest."""
        place = self.root / name / revision
        if os.path.lexists(place):
            try:
                load_revision(self.root, name, revision, digest)
            except ProbeCorrupt as error:
                raise ProbeCorrupt(f"{error}; to publish it again, remove {place} first") from error
            durable.sync(place.parent)  # whoever put it there may have been killed before this
            return
        place.parent.mkdir(exist_ok=True)
        require_inside(self.root, place.parent)
        durable.sync(self.root)
        copy.rename(place)
        durable.sync(place.parent)

    def _put(self, before: Current, after: Current) -> Current:
        if after != before:
            write_current(self.root, after)
        return after
