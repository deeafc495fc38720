"""Everything that the client needs of grpcio, protobuf and typer, in one go; run by interpreters with other versions.

    python compatibility_smoke.py SERVER OTHER_SERVER TLS_SERVER AUTHORITY

Knows nothing but the client: SERVER and OTHER_SERVER answer alike, TLS_SERVER does so over TLS with a certificate of
AUTHORITY. Prints the versions as JSON when all went well.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from array import array
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lapwing_client import (
    AsyncClient,
    Client,
    Deadline,
    Detection,
    GeneratedToken,
    Generation,
    InvalidRequest,
    LapwingError,
    TLSError,
    Unavailable,
)
from lapwing_client.cli import application, run
from lapwing_client.progress import Progress
from lapwing_client.score import score

PACKAGES = ("grpcio", "protobuf", "googleapis-common-protos", "rich", "typer")
PAIRS = [("hello", f"world {i}") for i in range(20)]


def blocking(target: str) -> list[Any]:
    """Every kind of call of the client that blocks."""
    with Client(target) as client:
        info = client.wait_until_ready(Deadline(30))
        detection = client.score("hello", "world")
        batch = client.score_batch([("hello", "world"), ("hello", [1, 999])])
        *tokens, last = client.generate("hello", max_new_tokens=4, contributions=True, stop_strings=["never"])
        with client.generate("hello", max_new_tokens=100) as left:
            next(left)
        many = [outcome for _, outcome in client.score_many(PAIRS, concurrency=4)]
        heatmap, probe = client.heatmap(image="png"), client.probe()
        refusal = error_of(lambda: client.score("hello", [1, 999]))
        elsewhere = client.score_attention([attention()], **known(info))
        doubled = error_of(lambda: client.score_attention([attention(2.0)], **known(info)))
    assert doubled.field == "rows.weights"
    assert detection.state == "SCORED", detection
    assert (batch[0].to_dict() | {"seconds": 0}) == (detection.to_dict() | {"seconds": 0})
    assert isinstance(batch[1], InvalidRequest)
    assert [type(token) for token in tokens] == [GeneratedToken] * 4
    assert isinstance(last, Generation)
    assert (last.text, last.finish_reason) == ("ABCD", "LENGTH")
    assert heatmap.image.startswith(b"\x89PNG")
    assert heatmap.values.shape == (2, 3)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.field == "response.token_ids[1]"
    for result in (info, detection, last, heatmap, probe):
        json.dumps(result.to_dict(), allow_nan=False)
    return [
        detection.logit,
        last.detection.logit,
        [outcome.logit for outcome in many if isinstance(outcome, Detection)],
        elsewhere.logit,
    ]


async def awaiting(target: str) -> list[Any]:
    """The same of the client that awaits."""
    async with AsyncClient(target) as client:
        info = await client.wait_until_ready(Deadline(30))
        detection = await client.score("hello", "world")
        *_, last = [event async for event in client.generate("hello", max_new_tokens=4)]
        async for _ in client.generate("hello", max_new_tokens=100):
            break
        many = [outcome async for _, outcome in client.score_many(PAIRS, concurrency=4)]
        assert (await client.heatmap()).statistic == "P_VALUE"
        [refusal] = await asyncio.gather(client.score("hello", [1, 999]), return_exceptions=True)
        elsewhere = await client.score_attention([attention()], **known(info))
        doubled = client.score_attention([attention(2.0)], **known(info))
        [doubled] = await asyncio.gather(doubled, return_exceptions=True)
    assert doubled.field == "rows.weights"
    assert isinstance(refusal, InvalidRequest)
    assert refusal.field == "response.token_ids[1]"
    assert isinstance(last, Generation)
    return [
        detection.logit,
        last.detection.logit,
        [outcome.logit for outcome in many if isinstance(outcome, Detection)],
        elsewhere.logit,
    ]


def known(info: Any) -> dict[str, Any]:
    """What a stream of attention says of itself to the servers of the tests."""
    return {"model": info.model, "layers": [1, 2], "heads": 3, "prompt_tokens": 2}


def attention(total: float = 1.0) -> dict[str, Any]:
    """The rows of 13 tokens, each of which attends alike to all up to itself; an array without numpy."""
    rows = [[total / (i + 1) if j <= i else 0.0 for j in range(13)] for i in range(13)]
    numbers = array("f", [weight for row in rows for weight in row] * 6)
    weights = memoryview(numbers).cast("B").cast("f", (2, 3, 13, 13))
    return {"first_layer": 0, "first_head": 0, "first_token": 0, "weights": weights}


def logits(outcomes: list[Any]) -> list[float | None]:
    """The scores, of which there must be one for each pair."""
    assert [type(outcome) for outcome in outcomes] == [Detection] * len(PAIRS)
    return [outcome.logit for outcome in outcomes]


def replicas(one: str, other: str) -> None:
    """Two servers that take turns, and one that is not there."""
    with Client([one, other, "127.0.0.1:1"]) as client:
        assert client.wait_until_ready(30).state == "SERVING"
        for _ in range(10):
            client.score("hello", "world")
    with Client("127.0.0.1:1") as client:
        assert isinstance(error_of(lambda: client.score("a", "b")), Unavailable)


def encrypted(target: str, plain: str, authority: Path) -> None:
    """What works over TLS, and what a mistake is called."""
    with Client(target, tls=authority, token="secret") as client:
        assert client.score("hello", "world").state == "SCORED"
    for where, tls, reason in (
        (target, None, "SERVER_SPEAKS_TLS"),
        (target, True, "UNKNOWN_AUTHORITY"),
        (plain, authority, "SERVER_SPEAKS_NO_TLS"),
    ):
        with Client(where, tls=tls) as client:
            error = error_of(lambda client=client: client.score("a", "b"))
        assert isinstance(error, TLSError), error
        assert error.reason == reason, error


def command(target: str) -> None:
    """The verb, its help, and the progress bar."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run(application(score), ["--help"], "lapwing score") == 0
        arguments = ["--server", target, "--prompt", "hello", "--response", "world", "--json"]
        assert run(application(score), arguments, "lapwing score") == 0
    assert "--concurrency" in said.getvalue()
    assert json.loads(said.getvalue().splitlines()[-1])["state"] == "SCORED"
    with contextlib.redirect_stderr(io.StringIO()):
        bar = Progress(range(3), shown=True)
        bar._draw()
        bar.close()


def error_of(call: Any) -> LapwingError:
    """The error that it must raise."""
    try:
        answer = call()
    except LapwingError as error:
        return error
    raise AssertionError(f"it was answered with {answer}")


def main() -> None:
    """Fails with a traceback, or prints the versions."""
    one, other, tls, authority = sys.argv[1:]
    assert blocking(one) == asyncio.run(awaiting(one))
    replicas(one, other)
    encrypted(tls, one, Path(authority))
    command(one)
    print(json.dumps({name: version(name) for name in PACKAGES}))


if __name__ == "__main__":
    main()
