"""A real server around a tiny engine, in a thread of its own, and what tests ask of its clients' errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
from engine_fakes import ATTENTION_SCORE as ATTENTION_SCORE
from engine_fakes import CONTEXT as CONTEXT
from engine_fakes import LAPLACIAN as LAPLACIAN
from engine_fakes import VOCABULARY as VOCABULARY
from engine_fakes import FakeEngine, a_probe
from engine_fakes import an_identity as an_identity
from google.rpc import error_details_pb2, status_pb2

from lapwing_server.engine import Loaded
from lapwing_server.interpreter import new_event_loop
from lapwing_server.server import Server, Settings
from lapwing_server.shelf import Shelf, Shelved

WAIT = 20.0
"""Seconds after which a test gives up waiting; none of them is measured."""


def a_shelf(*names: str, rejected: tuple[str, ...] = ()) -> Shelf:
    entries = [Shelved(name, a_probe(name), "") for name in names or ("fake-probe",)]
    entries += [Shelved(name, None, "its sha256 differs") for name in rejected]
    active = entries[0].probe
    assert active is not None
    return Shelf(tuple(sorted(entries, key=lambda entry: entry.name)), active)


@dataclass(frozen=True)
class Told:
    """What a client is told of an error."""

    code: grpc.StatusCode
    reason: str
    field: str
    message: str
    error_id: str


def told(error: Any) -> Told:
    """All that an error carries; fails when a part is missing or two parts disagree."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert info.domain == "lapwing"
    assert info.reason
    for detail in status.details[1:]:
        detail.Unpack(bad)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return Told(error.code(), info.reason, field, status.message, info.metadata.get("error_id", ""))


def refused(call: Any, message: Any) -> Told:
    """What the refusal of a message says; of a stream every event is read."""
    try:
        answer = call(message, timeout=WAIT)
        answers = [answer] if hasattr(answer, "SerializeToString") else list(answer)
    except grpc.RpcError as error:
        return told(error)
    raise AssertionError(f"it was not refused but answered with {answers}")


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks again and again until it holds."""
    ticks = threading.Event()
    for _ in range(int(WAIT / 0.005)):
        if condition():
            return
        ticks.wait(0.005)
    raise AssertionError("it did not come true")


class Gate:
    """Holds whoever comes until it is opened, and lets a test see that somebody came."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(WAIT), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()


class Running:
    """A real server on a free port; its event loop has a thread of its own."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        load: Callable[[], Loaded] | None = None,
        shelf: Shelf | None = None,
        ready: bool = True,
        new_loop: Callable[[], asyncio.AbstractEventLoop] = new_event_loop,
        **settings: Any,
    ) -> None:
        self.engine = engine or FakeEngine()
        loaded = Loaded(self.engine, shelf or a_shelf())
        own = settings.keys().isdisjoint(("host", "tls_client_ca", "tokens_file"))  # nobody else reaches it
        self.loop = new_loop()
        # A daemon: a server that does not stop fails its test, and does not keep the process for ever.
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-event-loop", daemon=True)
        self._thread.start()
        self._stopped = False
        try:
            self.server: Server = self.call(
                self._make(load or (lambda: loaded), Settings(**{"port": 0, "open_admin": own} | settings))
            )
            self.port: int = self.call(self.server.start())
            if ready:
                self.call(self.server.loaded())
        except BaseException:  # else the thread would keep the process that the test runs in
            self._end_loop()
            raise

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What the coroutine returns, run on the server's loop."""
        return self.begin(coroutine).result(WAIT)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def settle(self) -> None:
        """Waits until no call is in flight, and the worker has nothing left to do."""
        self.call(asyncio.wait_for(self.server.guard.idle(), WAIT))
        wait_until(lambda: self.server.scheduler.idle)
        self.call(self.server.worker.run(lambda: None))

    def queued(self, items: int) -> None:
        """Waits until so many items wait for their turn."""
        wait_until(lambda: self.server.scheduler.waiting == items)

    def close(self) -> None:
        if not self._stopped:
            self._stopped = True
            try:
                self.call(self.server.stop())
                self.call(self.loop.shutdown_default_executor())
            finally:
                self._end_loop()

    def _end_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT)
        self.loop.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _make(self, load: Callable[[], Loaded], settings: Settings) -> Server:
        return Server(load, settings)
