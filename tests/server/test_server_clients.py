"""Clients that stop without a word: the server frees what it holds for them."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from service_fakes import WAIT, FakeEngine, Gate, Running, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_server.limits import Limits
from lapwing_server.server import Settings
from lapwing_server.stream import ROOM

PROGRAM = """
import sys
from lapwing_client import Client
for event in Client(sys.argv[1]).generate("hello", max_new_tokens=1000):
    print("event", flush=True)
"""

PING_TIMEOUT = "grpc.http2.ping_timeout_ms"


@contextmanager
def stopped_client(server: Running) -> Iterator[None]:
    """A client that was stopped while it was reading a generation: its kernel still takes what is sent."""
    client = subprocess.Popen([sys.executable, "-c", PROGRAM, server.target], stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"event\n"
        client.send_signal(signal.SIGSTOP)
        yield
    finally:
        os.kill(client.pid, signal.SIGKILL)
        client.communicate()


def slow_engine() -> FakeEngine:
    """More than a thousand tokens, so slowly that they take longer than any test."""
    return FakeEngine(max_tokens=100_000, before=lambda: time.sleep(0.04))


def test_a_stopped_client_is_freed() -> None:
    server = Running(slow_engine(), keepalive=0.2, keepalive_timeout=0.2)
    with server, stopped_client(server):
        wait_until(lambda: server.server.guard.in_flight == 0)
        server.settle()
        assert server.engine.closed == 1
        assert server.engine.steps < 1000


def test_control_keepalive_alone_does_not_free_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Settings().options
    assert PING_TIMEOUT in dict(options)
    short = [(name, 200 if "keepalive" in name else value) for name, value in options if name != PING_TIMEOUT]
    monkeypatch.setattr(Settings, "options", short)
    server = Running(slow_engine(), grace=0.0)
    with server, stopped_client(server):
        steps = server.engine.steps
        wait_until(lambda: server.engine.steps > steps + 50)
        assert server.server.guard.in_flight == 1, "2 seconds later"


class DeafClient:
    """Asks for a generation and lets nothing be sent: its window has no room. It answers pings like a good one."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        no_window = struct.pack(">HI", 4, 0)
        request = detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=100).SerializeToString()
        headers = b"".join(
            b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", b"/lapwing.v1.Detector/Generate"),
                (b":authority", b"x"),
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
            )
        )
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, no_window))
        self._socket.sendall(frame(1, 4, 1, headers))
        self._socket.sendall(frame(0, 1, 1, b"\0" + struct.pack(">I", len(request)) + request))
        threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _answer(self) -> None:
        stream = self._socket.makefile("rb")
        while len(head := stream.read(9)) == 9:
            payload = stream.read(int.from_bytes(head[:3]))
            kind, is_answer = head[3], head[4] & 1
            if kind in (4, 6) and not is_answer:  # settings, ping
                self._socket.sendall(frame(kind, 1, 0, payload if kind == 6 else b""))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


@contextmanager
def deaf_client(server: Running) -> Iterator[None]:
    client = DeafClient(server.port)
    try:
        wait_until(lambda: server.engine.steps > 0)
        yield
    finally:
        client.close()


def test_a_client_that_does_not_read_slows_nobody_and_is_not_written_for() -> None:
    gate, engine = Gate(), FakeEngine()
    engine.before = lambda: gate() if engine.steps == 1 else None
    with Running(engine, grace=0.0) as server, deaf_client(server), grpc.insecure_channel(server.target) as channel:
        assert gate.reached.wait(WAIT)
        [stream] = server.server.scheduler._writing._open.values()
        wait_until(lambda: not stream.outbox)  # the first event is being sent, and that does not end
        gate.open()
        wait_until(lambda: engine.steps >= ROOM and server.server.scheduler.idle)
        steps = engine.steps
        assert steps == ROOM + 1, "as many as are kept, and the one that is being sent"
        request = detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=300)
        assert len(list(detector_pb2_grpc.DetectorStub(channel).Generate(request))) == 301
        assert engine.steps == steps + 300
        assert server.server.scheduler.in_flight == 1, "and it may still come back"


def test_the_time_limit_of_a_stream_also_binds_a_client_that_does_not_read() -> None:
    with Running(limits=Limits(stream_seconds=0.3)) as server, deaf_client(server):
        wait_until(lambda: server.server.guard.in_flight == 0)
        server.settle()
        assert server.engine.steps < 100
        assert server.engine.closed == 1


def test_control_within_the_time_limit_it_is_waited_for() -> None:
    with Running(limits=Limits(stream_seconds=WAIT), grace=0.0) as server, deaf_client(server):
        threading.Event().wait(1.0)
        assert server.server.guard.in_flight == 1
        assert server.engine.closed == 0
