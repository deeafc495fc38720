"""Whoever logs waits for nobody who reads: a full pipe stops neither the server nor its end."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_fakes import WAIT, Gate, wait_until

from lapwing.v1 import probes_pb2, probes_pb2_grpc
from lapwing_server.lines import Lines

LONG = "x" * 200
MANY = 2000
"""Lines of 200 bytes: more than a pipe holds, which is 64 KiB."""


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("lapwing.server", logging.INFO, __file__, 1, message, (), None)


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], IO[str]]]:
    """Its ends: what is read, and what is written, of which nobody reads anything so far."""
    reading, writing = os.pipe()
    with open(reading, "rb") as read, open(writing, "w") as write:
        yield read, write


def log_in_a_thread(handler: logging.Handler) -> threading.Thread:
    thread = threading.Thread(target=lambda: [handler.handle(record(LONG)) for _ in range(MANY)], daemon=True)
    thread.start()
    return thread


def test_a_pipe_that_nobody_reads_stops_nobody_who_logs(pipe: tuple[IO[bytes], IO[str]]) -> None:
    read, write = pipe
    lines = Lines(write)
    log_in_a_thread(lines).join(WAIT)
    assert lines.queue.qsize() > MANY / 2, "they wait"
    assert not lines.wait(0)
    found = [read.readline() for _ in range(MANY)]
    assert found == [f"{LONG}\n".encode()] * MANY, "nothing is lost when somebody reads after all"
    assert lines.wait(WAIT)
    lines.close()


def test_control_with_the_standard_handler_it_does(pipe: tuple[IO[bytes], IO[str]]) -> None:
    read, write = pipe
    thread = log_in_a_thread(logging.StreamHandler(write))
    thread.join(0.5)
    assert thread.is_alive()
    for _ in range(MANY):
        read.readline()
    thread.join(WAIT)
    assert not thread.is_alive()


class Held(io.StringIO):
    """Can't be written before somebody opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def write(self, text: str) -> int:
        self.gate()
        return super().write(text)


def test_what_finds_no_room_is_counted_and_told_once_there_is_room() -> None:
    stream = Held()
    lines = Lines(stream, room=10)
    lines.handle(record("first"))
    assert stream.gate.reached.wait(WAIT)
    for number in range(25):
        lines.handle(record(f"line {number}"))
    assert lines.lost == 15
    stream.gate.open()
    assert lines.wait(WAIT)
    lines.handle(record("at last"))
    assert lines.wait(WAIT)
    first, *kept, notice, last = stream.getvalue().splitlines()
    assert (first, last) == ("first", "at last")
    assert kept == [f"line {number}" for number in range(10)]
    assert notice == "15 lines of the log were lost, because nobody read those before them in time"
    assert lines.lost == 0
    lines.close()


def test_it_does_not_speak_of_what_is_lost_line_by_line() -> None:
    """After the first loss half of the room must be free, else every second line would be a notice."""
    stream = Held()
    lines = Lines(stream, room=10)
    lines.handle(record("first"))
    assert stream.gate.reached.wait(WAIT)
    for _ in range(11):
        lines.handle(record("x"))
    assert lines.lost == 1
    lines.queue.get_nowait()
    lines.queue.task_done()
    lines.handle(record("there is room for one"))
    assert (lines.lost, lines.queue.qsize()) == (2, 9)
    stream.gate.open()
    assert lines.wait(WAIT)
    lines.close()


def test_the_end_says_what_was_lost() -> None:
    stream = Held()
    lines = Lines(stream, room=2)
    lines.handle(record("first"))
    assert stream.gate.reached.wait(WAIT)
    for _ in range(5):
        lines.handle(record("x"))
    stream.gate.open()
    assert lines.wait(WAIT)
    lines.flush()
    assert stream.getvalue().splitlines()[-1].startswith("3 lines of the log were lost")
    lines.close()


def test_its_thread_ends_with_it() -> None:
    before = set(threading.enumerate())
    lines = Lines(io.StringIO())
    (own,) = set(threading.enumerate()) - before
    lines.handle(record("x"))
    assert own.is_alive()
    lines.close()
    wait_until(lambda: not own.is_alive())


def test_whatever_is_in_it_can_be_written(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        lines = Lines(stream)
        lines.handle(record("a \udcff ü"))
        assert lines.wait(WAIT)
        lines.close()
    assert (tmp_path / "log").read_text("utf-8") == "a \\udcff ü\n"


def test_a_server_whose_log_nobody_reads_serves_and_ends() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_server_privacy as t; t.serve('')"
    )
    command = [sys.executable, "-c", script, "serve", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            target = process.stdout.readline().removeprefix("listening on ").strip()
            with grpc.insecure_channel(target) as channel:
                probes, health = probes_pb2_grpc.ProbesStub(channel), health_pb2_grpc.HealthStub(channel)
                states = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT, wait_for_ready=True)
                assert any(one.status == health_pb2.HealthCheckResponse.SERVING for one in states), "it loads first"
                list_probes = probes_pb2.ListProbesRequest()
                for _ in range(1000):
                    probes.ListProbes(list_probes, timeout=WAIT)
                assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT)
            process.terminate()
            assert process.wait(WAIT) == 0
            text = process.stderr.read()
        finally:
            process.kill()
    assert len(re.findall("ListProbes OK", text)) < 900, "control: the pipe did not hold all of it"
