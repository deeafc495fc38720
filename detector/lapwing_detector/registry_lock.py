"""One writer at a time: a lock that the system takes back from whoever is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lapwing_detector.errors import RegistryError

LOCK = ".lock"

PATIENCE = 30.0
"""Seconds to wait for another writer."""

PAUSE = 0.02
"""Seconds between two looks."""


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Holds the lock of a registry.

    Raises:
        RegistryError: somebody else has it and does not let go.
        OSError: the registry can't be written.
    """
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        _take(descriptor, root)
        yield
    finally:
        os.close(descriptor)  # which lets go of it


def _take(descriptor: int, root: Path) -> None:
    import fcntl  # not on Windows, where a registry can be read but not changed

    begun = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - begun > PATIENCE:
                raise RegistryError(f"another process has been changing {root} for {PATIENCE:g} s; try again") from None
            time.sleep(PAUSE)
