"""A client over its life: shared by threads, closed, left by its server, pointed at the wrong thing."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from service_fakes import WAIT, FakeEngine, Gate, Running, an_identity

from lapwing_client import Cancelled, Client, DeadlineExceeded, Detection, Generation, LapwingError, Unavailable
from lapwing_client import Unimplemented as NotThere
from lapwing_client.results import ModelIdentity
from lapwing_client.values import plain

SERVER_TESTS = Path(__file__).resolve().parents[1] / "server"


# Threads.


def test_threads_share_a_client_and_each_gets_its_own_answer() -> None:
    with Running() as server, Client(server.target) as client, ThreadPoolExecutor(8) as pool:
        texts = [f"response number {i}" for i in range(80)]
        found = list(pool.map(lambda text: client.score("prompt", text), texts))
    assert [bytes(detection.token_ids).decode() for detection in found] == [f"prompt{text}" for text in texts]


def test_threads_generate_side_by_side() -> None:
    with Running() as server, Client(server.target) as client, ThreadPoolExecutor(4) as pool:

        def write(length: int) -> Generation:
            *_, last = client.generate("hello", max_new_tokens=length)
            assert isinstance(last, Generation)
            return last

        assert [len(last.token_ids) for last in pool.map(write, (3, 5, 7, 9))] == [3, 5, 7, 9]


# Closing.


MODEL = {field.name: getattr(an_identity(), field.name) for field in dataclasses.fields(ModelIdentity)}
STREAM: dict[str, Any] = {"model": MODEL, "layers": (1, 2), "heads": 3, "prompt_tokens": 1}
ONES = np.ones((2, 3, 1), np.float32)
CHUNK = {"first_layer": 0, "first_head": 0, "first_token": 0, "diagonal": ONES, "received": ONES}

CALLS = {
    "score": lambda client: client.score("hello", "world"),
    "score_batch": lambda client: client.score_batch([("hello", "world")]),
    "score_many": lambda client: list(client.score_many([("hello", "world")])),
    "generate": lambda client: list(client.generate("hello")),
    "attention_stream": lambda client: client.attention_stream(**STREAM).send(CHUNK) is None,
    "score_attention": lambda client: client.score_attention([CHUNK], **STREAM),
    "heatmap": lambda client: client.heatmap(),
    "probes": lambda client: client.probes(),
    "probe": lambda client: client.probe(),
    "activate_probe": lambda client: client.activate_probe("fake-probe"),
    "reload_probes": lambda client: client.reload_probes(),
    "server_info": lambda client: client.server_info(),
    "wait_until_ready": lambda client: client.wait_until_ready(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_client_says_so(name: str) -> None:
    with Running() as server:
        client = Client(server.target)
        assert CALLS[name](client)
        client.close()
        client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            CALLS[name](client)


def test_every_method_is_in_the_table_above() -> None:
    assert {name for name in vars(Client) if not name.startswith("_")} - {"close"} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_every_method_takes_a_timeout(name: str) -> None:
    parameter = inspect.signature(getattr(Client, name)).parameters["timeout"]
    assert parameter.default is None


def test_closing_the_client_ends_what_it_was_reading() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate)) as server:
        client = Client(server.target)
        stream = client.generate("hello")
        assert gate.reached.wait(WAIT)
        client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            next(stream)
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        gate.open()
        server.settle()
        assert server.engine.calls == ["read"], "no token was computed for nobody"


def test_a_stream_that_was_never_read_is_left_like_any_other() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate)) as server, Client(server.target) as client:
        stream = client.generate("hello", max_new_tokens=200)
        assert gate.reached.wait(WAIT)
        del stream
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        gate.open()
        server.settle()
        assert server.engine.calls == ["read"], "no token was computed for nobody"


def test_a_finished_stream_stays_finished() -> None:
    with Running() as server, Client(server.target) as client:
        stream = client.generate("hello", max_new_tokens=2)
        assert len(list(stream)) == 3
        assert list(stream) == []
        stream.close()
        assert list(stream) == []


def test_a_deadline_counts_for_the_whole_stream() -> None:
    passed = itertools.count()
    gate = Gate()

    def before() -> None:
        if next(passed) > 3:  # the prompt and three tokens
            gate()

    with Running(FakeEngine(before=before)) as server, Client(server.target) as client:
        stream = client.generate("hello", max_new_tokens=200, timeout=0.3)
        for _ in range(3):
            next(stream)
        with pytest.raises(DeadlineExceeded):
            next(stream)
        gate.open()


# Servers that go.


PROGRAM = """
import asyncio, sys, time
from lapwing_server.engine import Loaded
from lapwing_server.server import Settings, serve
from service_fakes import FakeEngine, a_shelf

engine = FakeEngine(before=lambda: time.sleep(0.01))
asyncio.run(serve(lambda: Loaded(engine, a_shelf()), Settings(port=0), lambda address: print(address, flush=True)))
"""


@contextmanager
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    path = os.pathsep.join([str(SERVER_TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        assert started.stdout is not None
        yield started, started.stdout.readline().strip()
    finally:
        started.kill()
        started.communicate()


def test_a_server_that_is_killed_is_unavailable_at_once() -> None:
    with process() as (server, target), Client(target) as client:
        client.wait_until_ready(WAIT)
        stream = client.generate("hello", max_new_tokens=1000)
        next(stream)
        server.send_signal(signal.SIGKILL)
        with pytest.raises(Unavailable):
            list(stream)
        with pytest.raises(Unavailable, match="start one: lapwing serve"):
            client.score("hello", "world")


def test_a_stream_that_begins_while_the_server_dies_ends() -> None:
    """With a retry policy for Generate, gRPC 1.85.1 lets about every second of these wait for ever."""
    for _ in range(3):
        with process() as (server, target):
            client = Client(target, timeout=WAIT)
            client.wait_until_ready(WAIT)
            server.kill()
            ended = futures.Future[LapwingError]()

            def read(client: Client = client, ended: futures.Future[LapwingError] = ended) -> None:
                with pytest.raises(LapwingError) as caught:
                    list(client.generate("hello"))
                ended.set_result(caught.value)

            threading.Thread(target=read, daemon=True).start()
            assert isinstance(ended.result(WAIT), Unavailable)
            client.close()


def test_a_server_that_is_told_to_stop_finishes_the_stream() -> None:
    with process() as (server, target), Client(target) as client:
        client.wait_until_ready(WAIT)
        stream = client.generate("hello", max_new_tokens=30)
        next(stream)
        server.send_signal(signal.SIGTERM)
        *_, last = stream
        assert isinstance(last, Generation)
        assert len(last.token_ids) == 30
        assert server.wait(WAIT) == 0


# Things that are no Lapwing server.


def test_another_grpc_server_is_no_lapwing_server() -> None:
    other = grpc.server(futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            for call in (lambda: client.wait_until_ready(WAIT), lambda: client.score("hello", "world")):
                with pytest.raises(NotThere):
                    call()
    finally:
        other.stop(None)


def test_a_server_that_speaks_no_grpc() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            for _ in range(10):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with Client(f"127.0.0.1:{port}", timeout=WAIT) as client, pytest.raises(LapwingError):
            client.score("hello", "world")


# What is written down of a result.


def test_a_detection_as_json_is_complete() -> None:
    with Running() as server, Client(server.target) as client:
        found = client.score("ab", "cd").to_dict()
    found.pop("seconds")
    expected: Any = FakeEngine().score("ab", "cd", false_positive_rate=0.05)
    assert found == {
        "state": "SCORED",
        "reason": None,
        "message": "",
        "probability": expected.probability,
        "logit": expected.logit,
        "bias": -0.25,
        "flagged": False,
        "false_positive_rate": 0.05,
        "flagged_at": [],
        "probe_name": "fake-probe",
        "probe_revision": expected.probe_revision,
        "prompt_tokens": 2,
        "response_tokens": 2,
        "token_ids": list(b"abcd"),
        "token_contributions": expected.token_contributions.tolist(),
        "heads_contribution": expected.heads_contribution,
        "statistic_contributions": {},
        "strongest_heads": [
            {"layer": 2, "head": 1, "contribution": 0.5},
            {"layer": 1, "head": 2, "contribution": -0.25},
        ],
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1, 1),
        (True, True),
        (None, None),
        ("text", "text"),
        (0.5, 0.5),
        (float("inf"), None),
        (float("nan"), None),
        ((1, (2.0, float("nan"))), [1, [2.0, None]]),
        ({"a": (1,), 2: "b"}, {"a": [1], "2": "b"}),
        (b"\x89PNG", "4 bytes"),
    ],
)
def test_values_are_written_as_json(value: Any, written: Any) -> None:
    assert plain(value) == written


def test_text_of_every_language_goes_there_and_back() -> None:
    text = "Kiebitz 鳥 🐦 \u0000 \u202e"
    with Running() as server, Client(server.target) as client:
        detection = client.score(text, text)
    assert isinstance(detection, Detection)
    assert bytes(detection.token_ids).decode() == text * 2
