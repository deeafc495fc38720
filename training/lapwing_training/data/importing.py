"""Labelled answers and questions of others, from tables into our JSON Lines. Knows no model.

Nothing is dropped silently and nothing is guessed: a row that is no item is kept as a refusal with its place, and which
label means hallucinated is stated by whoever imports.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from lapwing_training.data.columns import BrokenCell, Columns, Polarity, cell, made_id, record_of, spelling
from lapwing_training.data.data_sets import Source, data_set_rows, parquet_rows
from lapwing_training.data.generations import MODES, LabelledGeneration, Question, parse_line
from lapwing_training.data.table_files import Row, csv_rows, json_line_rows, json_rows, require_columns
from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.files import write_text

KINDS = {
    ".csv": csv_rows,
    ".json": json_rows,
    ".jsonl": json_line_rows,
    ".ndjson": json_line_rows,
    ".parquet": parquet_rows,
}
"""Readers by the end of the file's name; all but Parquet may be compressed (.gz)."""

Fields = Mapping[str, Any]
R = TypeVar("R", bound=Question)


@dataclass(frozen=True)
class Rejected:
    """A row that is no item."""

    unit: str
    """`line` or `row`."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.unit} {self.number}: {self.reason}"


@dataclass(frozen=True)
class Imported:
    """What a table holds."""

    items: tuple[LabelledGeneration, ...]
    rejected: tuple[Rejected, ...]
    other_labels: Mapping[str, int]
    """How many items have a label that was not stated, by its spelling; empty for none. Their label is null."""

    def counts(self) -> dict[str, Any]:
        """For the summary."""
        labels = Counter(item.label for item in self.items)
        return {
            "items": len(self.items),
            "hallucinated": labels[1],
            "right": labels[0],
            "unknown": labels[None],
            "other_labels": dict(self.other_labels),
            "rejected": len(self.rejected),
        }

    def require_whole(self, name: str, skip_broken: bool = False) -> None:
        """No row was rejected, or that is allowed and others were not.

        Raises:
            InvalidData: it is not so.
        """
        if self.rejected and not skip_broken:
            count = len(self.rejected)
            raise InvalidData(
                name,
                None,
                f"{count} of {count + len(self.items)} rows are broken and nothing was written; "
                "mend them, or leave them out with --skip-broken",
            )
        if not self.items:
            raise InvalidData(name, None, f"no items; {len(self.rejected)} rows were rejected")


def import_table(
    source: Source, columns: Columns, polarity: Polarity | None = None, mode: str = "supplied"
) -> Imported:
    """Labelled generations from a table.

    Args:
        source: the table.
        columns: which of its columns holds what.
        polarity: what its labels mean; None exactly when no label column is named.
        mode: `generated` when the model that will read the answers wrote them, else `supplied`.

    Raises:
        InvalidOption: a column is not there, or the options don't fit each other.
        InvalidData: the table can't be read, or none of its labels is one of the two that were stated.
    """
    _require_stated(columns, polarity, mode)
    items: list[LabelledGeneration] = []
    rejected: list[Rejected] = []
    others: Counter[str] = Counter()

    def stated(values: Fields) -> Fields:
        return {"mode": mode, "label": polarity.label_of(cell(values, columns.label)) if polarity else None}

    for row, found in _items(read_rows(source, columns), columns, LabelledGeneration, stated):
        if isinstance(found, Rejected):
            rejected.append(found)
            continue
        items.append(found)
        if polarity and found.label is None:
            others[spelling(cell(row.values, columns.label))] += 1
    if others.total() and others.total() == len(items):
        raise InvalidData(source.name, None, _none_stated(columns.label, polarity, others))
    return Imported(tuple(items), tuple(rejected), dict(others.most_common()))


def questions_of_table(source: Source, columns: Columns, limit: int | None = None) -> list[Question]:
    """Questions from a table.

    Args:
        source: the table.
        columns: which of its columns holds what.
        limit: no more than its first so many rows are read.

    Raises:
        InvalidOption: a column is not there.
        InvalidData: the table can't be read, or holds a broken row.
    """
    read = list(_items(islice(read_rows(source, columns), limit), columns, Question, lambda values: {}))
    names = dict.fromkeys(name for row, _ in read for name in row.values)
    if names:  # a reader that is stopped early has not come to its own check
        require_columns(source.name, columns.named, names)
    found = [one for _, one in read]
    rejected = [one for one in found if isinstance(one, Rejected)]
    if rejected:
        more = f" (and {len(rejected) - 1} more such rows)" if len(rejected) > 1 else ""
        raise InvalidData(source.name, None, f"{rejected[0]}{more}")
    if not found:
        raise InvalidData(source.name, None, "no rows; expected at least one question")
    return [one for one in found if isinstance(one, Question)]


def read_rows(source: Source, columns: Columns) -> Iterator[Row]:
    """Rows of a file by the end of its name, or of a data set.

    Raises:
        InvalidOption: a column is not there, or an option is for data sets only.
        InvalidData: there is no such file, of no known kind or unreadable.
    """
    path = Path(source.name)
    reader = KINDS.get(kind_of(path))
    if path.is_dir() or (reader is None and not path.exists()):
        return data_set_rows(source, columns.named)
    if source.config or source.split:
        raise InvalidOption(f"config is `{source.config}` and split `{source.split}`; {path} is a file and has neither")
    if reader is None:
        raise InvalidData(path, None, f"the name tells no kind of table; expected one that ends in {', '.join(KINDS)}")
    if not path.is_file():
        raise InvalidData(path, None, "no such file")
    return reader(path, columns.named)


def kind_of(path: Path) -> str:
    """End of the name, without `.gz`."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def require_apart(source: str, *written: Path | None) -> None:
    """The table is not written over, and what is written goes to files of their own.

    Raises:
        InvalidOption: it would be.
    """
    paths = [path.absolute() for path in written if path is not None]
    for path in paths:
        if path == Path(source).absolute() or paths.count(path) > 1 or path.is_dir():
            raise InvalidOption(f"{path} is the table itself, a directory, or written twice; give another file")


def write_rejected(path: Path, rejected: Iterable[Rejected]) -> None:
    """One object a line: `line` or `row` with its number, and `reason`."""
    lines = [json.dumps({one.unit: one.number, "reason": one.reason}) for one in rejected]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _items(
    rows: Iterable[Row], columns: Columns, kind: type[R], stated: Callable[[Fields], Fields]
) -> Iterator[tuple[Row, R | Rejected]]:
    places: dict[str, str] = {}  # by id
    made: Counter[str] = Counter()
    for row in tqdm(rows, desc="read", unit="row", delay=2.0, leave=False):
        found: R | Rejected
        try:
            found = _item(row, columns, kind, stated, places, made)
        except ValueError as error:
            found = Rejected(row.unit, row.number, str(error).removeprefix(f"{row.place}: "))
        yield row, found


def _item(
    row: Row,
    columns: Columns,
    kind: type[R],
    stated: Callable[[Fields], Fields],
    places: dict[str, str],
    made: Counter[str],
) -> R:
    if row.fault:
        raise BrokenCell(row.fault)
    record = {**record_of(row.values, columns), **stated(row.values)}
    if not columns.id:
        record["id"] = _unused(made_id(record), made)
    item = parse_line(_as_json(record), kind, row.place)
    earlier = places.setdefault(item.id, row.place)
    if earlier != row.place:
        raise BrokenCell(f"id `{item.id}` was used in {earlier} already; ids are unique")
    return item


def _unused(id: str, made: Counter[str]) -> str:
    """Rows that are the same are numbered in their order."""
    made[id] += 1
    return id if made[id] == 1 else f"{id}-{made[id]}"


def _as_json(record: Fields) -> str:
    try:
        return json.dumps(record)
    except (TypeError, RecursionError) as error:
        raise BrokenCell(f"holds what JSON can't: {error}; leave that column out") from error


def _require_stated(columns: Columns, polarity: Polarity | None, mode: str) -> None:
    if not columns.response:
        raise InvalidOption("response column is empty; name the column of the answers")
    if bool(columns.label) != (polarity is not None):
        raise InvalidOption(
            f"label column is `{columns.label}`; name it together with the two values that mean hallucinated and right"
        )
    if mode not in MODES:
        raise InvalidOption(f"mode is `{mode}`; known are {', '.join(MODES)}")


def _none_stated(column: str, polarity: Polarity | None, others: Counter[str]) -> str:
    stated = f"`{polarity.hallucinated}` or `{polarity.right}`" if polarity else "stated"
    found = ", ".join(f"`{value}` ({count})" for value, count in others.most_common(10))
    return f"no value of column `{column}` is {stated}; found {found}"
