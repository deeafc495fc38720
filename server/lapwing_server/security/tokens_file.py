"""Writes the file of tokens, so that a server that reads it meanwhile sees all of a change or nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lapwing_server.security.tokens import grants_of
from lapwing_server.security.watched import UnusableFile, bytes_of


def add(lines: str, path: Path) -> None:
    """Appends lines, when a server could use what comes of it; makes the file, for its owner only, if there is none.

    The file is replaced in one step by one of the same owner and rights. Where two add at once, both are in it.

    Raises:
        UnusableFile: the file is not as it should be, or can't be written; it is as it was before.
    """
    path = path.resolve()  # the file that a link stands for is replaced, not the link
    try:
        with locked(path.parent):
            before = bytes_of(path) if path.exists() else b""
            if before:
                grants_of(before, path)
                before = before.rstrip() + b"\n\n"
            data = before + lines.encode() + b"\n"
            grants_of(data, path)
            replace(path, data)
    except OSError as error:
        raise UnusableFile(f"{path} can't be written: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among those who add to a file of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Puts the data there, whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            found = path.stat()
            os.chown(name, found.st_uid, found.st_gid)
            shutil.copystat(path, name)
            os.utime(name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
