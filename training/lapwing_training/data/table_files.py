"""Rows of other people's CSV, JSON and JSON Lines files, one after the other. Knows no column's meaning."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.files import from_json

LONGEST_CELL = 1 << 24
"""Characters of a CSV cell; the module's own limit is below the length of a retrieved context."""

SPACE = re.compile(r"[ \t\r\n]*")
UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Row:
    """One row of a table, or why it is none."""

    number: int
    """From 1: of the row, or of the line where it starts."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """By column."""

    fault: str = ""
    """Why it can't be read; empty for a row that was."""

    unit: str = "line"
    """What `number` counts: `line` or `row`."""

    @property
    def place(self) -> str:
        """Where it is, such as `line 7`."""
        return f"{self.unit} {self.number}"


def require_columns(source: object, columns: Iterable[str], found: Iterable[str]) -> None:
    """All columns are there; of `a.b`, at least `a`.

    Raises:
        InvalidOption: names the columns that were found.
    """
    known = list(found)
    for name in columns:
        if name not in known and name.partition(".")[0] not in known:
            raise InvalidOption(f"column is `{name}`; the columns of {source} are {', '.join(known) or 'none'}")


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a comma-separated file whose first line names the columns; blank lines are passed over.

    Raises:
        InvalidData: there is no header, or it names a column twice.
        InvalidOption: a column is not there.
    """
    with _opened(path) as file, _long_cells():
        reader = csv.reader(file, strict=True)
        header = _header(path, reader)
        require_columns(path, columns, header)
        yield from _records(reader, header)


def json_line_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file of one JSON object a line; blank lines are passed over.

    Raises:
        InvalidOption: a column is in no row; known at the end.
    """
    with _opened(path) as file:
        rows = (_object(number, line) for number, line in enumerate(file, 1) if line.strip())
        yield from _known(path, columns, rows)


def json_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of one JSON list of objects, which is held in memory as text; JSON Lines by the same name are read, too.

    Raises:
        InvalidData: it is neither.
        InvalidOption: a column is in no row; known at the end.
    """
    with _opened(path) as file:
        is_list = not file.read(1 << 12).lstrip().startswith("{")
    if not is_list:
        yield from json_line_rows(path, columns)
        return
    with _opened(path) as file:
        text = file.read()
    yield from _known(path, columns, (_object(line, element) for line, element in _elements(path, text)))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Bytes that are not UTF-8 are kept as halves of surrogate pairs, so that only their own row is broken."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield cast(TextIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidData(path, None, f"can't be read: {error}") from error


@contextmanager
def _long_cells() -> Iterator[None]:
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, reader: Any) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise InvalidData(path, 1, f"no header of CSV ({error})") from error
    if not header:
        raise InvalidData(path, None, "starts without a header; expected the names of the columns in the first line")
    for name in header:
        if header.count(name) > 1:
            raise InvalidData(path, 1, f"column `{name}` stands there {header.count(name)} times; name each once")
    return header


def _records(reader: Any, header: Sequence[str]) -> Iterator[Row]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num
            together = f"; lines {line} to {last} were read as one" if last > line else ""
            yield from (Row(one, fault=f"no row of CSV ({error}{together})") for one in range(line, last + 1))
            continue
        if cells:
            yield _record(line, header, cells)


def _record(line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        return Row(line, fault=f"{len(cells)} cells; the header has {len(header)}")
    values = dict(zip(header, cells, strict=True))
    broken = [name for name, cell in values.items() if _undecoded(cell)]
    return Row(line, values, f"column `{broken[0]}` is not UTF-8" if broken else "")


def _object(number: int, text: str) -> Row:
    if _undecoded(text):
        return Row(number, fault="not UTF-8")
    try:
        value = from_json(text)
    except json.JSONDecodeError as error:
        return Row(number, fault=f"not JSON ({error.msg} at column {error.colno})")
    except ValueError as error:
        return Row(number, fault=f"JSON that can't be kept: {error}")
    if not isinstance(value, dict):
        return Row(number, fault=f"a JSON {type(value).__name__}; expected an object")
    return Row(number, value)


def _known(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> Iterator[Row]:
    """The rows; at their end, a column that was in none of them is refused."""
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row.values))
        yield row
    if seen:
        require_columns(path, columns, seen)


def _elements(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each element of a JSON list, so that a broken element breaks no other."""
    start = _after_space(text, 0)
    if not text.startswith("[", start):
        raise InvalidData(path, None, "holds no table; expected a JSON list of objects, or one object a line")
    place = _after_space(text, start + 1)
    line = 1 + text.count("\n", 0, place)
    while not text.startswith("]", place):
        end = _end_of_element(path, text, place, line)
        yield line, text[place:end]
        following = _after_space(text, end)
        if text.startswith(",", following):
            following = _after_space(text, following + 1)
        elif not text.startswith("]", following):
            raise InvalidData(path, 1 + text.count("\n", 0, following), "not JSON; expected `,` or `]` after an object")
        line += text.count("\n", place, following)
        place = following
    if _after_space(text, place + 1) < len(text):
        raise InvalidData(path, 1 + text.count("\n", 0, place), "something follows the list; expected one JSON list")


def _end_of_element(path: Path, text: str, place: int, line: int) -> int:
    try:
        return json.JSONDecoder().raw_decode(text, place)[1]
    except json.JSONDecodeError as error:
        raise InvalidData(path, error.lineno, f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise InvalidData(path, line, f"JSON that can't be kept: {error}") from None


def _after_space(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _undecoded(text: str) -> bool:
    return UNDECODED.search(text) is not None
