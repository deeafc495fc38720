"""What lies in a registry and was never published: what it is and what to do with it. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapwing_detector import durable
from lapwing_detector.errors import DetectorError
from lapwing_detector.probe import NAME
from lapwing_detector.probe_files import load_directory
from lapwing_detector.registry_current import REVISION, Current
from lapwing_detector.registry_files import CURRENT
from lapwing_detector.registry_lock import LOCK


@dataclass(frozen=True)
class Stray:
    """Something that never scores, because the registry does not know of it."""

    path: Path
    reason: str
    """What it is, and what to do with it."""

    name: str = ""
    """Of the probe that it should be by its place; empty where no revision would lie."""

    revision: str = ""


def lying(root: Path) -> list[Path]:
    """Everything in a registry beside its own files: of a probe's directory what is in it, else the thing itself.

    To be looked up before `CURRENT` is read: what is published in between is known then.
    """
    found: list[Path] = []
    for path in inside(root):
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            found += inside(path)
        elif path.name not in (CURRENT, LOCK):
            found.append(path)
    return found


def inside(directory: Path) -> list[Path]:
    """What is in a directory; nothing where it can't be listed: what is published may be read nevertheless."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def strays(root: Path, places: Sequence[Path], current: Current) -> Iterator[Stray]:
    """Those of the places that `current` does not know."""
    for path in places:
        *above, last = path.relative_to(root).parts
        if above and REVISION.fullmatch(last):
            if last not in current.published.get(above[0], {}):
                yield Stray(path, orphan(root, path), above[0], last)
        elif not above and last.startswith(durable.UNFINISHED):
            yield Stray(path, "is half-written: its writer is at work or was killed; the next change removes it then")
        else:
            yield Stray(path, "is no part of a registry and never read; move it away")


def missing(root: Path, current: Current) -> Iterator[Stray]:
    """Published revisions of which nothing lies there any more."""
    for name, known in sorted(current.published.items()):
        for revision in known:
            if not (place := root / name / revision).is_dir():
                yield Stray(place, "was published and is gone; publish the probe again", name, revision)


def orphan(root: Path, place: Path) -> str:
    """What a revision's directory is that was not published, and what to do with it."""
    never = "is not among what was published, so it never scores"
    try:
        probe = load_directory(place)
    except DetectorError as error:
        return f"{never}, and it can't be: {error}; remove {place}"
    except OSError as error:
        return f"{never}, and it can't be read ({error.strerror}); remove {place}"
    if (probe.name, probe.revision) != (place.parent.name, place.name):
        return f"{never}, and it holds {probe.name}@{probe.revision}, which belongs elsewhere; remove {place}"
    return (
        f"{never}: its publisher is at work or was killed; finish it: lapwing probes publish {place} --registry {root}"
    )
