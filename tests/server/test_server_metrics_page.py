"""The page of the metrics: who reads it, or does not, holds up nobody."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from metrics_pages import page_of
from prometheus_client import CollectorRegistry, Counter
from service_fakes import WAIT, Running, wait_until

from lapwing_server import metrics_server
from lapwing_server.metrics import Metrics
from lapwing_server.metrics_server import MetricsServer


def threads() -> set[str]:
    """Our own; gRPC keeps one of its own for good."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("lapwing")}


def test_the_page_ends_with_its_server_and_leaves_no_thread() -> None:
    before = threads()
    with Running(metrics_port=0) as server:
        port = server.server.metrics_port
        assert page_of(port)
        assert "lapwing-metrics" in threads()
    assert threads() <= before
    with pytest.raises(urllib.error.URLError):
        page_of(port)


def test_a_server_without_a_port_for_them_has_no_page() -> None:
    with Running() as server:
        assert server.server.metrics_port is None
        assert "lapwing-metrics" not in threads()


def test_a_taken_port_is_named() -> None:
    first = MetricsServer(CollectorRegistry())
    port = first.start()
    try:
        with pytest.raises(OSError, match=rf"^port {port} of host 127.0.0.1 .*another --metrics-port"):
            MetricsServer(CollectorRegistry(), port).start()
        with pytest.raises(OSError, match="or --metrics-host"):
            MetricsServer(CollectorRegistry(), 0, "192.0.2.1").start()
    finally:
        first.stop()
        first.stop()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A page whose readers have a fifth of a second; its port."""
    monkeypatch.setattr(metrics_server, "PATIENCE", 0.2)
    server = MetricsServer(Metrics().registry)
    yield server.start()
    server.stop()


READER = "lapwing-reader"


@pytest.fixture
def readers() -> Callable[[], int]:
    """Counts the threads of this test's readers; a server of another test that could not start leaves some so named."""
    before = set(threading.enumerate())
    return lambda: sum(thread.name == READER for thread in threading.enumerate() if thread not in before)


def a_reader(port: int, says: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), WAIT)
    connection.sendall(says)
    return connection


def cut_off(connection: socket.socket) -> bool:
    """Whether the page has closed it, having said nothing; waits for that."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def refuses(connection: socket.socket, data: bytes) -> bool:
    """Whether nobody takes the data any more; looks for as long as the timeout of the connection."""
    try:
        connection.sendall(data)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


UNFINISHED = b"GET /metrics HTTP/1.0\r\nX-Header: "


@pytest.mark.parametrize("says", [b"", UNFINISHED])
def test_a_reader_who_never_asks_holds_nobody_up(short: int, says: bytes, capfd: Any) -> None:
    with a_reader(short, says) as reader:
        assert "lapwing_calls_in_flight" in page_of(short)
        assert cut_off(reader)
    assert capfd.readouterr() == ("", ""), "it is not printed, either"


def test_a_reader_who_asks_byte_by_byte_is_cut_off_all_the_same(short: int) -> None:
    """Each byte comes in time; all of the request does not."""
    with a_reader(short, UNFINISHED) as reader:
        reader.settimeout(0.02)
        wait_until(lambda: refuses(reader, b"a"))


def test_a_reader_who_takes_the_page_byte_by_byte_is_cut_off(
    readers: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(metrics_server, "PATIENCE", 0.2)
    registry = CollectorRegistry()
    for number in range(100):
        Counter(f"large_{number}", "x" * 100_000, registry=registry)
    server = MetricsServer(registry)
    try:
        with a_reader(server.start(), b"GET / HTTP/1.0\r\n\r\n"):
            wait_until(lambda: readers() == 1)
            wait_until(lambda: readers() == 0)
    finally:
        server.stop()
    assert capfd.readouterr() == ("", "")


def test_the_end_waits_for_no_reader(readers: Callable[[], int]) -> None:
    """All of them have seconds left."""
    before = threads()
    server = MetricsServer(Metrics().registry)
    port = server.start()
    with a_reader(port) as silent, a_reader(port, UNFINISHED) as unfinished:
        wait_until(lambda: readers() == 2)
        ending = threading.Thread(target=server.stop)
        ending.start()
        ending.join(metrics_server.PATIENCE / 2)
        assert not ending.is_alive()
        assert cut_off(silent)
        assert cut_off(unfinished)
    wait_until(lambda: threads() <= before and readers() == 0)


def test_many_readers_take_few_threads_and_the_last_one_is_served(readers: Callable[[], int]) -> None:
    server = MetricsServer(Metrics().registry)
    port = server.start()
    with ExitStack() as stack:
        crowd = [stack.enter_context(a_reader(port)) for _ in range(30)]
        assert "lapwing_calls_in_flight" in page_of(port)
        assert all(cut_off(reader) for reader in crowd[: 30 + 1 - metrics_server.READERS])
        assert readers() <= metrics_server.READERS
        crowd[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert crowd[-1].recv(8) == b"HTTP/1.0", "who came last is still heard"
        server.stop()


SERVE = """
import asyncio, sys
sys.path.insert(0, {here!r})
from service_fakes import FakeEngine, a_shelf
from lapwing_server.engine import Loaded
from lapwing_server.server import serve
from lapwing_server import server as module
from lapwing_server.settings import Settings
from lapwing_server import logs
logs.configure("info", "json")
asyncio.run(serve(lambda: Loaded(FakeEngine(), a_shelf()), Settings(port=0, metrics_port=0), lambda address: None))
"""


def test_a_reader_does_not_keep_a_process_alive() -> None:
    command = [sys.executable, "-c", SERVE.format(here=str(Path(__file__).parent))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            port = int(next(found[1] for line in process.stderr if (found := re.search(r":(\d+)/metrics", line))))
            with a_reader(port, UNFINISHED):
                process.terminate()
                assert process.wait(metrics_server.PATIENCE - 1) == 0
        finally:
            process.kill()


def test_a_page_that_fails_says_so_and_nothing_else(capfd: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def describe(self) -> list[Any]:
            return []

        def collect(self) -> list[Any]:
            raise RuntimeError("a secret")

    registry = CollectorRegistry()
    registry.register(Broken())  # type: ignore[arg-type]
    server = MetricsServer(registry)
    port = server.start()
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            page_of(port)
    finally:
        server.stop()
    assert caught.value.code == 500
    assert "a secret" not in caught.value.read().decode() + caplog.text + "".join(capfd.readouterr())
    assert "RuntimeError" in caplog.text
