"""The files of a registry: what is read of them is checked first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lapwing_detector import durable
from lapwing_detector.errors import ProbeCorrupt, RegistryError
from lapwing_detector.probe import NAME, Probe
from lapwing_detector.probe_files import load_directory
from lapwing_detector.registry_current import REVISION, Current, current_of
from lapwing_detector.registry_lock import LOCK

CURRENT = "CURRENT"

MAX_CURRENT = 16 << 20
"""Bytes; a larger file is neither written nor read."""


def is_registry(directory: Path) -> bool:
    """Whether a registry was begun here."""
    return any((directory / name).is_file() for name in (CURRENT, LOCK))


def require_free(root: Path) -> None:
    """Refuses a place that is in use for something else.

    Raises:
        RegistryError: it is.
    """
    if root.exists() and not root.is_dir():
        raise RegistryError(f"{root} is a file; give a registry a directory of its own")
    others = sorted(path.name for path in root.iterdir()) if root.exists() else []
    if others and not is_registry(root):
        raise RegistryError(f"{root} holds {others[0]!r} and is no registry; give it a directory of its own")


def read_current(root: Path) -> Current:
    """See `Registry.current`."""
    path = root / CURRENT
    if not path.is_file():
        if is_registry(root) and not os.path.lexists(path):
            return Current()
        begin = f"lapwing probes publish PROBE --registry {root}"
        raise RegistryError(f"{root} is no registry of probes; begin one: {begin}")
    if not path.resolve().is_relative_to(root.resolve()):
        raise RegistryError(f"{path} leads out of the registry; remove it and publish the probes again")
    try:
        return current_of(capped(path))
    except RegistryError as error:
        raise RegistryError(f"{path} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RegistryError(
            f"{path} is damaged ({error}); remove it and publish the probes again, which keeps their revisions"
        ) from error


def write_current(root: Path, current: Current) -> None:
    """Puts it in force in one step.

    Raises:
        RegistryError: it is too large.
    """
    data = current.to_bytes()
    if len(data) > MAX_CURRENT:
        raise RegistryError(f"{root} holds too many revisions; begin another registry")
    durable.replace(root / CURRENT, data)


def load_revision(root: Path, name: str, revision: str, digest: str) -> Probe:
    """A verified probe.

    Args:
        root: of the registry.
        name: of the probe.
        revision: of the probe.
        digest: SHA-256 of its manifest, from when it was published.

    Raises:
        ProbeCorrupt: it is not what was published, or does not lie in the registry.
    """
    place = root / name / revision
    if not (NAME.fullmatch(name) and REVISION.fullmatch(revision)):
        raise ProbeCorrupt(f"{name[:63]!r} and {revision[:63]!r} are no name and revision")
    require_inside(root, place)
    try:
        probe = load_directory(place, digest)
    except ProbeCorrupt as error:
        raise ProbeCorrupt(f"revision {revision} of {name} is not what was published: {error}") from error
    if (probe.name, probe.revision) != (name, revision):
        raise ProbeCorrupt(f"{place} holds revision {probe.revision} of {probe.name}; remove it and publish it again")
    return probe


def require_inside(root: Path, place: Path) -> None:
    """Refuses a directory that is missing or leads out of the registry, or to another place in it.

    Raises:
        ProbeCorrupt: it does.
    """
    if not place.is_dir() or place.resolve() != root.resolve() / place.relative_to(root):
        raise ProbeCorrupt(f"{place} is missing, or a link that leads elsewhere; publish the probe again")


def capped(path: Path) -> bytes:
    """The content of a small file.

    Raises:
        ValueError: it is too large.
    """
    with path.open("rb") as file:
        data = file.read(MAX_CURRENT + 1)
    if len(data) > MAX_CURRENT:
        raise ValueError(f"it has more than {MAX_CURRENT} bytes")
    return data


def sweep(root: Path) -> None:
    """Removes what killed processes left half-written. Only for who holds the lock: nobody else writes then."""
    for left in root.glob(f"{durable.UNFINISHED}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
