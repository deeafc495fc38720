"""Two replicas behind one client: a rolling restart under load loses nothing. With the embedded model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from lapwing_client import Client, LapwingError

ROUNDS = 20 if os.environ.get("LAPWING_SOAK") == "1" else 3
READY = 120.0
"""Seconds after which a test gives up on a server; none of them is measured."""

PROMPT, RESPONSE = "Question: which country is the city of Lyon in? Answer:", " The city of Lyon is in France."


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Replica:
    """A server process that can be started again on its port."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "lapwing_client", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    def wait(self) -> None:
        with Client(self.target) as client:
            client.wait_until_ready(READY)

    def stop(self) -> int:
        """Tells it to end, and returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(READY)


@dataclass
class Traffic:
    """Calls from several threads, one after another in each, until it is told to end."""

    client: Client
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.over.is_set():
            try:
                assert self.client.score(PROMPT, RESPONSE, timeout=60).state == "SCORED"
                self.answered += 1
            except LapwingError as error:
                self.failed.append(str(error))

    @contextmanager
    def flowing(self, threads: int = 4) -> Iterator[None]:
        running = [threading.Thread(target=self.run) for _ in range(threads)]
        for thread in running:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            for thread in running:
                thread.join(READY)


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    found = [Replica(), Replica()]
    for replica in found:
        replica.start()
    try:
        for replica in found:
            replica.wait()
        yield found
    finally:
        for replica in found:
            assert replica.process is not None
            replica.process.kill()
            replica.process.wait()


@pytest.mark.timeout(1800)
def test_a_rolling_restart_under_load_fails_no_call(replicas: list[Replica]) -> None:
    with Client([replica.target for replica in replicas]) as client:
        traffic = Traffic(client)
        with traffic.flowing():
            for _ in range(ROUNDS):
                for replica in replicas:
                    before = traffic.answered
                    assert replica.stop() == 0
                    replica.start()
                    replica.wait()
                    assert traffic.answered > before  # by the other one
        assert traffic.failed == []


@pytest.mark.timeout(600)
def test_control_one_server_alone_is_missed_while_it_restarts(replicas: list[Replica]) -> None:
    alone = replicas[0]
    with Client(alone.target, retry=False) as client:
        traffic = Traffic(client)
        with traffic.flowing(2):
            assert alone.stop() == 0
            traffic.over.wait(0.5)
        assert traffic.failed
