"""However a stream of attention ends, nothing is left of it: calls, places, tasks, threads, sums."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock
from weakref import WeakSet

import grpc
import pytest
from attention_fakes import HEADS, LAYERS, a_header, a_summary, requests, some_maps
from engine_fakes import an_identity
from metrics_pages import registry_page
from service_fakes import WAIT, Running, wait_until
from test_server_balance import balance

from lapwing.v1 import detector_pb2_grpc
from lapwing_client import Client, DeadlineExceeded, InvalidRequest
from lapwing_server import attention_stream
from lapwing_server.attention_assembly import Assembly
from lapwing_server.attention_stream import AttentionReader
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.refusal import Refusal

TIMES = 5
ATTENTION = "lapwing.v1.Detector/ScoreAttention"
KNOWN: dict[str, Any] = {"model": an_identity(), "layers": LAYERS, "heads": HEADS, "prompt_tokens": 2}
MAPS = some_maps(13)
MADE = WeakSet[Assembly]()

PROGRAM = f"""
import signal, sys, threading
signal.alarm({int(WAIT)})  # whatever it waits for
from pathlib import Path
import grpc
from lapwing.v1 import detector_pb2, detector_pb2_grpc
sent = [detector_pb2.ScoreAttentionRequest.FromString(bytes.fromhex(line)) for line in sys.stdin.read().split()]
def requests():
    yield from sent
    threading.Event().wait()
stub = detector_pb2_grpc.DetectorStub(grpc.insecure_channel(sys.argv[1]))
calls = [stub.ScoreAttention(requests()) for _ in range(3)]
print("asked", flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    with Client(server.target, timeout=WAIT) as client:
        yield client


def chunk(first: int = 0, last: int = 13) -> dict[str, Any]:
    rows = MAPS[:, :, first:last, :last]
    return {"first_layer": 0, "first_head": 0, "first_token": first, "weights": rows}


def ok(server: Running, client: Client) -> None:
    for _ in range(TIMES):
        assert client.score_attention([chunk()], **KNOWN).logit


def cancel(server: Running, client: Client) -> None:
    for _ in range(TIMES):
        with client.attention_stream(**KNOWN) as stream:
            stream.send(chunk(0, 6))
            stream.score_now()
            assert assemblies() > 0


def deadline(server: Running, client: Client) -> None:
    for _ in range(TIMES):
        with pytest.raises(DeadlineExceeded):
            wait_for_the_deadline(client)


def wait_for_the_deadline(client: Client) -> None:
    """Where the machine is busy it may pass before the header is sent."""
    with client.attention_stream(**KNOWN, timeout=0.1) as stream:
        for last in range(1, 14):
            stream.send(chunk(last - 1, last))
        stream._answer()  # nothing was asked and nothing ended, so that nothing else can come


def error(server: Running, client: Client) -> None:
    for _ in range(TIMES):
        with client.attention_stream(**KNOWN) as stream:
            stream.send(chunk(0, 6))
            stream.send(chunk(7, 9))
            with pytest.raises(InvalidRequest):
                stream.finish()


def malformed(server: Running, client: Client) -> None:
    sent = [one.SerializeToString() for one in first_messages()]
    with grpc.insecure_channel(server.target) as channel:
        for _ in range(TIMES):
            call = channel.stream_stream("/lapwing.v1.Detector/ScoreAttention")(iter([*sent, b"\xff"]), timeout=WAIT)
            with pytest.raises(grpc.RpcError):
                list(call)


def killed(server: Running, client: Client) -> None:
    sent = "\n".join(one.SerializeToString().hex() for one in first_messages())
    command = [sys.executable, "-c", PROGRAM, server.target]
    path = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=path, text=True) as sender:
        assert sender.stdin is not None
        assert sender.stdout is not None
        try:
            sender.stdin.write(sent)
            sender.stdin.close()
            assert sender.stdout.readline() == "asked\n"
            wait_until(lambda: server.server.scheduler.places.taken == 3)
            wait_until(lambda: assemblies() == 3)
        finally:
            sender.send_signal(signal.SIGKILL)
            sender.wait(WAIT)


def first_messages() -> Iterator[Any]:
    return requests(a_header(), a_summary(MAPS, 0, 6))


ENDS: dict[str, Callable[[Running, Client], None]] = {
    one.__name__: one for one in (ok, cancel, deadline, error, malformed, killed)
}


@pytest.fixture(autouse=True, scope="module")
def counted() -> Iterator[None]:
    """Every `Assembly` is known as long as it is there."""
    with pytest.MonkeyPatch.context() as patch:
        make = Assembly.__init__

        def made(self: Assembly, *args: Any, **options: Any) -> None:
            MADE.add(self)
            make(self, *args, **options)

        patch.setattr(Assembly, "__init__", made)
        yield


def assemblies() -> int:
    """Sums that are held."""
    return len(MADE)


@pytest.mark.parametrize("how", list(ENDS))
def test_a_stream_leaves_nothing_behind(server: Running, client: Client, how: str) -> None:
    ok(server, client)  # what the first call makes for all
    server.settle()
    gc.collect()
    wait_until(lambda: assemblies() == 0)
    baseline = balance(server)
    assert baseline["places"] == 0
    ENDS[how](server, client)

    server.settle()
    gc.collect()
    wait_until(lambda: assemblies() == 0)
    for name in ("calls", "places", "tasks", "threads"):
        wait_until(lambda name=name: balance(server)[name] <= baseline[name])


def test_a_stream_that_took_too_long_leaves_nothing_behind() -> None:
    limits = Limits(stream_seconds=0.1)
    with Running(limits=limits) as server, Client(server.target, timeout=WAIT) as client:
        with client.attention_stream(**KNOWN) as stream:
            stream.send(chunk(0, 6))
            with pytest.raises(DeadlineExceeded, match=r"a stream may take 0\.1 s"):
                stream._answer()
        gc.collect()
        wait_until(lambda: assemblies() == 0)


@pytest.mark.parametrize("news", [WAIT, 0.0], ids=["", "control: gRPC's word is not waited for"])
def test_a_stream_that_is_left_is_none_that_ended_too_early(monkeypatch: pytest.MonkeyPatch, news: float) -> None:
    """gRPC shows it for a moment as one that did."""
    monkeypatch.setattr(attention_stream, "NEWS", news)

    async def left(reader: AttentionReader) -> None:
        task = asyncio.create_task(reader.answer(nothing(), Mock(), "me"))
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        await task

    with Running() as server:
        reader = AttentionReader(server.server.readiness, server.server._reader, Metrics())
        with pytest.raises(asyncio.CancelledError if news else Refusal):
            asyncio.run(left(reader))


async def nothing() -> AsyncIterator[Any]:
    """Messages that end."""
    for never in ():
        yield never


def test_streams_that_are_left_are_counted_as_such() -> None:
    with Running() as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        for _ in range(30):
            outgoing = SimpleQueue[Any]()
            call = stub.ScoreAttention(iter(outgoing.get, None), timeout=WAIT)
            wait_until(lambda: server.server.guard.in_flight > 0)
            call.cancel()
            outgoing.put(None)
        server.settle()
        ended = registry_page(server.server.metrics)
    assert ended("calls_total", method=ATTENTION, code="CANCELLED") == ended("calls_total", method=ATTENTION) > 0
