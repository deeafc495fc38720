"""A server from its first breath to its last: bind, load, warm up, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector.errors import DetectorError
from lapwing_detector.head_map import escaped
from lapwing_server.detector_service import DetectorService
from lapwing_server.engine import Loaded
from lapwing_server.guard import Guard, report
from lapwing_server.health import Health
from lapwing_server.limits import Limits
from lapwing_server.probes_service import ProbesService
from lapwing_server.readiness import Readiness
from lapwing_server.shelf import LONGEST_REASON
from lapwing_server.worker import Worker

log = logging.getLogger("lapwing.server")

SERVICES = (
    detector_pb2.DESCRIPTOR.services_by_name["Detector"].full_name,
    probes_pb2.DESCRIPTOR.services_by_name["Probes"].full_name,
)

FOREIGN_GRACE = 1.0
"""Seconds that streams which are not ours have at the end: a client of the reflection may keep one open for ever."""


@dataclass(frozen=True)
class Settings:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 takes a free one."""

    limits: Limits = field(default_factory=Limits)
    grace: float = 30.0
    """Seconds that calls in flight have to finish at the end."""

    keepalive: float = 30.0
    """Seconds of silence after which a client is asked whether it is still there."""

    keepalive_timeout: float = 10.0
    """Seconds that it has to answer."""

    @property
    def address(self) -> str:
        """The host as it stands before a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def options(self) -> list[tuple[str, int]]:
        """The same for gRPC."""
        return [
            ("grpc.so_reuseport", 0),  # a second server on a port must fail, not take half of the calls
            ("grpc.max_receive_message_length", self.limits.request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", int(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout * 1000)),  # of a ping in flight; else a minute
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]


class Server:
    """One server. Answers health checks and GetServerInfo from `start` on, and scores as soon as loading is done."""

    def __init__(self, load: Callable[[], Loaded], settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.readiness = Readiness(limits=self.settings.limits)
        self.worker = Worker("lapwing-worker")
        self.guard = Guard()
        self._artist = Worker("lapwing-artist")
        self._load = load
        self._health = Health(SERVICES)
        self._loading: asyncio.Task[None] | None = None
        self._grpc = grpc.aio.server(interceptors=[self.guard], options=self.settings.options)
        detector_pb2_grpc.add_DetectorServicer_to_server(DetectorService(self.readiness, self.worker), self._grpc)  # type: ignore[no-untyped-call]
        probes_pb2_grpc.add_ProbesServicer_to_server(ProbesService(self.readiness, self._artist), self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    async def start(self) -> int:
        """Listens, begins to load, and returns the port.

        Raises:
            OSError: the port can't be listened on.
        """
        try:
            port = self._grpc.add_insecure_port(f"{self.settings.address}:{self.settings.port}")
        except RuntimeError as error:
            raise OSError(
                f"port {self.settings.port} of host {self.settings.host} can't be listened on: perhaps another server "
                "has it, or the host is not of this machine; give another --port (0 for a free one) or --host"
            ) from error
        await self._grpc.start()
        self._loading = asyncio.create_task(self._prepare())
        return port

    async def loaded(self) -> None:
        """Waits until loading is done, well or not."""
        assert self._loading is not None, "start() comes first"
        await asyncio.shield(self._loading)

    async def stop(self) -> None:
        """Says NOT_SERVING, lets calls in flight finish, ends."""
        self.readiness.stop()
        await self._health.close()
        if self._loading is not None:
            self._loading.cancel()
        stopping = asyncio.create_task(self._grpc.stop(self.settings.grace))
        idle = asyncio.create_task(self.guard.idle())
        await asyncio.wait((stopping, idle), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((stopping,), timeout=FOREIGN_GRACE)
        await self._grpc.stop(None)
        await stopping
        idle.cancel()
        self.worker.close()
        self._artist.close()

    async def _prepare(self) -> None:
        try:
            loaded = await self.worker.run(self._load)
        except DetectorError as error:
            log.error("not serving: %s", error)
            self.readiness.fail(escaped(str(error), LONGEST_REASON))
        except Exception as error:
            error_id = report(error, "loading")
            log.error("not serving: %s", error)
            self.readiness.fail(f"loading failed with {type(error).__name__}, error {error_id}; the log has the rest")
        else:
            self.readiness.succeed(loaded)
            await self._health.set_serving(True)
            log.info("serving %s with probe %s", loaded.engine.identity.name, loaded.engine.probe.name)


async def serve(load: Callable[[], Loaded], settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        load: see `Server`.
        settings: how to serve.
        announce: told "HOST:PORT" as soon as the server listens.

    Raises:
        OSError: the port can't be listened on, or what `announce` raises.
    """
    server = Server(load, settings)
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, partial(stop_once, told_to_stop, number))
    try:
        port = await server.start()
        announce(f"{settings.address}:{port}")
        await told_to_stop.wait()
    finally:
        await server.stop()
        log.info("stopped")


def stop_once(told_to_stop: asyncio.Event, number: signal.Signals) -> None:
    """The answer to a signal."""
    log.info("%s: finishing what is in flight", number.name)
    told_to_stop.set()
