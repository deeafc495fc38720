"""However a call ends, nothing is left of it: places, items, tasks, threads, descriptors."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from engine_fakes import FakeEngine
from service_fakes import WAIT, Gate, Running, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_server.limits import Limits

POISON = 7
TIMES = 5
FORWARD = 0.02
"""Seconds of a forward, so that calls are met in the middle."""

SCORE = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
ITEM = detector_pb2.ScoreItem(prompt=SCORE.prompt, response=SCORE.response)
BATCH = detector_pb2.ScoreBatchRequest(items=[ITEM] * 8)
STREAM = detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=200)

BAD = {
    "Score": detector_pb2.ScoreRequest(prompt={"token_ids": [POISON]}, response={"text": "world"}),
    "ScoreBatch": detector_pb2.ScoreBatchRequest(
        items=[ITEM, detector_pb2.ScoreItem(prompt={"token_ids": [POISON]}, response={"text": "x"})]
    ),
    "Generate": detector_pb2.GenerateRequest(prompt={"token_ids": [POISON]}),
}
GOOD = {
    "Score": SCORE,
    "ScoreBatch": BATCH,
    "Generate": detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=3),
}
LONG = {"Score": SCORE, "ScoreBatch": BATCH, "Generate": STREAM}

PROGRAM = f"""
import signal, sys, threading
signal.alarm({int(WAIT)})  # whatever it waits for
import grpc
from lapwing.v1 import detector_pb2, detector_pb2_grpc
stub = detector_pb2_grpc.DetectorStub(grpc.insecure_channel(sys.argv[1]))
call, request = getattr(stub, sys.argv[2]), getattr(detector_pb2, sys.argv[2] + "Request")
message = request.FromString(bytes.fromhex(sys.argv[3]))
calls = [call(message) if sys.argv[2] == "Generate" else call.future(message) for _ in range(3)]
print("asked", flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = FakeEngine(poison=POISON, before=lambda: time.sleep(FORWARD))
    with Running(engine, limits=Limits(streams_per_client=2 * TIMES)) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: Running) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield detector_pb2_grpc.DetectorStub(channel)


def ask(stub: Any, method: str, message: Any, **options: Any) -> Any:
    """The call, begun."""
    call = getattr(stub, method)
    return call(message, **options) if method == "Generate" else call.future(message, **options)


def finish(method: str, call: Any) -> grpc.StatusCode:
    """The code that a call ends with."""
    with suppress(grpc.RpcError, grpc.FutureCancelledError):
        if method == "Generate":
            list(call)
        else:
            call.result(WAIT)
    code: grpc.StatusCode = call.code()
    return code


def ok(server: Running, stub: Any, method: str) -> None:
    codes = [finish(method, ask(stub, method, GOOD[method])) for _ in range(TIMES)]
    assert set(codes) == {grpc.StatusCode.OK}


def cancel(server: Running, stub: Any, method: str) -> None:
    calls = [ask(stub, method, LONG[method]) for _ in range(TIMES)]
    wait_until(lambda: server.server.guard.in_flight > 0)
    for call in calls:
        call.cancel()
    assert {finish(method, call) for call in calls} == {grpc.StatusCode.CANCELLED}


def deadline(server: Running, stub: Any, method: str) -> None:
    calls = [ask(stub, method, LONG[method], timeout=FORWARD / 2) for _ in range(TIMES)]
    assert {finish(method, call) for call in calls} <= {
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }


def error(server: Running, stub: Any, method: str) -> None:
    codes = [finish(method, ask(stub, method, BAD[method])) for _ in range(TIMES)]
    # A bad item of a batch fails alone.
    assert set(codes) == {grpc.StatusCode.OK if method == "ScoreBatch" else grpc.StatusCode.INTERNAL}


def killed(server: Running, stub: Any, method: str) -> None:
    gate, before = Gate(), server.engine.before
    command = [sys.executable, "-c", PROGRAM, server.target, method, LONG[method].SerializeToString().hex()]
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert client.stdout is not None
    try:
        server.engine.before = gate
        assert client.stdout.readline() == b"asked\n"
        wait_until(lambda: server.server.guard.in_flight == 3)  # else it might be killed before they come
        assert gate.reached.wait(WAIT)
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate()
        server.engine.before = before
        gate.open()


ENDS: dict[str, Callable[[Running, Any, str], None]] = {
    one.__name__: one for one in (ok, cancel, deadline, error, killed)
}


def balance(server: Running) -> dict[str, int]:
    """What a call may leave behind."""
    inner = server.server
    return {
        "calls": inner.guard.in_flight,
        "waiting": inner.scheduler.waiting,
        "in flight": inner.scheduler.in_flight,
        "places": inner.scheduler.places.taken,
        "tasks": server.call(tasks()),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


async def tasks() -> int:
    """Those of the loop, without this one."""
    return len(asyncio.all_tasks()) - 1


def settled(server: Running, baseline: dict[str, int]) -> bool:
    """Whether nothing more is there than at the beginning."""
    return all(value <= baseline[name] for name, value in balance(server).items())


@pytest.mark.parametrize("method", ["Score", "ScoreBatch", "Generate"])
@pytest.mark.parametrize("how", list(ENDS))
def test_a_call_leaves_nothing_behind(server: Running, stub: Any, how: str, method: str) -> None:
    ok(server, stub, method)  # what the first call of a kind makes for all
    server.settle()
    gc.collect()
    baseline = balance(server)
    assert [baseline[name] for name in ("calls", "waiting", "in flight", "places")] == [0] * 4
    ENDS[how](server, stub, method)
    gc.collect()
    wait_until(lambda: settled(server, baseline))
    wait_until(lambda: server.server.scheduler.idle)


def test_control_a_call_that_goes_on_is_seen(server: Running, stub: Any) -> None:
    server.settle()
    baseline = balance(server)
    call = stub.Generate(STREAM)
    next(call)
    assert not settled(server, baseline)
    now = balance(server)
    assert [now[name] - baseline[name] for name in ("calls", "in flight", "places")] == [1] * 3
    call.cancel()
    wait_until(lambda: settled(server, baseline))


def test_a_stopped_server_leaves_nothing_behind() -> None:
    with Running():
        pass
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Running() as running, grpc.insecure_channel(running.target) as channel:
            stub = detector_pb2_grpc.DetectorStub(channel)
            stub.Score(SCORE)
            list(stub.Generate(GOOD["Generate"]))
    gc.collect()
    wait_until(lambda: threading.active_count() <= before[0] and len(os.listdir("/proc/self/fd")) <= before[1])
