"""Questions and labelled generations as JSON Lines: read strictly, written whole. Knows no model and no features."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lapwing_training.errors import InvalidData
from lapwing_training.files import digest, from_json, write_text

SPLITS = ("train", "test")
MODES = ("generated", "supplied")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked: either `prompt` or `messages`."""

    id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    """Chat messages, each with `role` and `content`."""

    group: str | None = None
    """Items of one group never straddle a split; without one, all items of the same prompt are a group."""

    split: str | None = None
    """`train` or `test`; None leaves it to the run."""

    references: tuple[str, ...] = ()
    """Accepted answers."""

    meta: Mapping[str, Any] = field(default_factory=dict)
    """Kept and passed on; `extract` reads only the field of it that `--stratum` names."""

    @property
    def group_or_prompt(self) -> str:
        """The group that this item is resampled and split with."""
        if self.group is not None:
            return self.group
        asked = json.dumps(self.messages or self.prompt, ensure_ascii=False, sort_keys=True)
        return f"prompt-{digest(asked.encode())[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """One line's mapping; what is not known is left out, except the label, which is null."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in record.items() if name == "label" or value not in (None, (), {})}


@dataclass(frozen=True, kw_only=True)
class LabelledGeneration(Question):
    """What a model answered, and whether it was made up."""

    response: str
    label: int | None = None
    """1 hallucinated, 0 not, None unknown."""

    labelling: Mapping[str, Any] = field(default_factory=dict)
    """How the label came about: `rule`, `reason`, scores, a judge's `verdict`. Absent for exact matches, which show it
    themselves, and for labels of unknown making."""

    model: str | None = None
    """Who wrote it, for the reader."""

    mode: str | None = None
    """`generated` by the model that reads it, or `supplied` text that the model only reads; None unknown."""

    generation: Mapping[str, Any] = field(default_factory=dict)
    """What was kept while it was written: `token_ids` (prompt and response), `prompt_tokens`, `tokenizer` and
    `model` (digests), `log_probability` (mean over the response's tokens), `finish_reason`. Absent for answers
    of unknown making."""


R = TypeVar("R", bound=Question)

CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda value: isinstance(value, str) and value != "", "a string that is not empty"),
    "prompt": (lambda value: value is None or isinstance(value, str), "a string"),
    "messages": (lambda value: value is None or _is_chat(value), "a list of objects with `role` and `content`"),
    "group": (lambda value: value is None or isinstance(value, str), "a string"),
    "split": (lambda value: value is None or value in SPLITS, "`train` or `test`"),
    "references": (lambda value: _is_strings(value), "a list of strings"),
    "meta": (lambda value: isinstance(value, dict), "an object"),
    "response": (lambda value: isinstance(value, str), "a string"),
    # `true` is an int in Python, but not a label.
    "label": (lambda value: value is None or (type(value) is int and value in (0, 1)), "0, 1 or null"),
    "labelling": (lambda value: isinstance(value, dict), "an object"),
    "generation": (lambda value: isinstance(value, dict), "an object"),
    "model": (lambda value: value is None or isinstance(value, str), "a string"),
    "mode": (lambda value: value is None or value in MODES, "`generated` or `supplied`"),
}


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a JSON Lines file (`.gz` too); the answers of a file of generations are passed over.

    Raises:
        InvalidData: with the number of the first wrong line.
    """
    return _read(Path(path), Question)


def read_generations(path: str | Path) -> list[LabelledGeneration]:
    """Labelled generations of a JSON Lines file (`.gz` too).

    Raises:
        InvalidData: with the number of the first wrong line.
    """
    return _read(Path(path), LabelledGeneration)


def write_generations(path: str | Path, generations: Iterable[Question]) -> None:
    """One object a line, atomically; compressed when the name ends in `.gz`."""
    write_text(Path(path), "".join(to_line(generation) for generation in generations))


def to_line(generation: Question) -> str:
    """One line with its end."""
    return json.dumps(generation.to_dict(), ensure_ascii=False, allow_nan=False) + "\n"


def parse_line(text: str, kind: type[R], path: object = "line", line: int | None = None) -> R:
    """One record.

    Raises:
        InvalidData: bad JSON, a missing, unknown or wrong field.
    """
    try:
        record = from_json(text)
    except json.JSONDecodeError as error:
        raise InvalidData(path, line, f"not JSON ({error.msg} at column {error.colno}); one object a line") from None
    except ValueError as error:
        raise InvalidData(path, line, f"JSON that can't be kept: {error}; mend or drop the item") from None
    if not isinstance(record, dict):
        raise InvalidData(path, line, f"a JSON {type(record).__name__}; expected an object with `id`, `prompt`, ...")
    fault = _fault(record, kind)
    if fault:
        raise InvalidData(path, line, fault)
    known = {entry.name: record[entry.name] for entry in fields(kind) if entry.name in record}
    for name in ("messages", "references"):
        if known.get(name) is not None:
            known[name] = tuple(known[name])
    return kind(**known)


def _fault(record: Mapping[str, Any], kind: type[Question]) -> str | None:
    needed = ("id", "response") if kind is LabelledGeneration else ("id",)
    for name in needed:
        if name not in record:
            return f"field `{name}` is missing; every line needs it"
    for name, value in record.items():
        if name not in CHECKS:
            return f"unknown field `{name}`; known are {', '.join(CHECKS)}; put your own under `meta`"
        fits, expected = CHECKS[name]
        if not fits(value):
            return f"field `{name}` is {json.dumps(value)[:80]}; expected {expected}"
    if (record.get("prompt") is None) == (record.get("messages") is None):
        return f"item `{record['id']}` needs either `prompt` or `messages`, and not both"
    return None


def _read(path: Path, kind: type[R]) -> list[R]:
    records: list[R] = []
    first_line: dict[str, int] = {}  # by id
    side: dict[str, tuple[str, int]] = {}  # by group: split and the line that said so
    for number, text in _lines(path):
        record = parse_line(text, kind, path, number)
        earlier = first_line.setdefault(record.id, number)
        if earlier != number:
            raise InvalidData(path, number, f"id `{record.id}` was used in line {earlier} already; ids are unique")
        if record.split is not None:
            split, where = side.setdefault(record.group_or_prompt, (record.split, number))
            if split != record.split:
                raise InvalidData(
                    path,
                    number,
                    f"group `{record.group_or_prompt}` is {record.split} here and {split} in line {where}; "
                    "items of one group never straddle a split",
                )
        records.append(record)
    if not records:
        raise InvalidData(path, None, "no items; expected one JSON object a line")
    return records


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except FileNotFoundError:
        raise InvalidData(path, None, "no such file") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InvalidData(
            path, None, f"can't be read: {error}; expected UTF-8, gzip when the name ends in .gz"
        ) from None
    # Not splitlines(): U+2028 may stand inside a JSON string.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
        and _is_strings([text for message in value for text in message.values()])
    )


def _is_strings(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(text, str) for text in value)
