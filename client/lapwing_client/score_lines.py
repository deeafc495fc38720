"""A file of responses, one line of JSON each: read, scored several at once, written in the same order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import typer

from lapwing_client.client import Client
from lapwing_client.errors import LapwingError
from lapwing_client.requests import Prompt, Response, prompt_message, response_message, unusable
from lapwing_client.results import Detection
from lapwing_client.values import plain


@dataclass(frozen=True)
class Line(Sequence[Any]):
    """One line of a file; as a sequence, its prompt and response."""

    number: int
    """From 1."""

    id: Any
    content: tuple[Prompt, Response] | tuple[()]
    error: str
    """Why there is no content."""

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, index: Any) -> Any:
        return self.content[index]


def score_lines(
    client: Client, path: Path, concurrency: int, false_positive_rate: float | None = None, probe: str = ""
) -> int:
    """Scores every line; returns the exit code, 1 if one of them failed."""
    bad = done = last = 0
    scored = client.score_many(
        read_lines(path), concurrency=concurrency, false_positive_rate=false_positive_rate, probe=probe
    )
    try:
        for line, outcome in scored:
            done, last = done + 1, line.number
            if not isinstance(outcome, Detection):
                bad += 1
                print(f"line {line.number}: {line.error or outcome}", file=sys.stderr)
            print(json.dumps(written(line, outcome)), flush=True)
    except LapwingError as error:
        begin = f"nothing after line {last}" if last else "no line"
        print(f"{begin} is scored: {error} ({error.who_acts})", file=sys.stderr)
        return 1
    finally:
        scored.close()
    if bad:
        print(f"{bad} of {done} lines failed", file=sys.stderr)
    return 1 if bad else 0


def written(line: Line, outcome: Detection | LapwingError) -> dict[str, Any]:
    """The line of output."""
    head: dict[str, Any] = {"line": line.number} | ({} if line.id is None else {"id": plain(line.id)})
    if line.error:
        return head | {"error": "InvalidLine", "message": line.error}
    return head | outcome.to_dict()


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank."""
    if str(path) == "-":
        yield from read_open(sys.stdin.buffer)
        return
    try:
        with path.open("rb") as file:
            yield from read_open(file)
    except OSError as error:
        raise typer.BadParameter(f"--jsonl {path} can't be read: {error.strerror}") from error


def read_open(file: BinaryIO) -> Iterator[Line]:
    """Every line of an open file that is not blank."""
    for number, data in enumerate(file, 1):
        if data.strip():
            yield read_line(number, data)


def read_line(number: int, data: bytes) -> Line:
    """What a line says, or why it can't be scored."""
    try:
        fields = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        return Line(number, None, (), f"is no JSON ({error})")
    if not isinstance(fields, dict):
        return Line(number, None, (), 'is no object; write {"prompt": "...", "response": "..."}')
    name = fields.get("id")
    if not isinstance(name, str | int | float | None):
        return Line(number, None, (), f"id is a {type(name).__name__}; give text or a number")
    try:
        return Line(number, name, content_of(fields), "")
    except LapwingError as error:
        return Line(number, name, (), str(error))


def content_of(fields: dict[str, Any]) -> tuple[Prompt, Response]:
    """Prompt and response of a line.

    Raises:
        InvalidRequest: they are missing, given twice, or can't be sent.
    """
    if fields.get("prompt") and fields.get("messages"):
        raise unusable("prompt", "is given, and messages, too; give one of them")
    prompt, response = fields.get("prompt") or fields.get("messages"), fields.get("response")
    if not prompt or not response:
        raise unusable("line", "needs prompt (or messages) and response, neither of them empty")
    prompt_message(prompt)
    response_message(response)
    return prompt, response
