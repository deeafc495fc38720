"""Files that are looked at again and again, and read anew when they change."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

log = logging.getLogger("lapwing.server")

INTERVAL: Final = 1.0
"""Seconds between two looks: a token that is taken back is known for about so long."""

PATIENCE: Final = 10.0
"""Seconds after which a look that has not come back is one at a disk that hangs."""

Content = TypeVar("Content")
Stamp = tuple[tuple[int, int, int, int] | None, ...]


class UnusableFile(ValueError):
    """A file can't be used; the text says which and why, and quotes nothing of it."""


class Watched(Generic[Content]):
    """What some files say. While they can't be read, what they said before holds, and the log says why, once.

    Only `refresh` touches the disk, so that whoever needs `content` never waits for one.

    Args:
        paths: the files.
        read: reads them.

    Raises:
        UnusableFile: they can't be used from the beginning.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], Content]) -> None:
        self._paths, self._read = paths, read
        self._lock = threading.Lock()
        self._complaint: tuple[Stamp, str] | None = None
        self._looking_since: float | None = None
        self._stamp = self._look()
        self.content = read()

    @property
    def stale(self) -> bool:
        """Whether `content` may not be what the files say: they can't be read, or a look at them does not end."""
        since = self._looking_since
        return self._complaint is not None or (since is not None and time.monotonic() - since > PATIENCE)

    def refresh(self) -> bool:
        """Looks whether the files changed; True when there is new content. May be called by any thread.

        A change that can't be read is tried again at the next look: what went wrong may have been ours and passing.
        """
        with self._lock:
            self._looking_since = time.monotonic()
            try:
                return self._refresh()
            finally:
                self._looking_since = None

    def _refresh(self) -> bool:
        stamp = self._look()  # before reading, so that what changes meanwhile is read next time
        if stamp == self._stamp:
            self._complaint = None
            return False
        try:
            self.content = self._read()
        except UnusableFile as error:
            self._complain(stamp, str(error))
            return False
        except Exception as error:
            self._complain(stamp, f"{self} can't be read: {type(error).__name__}")
            return False
        self._stamp, self._complaint = stamp, None
        log.info("read anew: %s", self)
        return True

    def __str__(self) -> str:
        return ", ".join(map(str, self._paths))

    def _complain(self, stamp: Stamp, why: str) -> None:
        if self._complaint != (stamp, why):
            log.error("what was read before stays in use: %s", why)
        self._complaint = stamp, why

    def _look(self) -> Stamp:
        return tuple(map(stamp_of, self._paths))


class Watcher:
    """Looks at files from a thread of its own, so that a disk that hangs holds up nobody else.

    Args:
        interval: seconds between two looks.
    """

    def __init__(self, interval: float = INTERVAL) -> None:
        self.files: dict[str, Watched[Any]] = {}
        """By the name of the setting that names them."""
        self._interval = interval
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, name: str, file: Watched[Any]) -> None:
        """Files to look at, called by the name of their setting."""
        self.files[name] = file

    def start(self) -> None:
        """Begins; without files there is no thread."""
        if self.files:
            self._thread = threading.Thread(target=self._run, name="lapwing-watcher", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends; does not wait for a look that hangs. As often as one likes."""
        self._ended.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(INTERVAL)

    def look(self) -> None:
        """One look at all of them."""
        for file in self.files.values():
            file.refresh()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self.look()


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
