"""Which column of a table holds what, and what its labels mean. Knows one row at a time, and no file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lapwing_training.errors import InvalidOption
from lapwing_training.files import digest, from_json


class BrokenCell(ValueError):
    """A cell that holds something else than its column should."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns, empty for none; `a.b` is field `b` of the objects in column `a`."""

    prompt: str = ""
    messages: str = ""
    """Chat messages, instead of a prompt: a list of objects with `role` and `content`, or that list as JSON text."""

    response: str = ""
    label: str = ""
    id: str = ""
    """Without one, ids are made from prompt and response."""

    group: str = ""
    references: str = ""
    """One accepted answer, a list of them, or that list as JSON text."""

    meta: tuple[str, ...] = ()
    """Columns that are kept under `meta` by their own names."""

    def __post_init__(self) -> None:
        if bool(self.prompt) == bool(self.messages):
            raise InvalidOption(
                f"prompt column is `{self.prompt}` and messages column is `{self.messages}`; name one of the two"
            )

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that are read."""
        single = (self.prompt, self.messages, self.response, self.label, self.id, self.group, self.references)
        return tuple(name for name in (*single, *self.meta) if name)


@dataclass(frozen=True)
class Polarity:
    """How a table spells its labels; case and surrounding space don't matter, nothing else is known of them."""

    hallucinated: str
    right: str

    def __post_init__(self) -> None:
        spelt = [spelling(self.hallucinated), spelling(self.right)]
        if "" in spelt or spelt[0] == spelt[1]:
            raise InvalidOption(
                f"hallucinated is `{self.hallucinated}` and right is `{self.right}`; state two different values of the "
                "label column, as which of them means hallucinated is never guessed"
            )

    def label_of(self, value: Any) -> int | None:
        """1 hallucinated, 0 right, None for anything else."""
        return {spelling(self.hallucinated): 1, spelling(self.right): 0}.get(spelling(value))


def spelling(value: Any) -> str:
    """How a label is compared: `True` is `true`, 1 is `1`, and nothing is empty."""
    return "" if value is None else str(value).strip().casefold()


def record_of(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """One row as the fields of a question or a generation, all but its label; not checked as a whole yet.

    Raises:
        BrokenCell: a cell that is needed is empty, or holds what its column can't.
    """
    record: dict[str, Any] = {
        name: _needed(values, getattr(columns, name)) for name in ("id", "prompt", "response") if getattr(columns, name)
    }
    if columns.messages:
        record["messages"] = _listed(_present(values, columns.messages), columns.messages)
    if columns.group:
        record["group"] = _text(cell(values, columns.group), columns.group)
    if columns.references:
        record["references"] = _references(cell(values, columns.references), columns.references)
    if columns.meta:
        record["meta"] = {name: cell(values, name) for name in columns.meta}
    return record


def made_id(record: Mapping[str, Any]) -> str:
    """The same for the same prompt and response, wherever they come from and whatever their label is."""
    content = [record.get("prompt"), record.get("messages"), record.get("response")]
    return f"item-{digest(json.dumps(content, sort_keys=True, default=str).encode())[:16]}"


def cell(values: Mapping[str, Any], column: str) -> Any:
    """What stands in a column; None where the row lacks it.

    Raises:
        BrokenCell: of `a.b`, what stands in `a` has no field `b`.
    """
    head, _, rest = column.partition(".")
    inside = values.get(head)
    if column in values or not rest or inside is None:
        return values.get(column)
    if not isinstance(inside, Mapping):
        raise BrokenCell(f"column `{head}` holds {_shown(inside)}; expected an object with `{rest}`")
    if rest not in inside and rest.partition(".")[0] not in inside:
        raise BrokenCell(f"column `{head}` has the fields {', '.join(inside)}; expected `{rest}`, too")
    return cell(inside, rest)


def _present(values: Mapping[str, Any], column: str) -> Any:
    value = cell(values, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BrokenCell(f"column `{column}` is empty")
    return value


def _needed(values: Mapping[str, Any], column: str) -> str | None:
    return _text(_present(values, column), column)


def _text(value: Any, column: str) -> str | None:
    """Text as it is, whole numbers as they are written; None for nothing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return value
    if type(value) is int:  # which leaves out True
        return str(value)
    raise BrokenCell(f"column `{column}` holds {_shown(value)}; expected text")


def _listed(value: Any, column: str) -> Any:
    """A list, or whatever it is; CSV has to spell a list as JSON."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        return from_json(value)
    except ValueError as error:
        raise BrokenCell(f"column `{column}` holds {_shown(value)}; expected a list as JSON ({error})") from error


def _references(value: Any, column: str) -> list[Any]:
    listed = _listed(value, column)
    if isinstance(listed, (list, tuple)):
        return [str(one) if type(one) is int else one for one in listed]
    text = _text(listed, column)
    return [] if text is None else [text]


def _shown(value: Any) -> str:
    return repr(value)[:80]
