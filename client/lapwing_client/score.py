"""The verb `lapwing score`: one response, or a file of them, scored by a running server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from lapwing_client.client import Client
from lapwing_client.errors import LapwingError, TooLarge
from lapwing_client.requests import Prompt, Response, prompt_message, response_message, unusable
from lapwing_client.results import Detection
from lapwing_client.values import plain

BATCH = 16
"""Lines in one call: few enough that progress moves."""

BATCH_BYTES = 2 * 2**20
"""Bytes of the lines in one call, but for a line that has more: well below the 8 MiB that a server reads."""

QUIET_SECONDS = 2.0
"""Nothing is said of the progress of what is done by then."""


def score(
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "localhost:50051",
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    response: Annotated[str | None, typer.Option(help="What it answered.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="A file of lines with prompt (or messages) and response; - is standard input.")
    ] = None,
    false_positive_rate: Annotated[
        float | None, typer.Option(help="Share of truthful responses that may be flagged; 0.05 without it.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that one call may take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score responses with a running server: how likely is it that they are made up?

    Of a file, one line of JSON comes out for each line that goes in, in the same order.

    Example: lapwing score --server localhost:50051 --prompt "What is the capital of France?" --response "Paris."
    """
    single = prompt is not None and response is not None
    if single == (jsonl is not None) or (jsonl is not None and (prompt is not None or response is not None)):
        raise typer.BadParameter("give either --prompt and --response, or --jsonl FILE")
    with Client(server, timeout=timeout) as client:
        if jsonl is not None:
            raise typer.Exit(score_file(client, jsonl, false_positive_rate))
        detection = client.score(prompt or "", response or "", false_positive_rate=false_positive_rate)
    print(json.dumps(detection.to_dict()) if as_json else describe(detection))


def describe(detection: Detection) -> str:
    """A detection for people."""
    if detection.probability is None or detection.logit is None:
        return f"could not score: {detection.message} ({detection.reason})"
    heads = ", ".join(f"layer {h.layer} head {h.head} ({h.contribution:+.3f})" for h in detection.strongest_heads[:5])
    places = range(len(detection.token_contributions))
    strongest = sorted(places, key=lambda i: -abs(detection.token_contributions[i]))[:5]
    tokens = ", ".join(
        f"{place_name(i, detection.prompt_tokens)} ({detection.token_contributions[i]:+.3f})" for i in strongest
    )
    return (
        f"made up with probability {detection.probability:.3f} (logit {detection.logit:+.3f})\n"
        f"{verdict(detection)}\n"
        f"strongest heads:  {heads}\n"
        f"strongest tokens: {tokens}\n"
        f"probe {detection.probe_name} {detection.probe_revision}, "
        f"{detection.prompt_tokens} + {detection.response_tokens} tokens"
    )


def verdict(detection: Detection) -> str:
    """Whether it is flagged, and at which operating points."""
    rate = f"{detection.false_positive_rate:.1%}"
    if detection.flagged is None:
        return f"the probe has no threshold for {rate} false alarms"
    passed = ", ".join(f"{rate:.1%}" for rate in detection.flagged_at) or "none"
    return f"{'flagged' if detection.flagged else 'not flagged'} at {rate} false alarms (flagged at: {passed})"


def place_name(index: int, prompt_tokens: int) -> str:
    """Where a token stands."""
    return f"prompt token {index}" if index < prompt_tokens else f"response token {index - prompt_tokens}"


@dataclass(frozen=True)
class Line:
    """One line of a file."""

    number: int
    """From 1."""

    id: Any
    content: tuple[Prompt, Response] | None
    error: str
    """Why there is no content."""

    size: int
    """Bytes of the line."""


def score_file(client: Client, path: Path, false_positive_rate: float | None) -> int:
    """Scores every line; returns the exit code, 1 if one of them failed."""
    bad = done = 0
    begun = said = time.monotonic()
    for batch in batches(read_lines(path)):
        try:
            answers = outcomes(client, batch, false_positive_rate)
        except LapwingError as error:
            print(
                f"line {batch[0].number} and all after it are not scored: {error} ({error.who_acts})", file=sys.stderr
            )
            return 1
        for line, outcome in zip(batch, answers, strict=True):
            if not isinstance(outcome, Detection):
                bad += 1
                message = outcome if isinstance(outcome, str) else str(outcome)
                print(f"line {line.number}: {message}", file=sys.stderr)
            print(json.dumps(written(line, outcome)), flush=True)
        done += len(batch)
        if time.monotonic() - begun > QUIET_SECONDS and time.monotonic() - said > 1.0:
            said = time.monotonic()
            print(f"{done} lines scored", file=sys.stderr)
    if bad:
        print(f"{bad} of {done} lines failed", file=sys.stderr)
    return 1 if bad else 0


def outcomes(
    client: Client, lines: list[Line], false_positive_rate: float | None
) -> list[Detection | LapwingError | str]:
    """What became of each line; one that is refused fails alone.

    Raises:
        LapwingError: no line can be scored.
    """
    good = [line.content for line in lines if line.content is not None]
    if not good:
        return [line.error for line in lines]
    try:
        answered = iter(client.score_batch(good, false_positive_rate=false_positive_rate))
    except TooLarge as error:
        if len(lines) > 1:
            return [outcome for line in lines for outcome in outcomes(client, [line], false_positive_rate)]
        return [error]
    return [line.error if line.content is None else next(answered) for line in lines]


def written(line: Line, outcome: Detection | LapwingError | str) -> dict[str, Any]:
    """The line of output."""
    head: dict[str, Any] = {"line": line.number} | ({} if line.id is None else {"id": plain(line.id)})
    if isinstance(outcome, str):
        return head | {"error": "InvalidLine", "message": outcome}
    return head | outcome.to_dict()


def batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Lines in groups, neither too many nor too large."""
    batch: list[Line] = []
    for line in lines:
        if len(batch) == BATCH or (batch and sum(one.size for one in batch) + line.size > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


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
        return Line(number, None, None, f"is no JSON ({error})", len(data))
    if not isinstance(fields, dict):
        return Line(number, None, None, 'is no object; write {"prompt": "...", "response": "..."}', len(data))
    name = fields.get("id")
    if not isinstance(name, str | int | float | None):
        return Line(number, None, None, f"id is a {type(name).__name__}; give text or a number", len(data))
    try:
        return Line(number, name, content_of(fields), "", len(data))
    except LapwingError as error:
        return Line(number, name, None, str(error), len(data))


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
