"""Two replicas behind one client: a rolling restart under load loses nothing. With the embedded model."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess

import pytest
from replica_process import started
from service_fakes import wait_until

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
    process: ForkServerProcess | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = started(self.port)

    def wait(self) -> None:
        with Client(self.target) as client:
            client.wait_until_ready(READY)

    def stop(self) -> int | None:
        """Tells it to end by SIGTERM, and returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        self.process.join(READY)
        return self.process.exitcode

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(READY)


@dataclass
class Traffic:
    """Calls from several threads, one after another in each, until it is told to end."""

    client: Client
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    pause: float = 0.0
    """Seconds between two calls of a thread."""

    def run(self) -> None:
        while not self.over.wait(self.pause):
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


@contextmanager
def serving(count: int) -> Iterator[list[Replica]]:
    found = [Replica() for _ in range(count)]
    try:
        for replica in found:
            replica.start()
        for replica in found:
            replica.wait()
        yield found
    finally:
        for replica in found:
            replica.kill()


@pytest.mark.timeout(1800)
def test_a_rolling_restart_under_load_fails_no_call() -> None:
    with serving(2) as replicas, Client([replica.target for replica in replicas]) as client:
        traffic = Traffic(client)
        with traffic.flowing():
            for _ in range(ROUNDS):
                for replica in replicas:
                    before = traffic.answered
                    assert replica.stop() == 0
                    traffic.pause = 0.2  # what loads needs the cores, too
                    replica.start()
                    replica.wait()
                    assert traffic.answered > before  # by the other one
                    traffic.pause = 0.0
                    pressed = traffic.answered + 8
                    wait_until(lambda: traffic.answered >= pressed)  # noqa: B023
        assert traffic.failed == []


@pytest.mark.timeout(600)
def test_control_one_server_alone_is_missed_while_it_restarts() -> None:
    with serving(1) as [alone], Client(alone.target, retry=False) as client:
        traffic = Traffic(client)
        with traffic.flowing(2):
            assert alone.stop() == 0
            traffic.over.wait(0.5)
        assert traffic.failed
