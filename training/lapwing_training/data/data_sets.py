"""Rows of Parquet files and of data sets, through the package `datasets`. Knows no column's meaning."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lapwing_training.data.table_files import Row, require_columns
from lapwing_training.errors import InvalidData, InvalidOption

SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` leaves, and no other."""


@dataclass(frozen=True)
class Source:
    """Where a table lies."""

    name: str
    """A file, a directory, or the name of a data set on the Hub."""

    config: str = ""
    """Of a data set that has several."""

    split: str = ""
    """Of a data set; may be empty where there is only one."""


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a Parquet file, read piece by piece.

    Raises:
        InvalidData: it can't be read, or `datasets` is not installed.
        InvalidOption: a column is not there.
    """
    library = _library(str(path))
    name, place = str(path), glob.escape(str(path))
    with _scratch() as cache:
        data = _told(name, library.load_dataset, "parquet", data_files=place, streaming=True, cache_dir=cache)
        yield from _rows(name, data["train"], columns)


def data_set_rows(source: Source, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a data set from the Hub, from a directory of files or from one that `save_to_disk` wrote.

    It is streamed, so that the first rows need no download of all.

    Raises:
        InvalidData: it can't be read, or `datasets` is not installed.
        InvalidOption: a column or the split is not there.
    """
    library = _library(source.name)
    path = Path(source.name)
    with _scratch() as cache:
        if any((path / name).is_file() for name in SAVED):
            loaded = _told(source.name, library.load_from_disk, source.name)
        else:
            options = {"streaming": True, "cache_dir": cache if path.is_dir() else None}
            loaded = _told(source.name, library.load_dataset, source.name, source.config or None, **options)
        yield from _rows(source.name, _split(loaded, source), columns)


def _library(name: str) -> Any:
    try:
        return import_module("datasets")
    except ModuleNotFoundError as error:
        raise InvalidData(
            name, None, "Parquet and data sets need the package `datasets`; pip install 'lapwing[data]'"
        ) from error


def _scratch() -> TemporaryDirectory[str]:
    """For the locks that the library leaves behind: of local files that are streamed it caches nothing."""
    return TemporaryDirectory(prefix="lapwing-")


def _told(name: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """What the library refuses, of whatever kind: its errors have no common family."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        raise InvalidData(name, None, f"can't be read: {' '.join(str(error).split())[:300]}") from error


def _split(loaded: Any, source: Source) -> Any:
    if not isinstance(loaded, dict):
        if source.split:
            raise InvalidOption(f"split is `{source.split}`; {source.name} has no splits")
        return loaded
    wanted = source.split or (next(iter(loaded)) if len(loaded) == 1 else "")
    if wanted not in loaded:
        raise InvalidOption(f"split is `{wanted}`; the splits of {source.name} are {', '.join(loaded)}")
    return loaded[wanted]


def _rows(name: str, data: Any, columns: Sequence[str]) -> Iterator[Row]:
    found = data.column_names or _told(name, lambda: list(next(iter(data), {})))
    require_columns(name, columns, found)
    # Other columns may be pictures or sound, which would be decoded for nothing.
    needed = [column for column in found if any(column in (one, one.partition(".")[0]) for one in columns)]
    rows = iter(data.select_columns(needed))
    number = 0
    while (values := _told(f"{name}, after row {number}", next, rows, None)) is not None:
        number += 1
        yield Row(number, values, unit="row")
