"""Files that are read anew when they change."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger("lapwing.server")

Content = TypeVar("Content")
Stamp = tuple[tuple[int, int, int, int] | None, ...]


class UnusableFile(ValueError):
    """A file can't be used; the text says which and why, and quotes nothing of it."""


class Watched(Generic[Content]):
    """What some files say. While a change can't be used, what they said before holds, and the log says why.

    Args:
        paths: the files.
        read: reads them.

    Raises:
        UnusableFile: they can't be used from the beginning.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Content]) -> None:
        self._paths, self._read = paths, read
        self._lock = threading.Lock()
        self._stamp = self._look()
        self.content = read()

    def refresh(self) -> bool:
        """Looks whether the files changed; True when there is new content. May be called by any thread."""
        with self._lock:
            stamp = self._look()  # before reading, so that what changes meanwhile is read next time
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                self.content = self._read()
            except UnusableFile as error:
                log.error("what was read before stays in use: %s", error)
                return False
            log.info("read anew: %s", ", ".join(map(str, self._paths)))
            return True

    def _look(self) -> Stamp:
        return tuple(map(stamp_of, self._paths))


def stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    """Is another one when the file is; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def bytes_of(path: Path, most: int = 2**20) -> bytes:
    """All of a small file.

    Raises:
        UnusableFile: it can't be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UnusableFile(f"{path} can't be read: {error.strerror}") from error
    if len(data) > most:
        raise UnusableFile(f"{path} has more than {most} bytes")
    return data
