"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 100
"""Of lists and objects inside each other, so that whatever is read can be passed on."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its place at `path` when the block ends well, flushed to the disk.

    Until then, and for ever if the block or the disk fails, a reader sees what was there before.

    Raises:
        OSError: it can't be written, such as for want of room; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise unwritten(error, path) from error
        raise


def unfinished(path: Path) -> list[Path]:
    """What killed runs were still writing in its place."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def unwritten(error: OSError, path: Path) -> OSError:
    """The error with the file that it befell, which an open file does not tell, and what to do."""
    reason = error.strerror or str(error)
    mend = "make room and run the same command again, which goes on"
    return OSError(error.errno or errno.EIO, f"{reason}; what stood there is as it was: {mend}", str(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a neighbour, flush it to the disk, then rename: a reader sees the old file or the new one."""
    with whole_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """UTF-8, compressed when the name ends in .gz; the same text gives the same bytes."""
    data = text.encode()
    write_atomically(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def copy_atomically(source: Path, path: Path) -> None:
    """The same bytes at another path, without holding them in memory."""
    with source.open("rb") as from_file, whole_file(path) as file:
        shutil.copyfileobj(from_file, file, 1 << 20)


def to_json(value: Any) -> str:
    """Readable JSON that never holds NaN."""
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Any:
    """What can also be written again: finite numbers, whole Unicode, not nested without end.

    Raises:
        ValueError: not JSON, or not such JSON.
    """
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        if "\\ud" in text.lower():  # half of a surrogate pair can't be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"\\u{ord(half):x} is half of a surrogate pair; expected whole Unicode") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _depth(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + max((_depth(one) for one in (value.values() if isinstance(value, dict) else value)), default=0)


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
