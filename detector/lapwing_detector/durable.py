"""Files that are whole or not there, also after a kill or a power cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

UNFINISHED = ".tmp-"
"""How the name begins of what is still being written."""


def write(path: Path, data: bytes) -> None:
    """A file whose content is on the disk when this returns; its name is only after `sync` of its directory."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make(directory: Path) -> None:
    """A directory that is on the disk when this returns, with those above it that were missing."""
    directory = directory.absolute()
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync(place.parent)


def sync(directory: Path) -> None:
    """The names in a directory are on the disk when this returns."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """A file that holds its old content or the new one at every moment, and the new one when this returns."""
    descriptor, name = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        write(partial, data)
        partial.chmod(0o644)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
