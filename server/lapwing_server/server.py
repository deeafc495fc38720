"""A server from its first breath to its last: bind, load, warm up, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from functools import partial

import grpc
from grpc import StatusCode
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector.errors import DetectorError
from lapwing_detector.head_map import escaped
from lapwing_server import logs
from lapwing_server.addresses import bracketed
from lapwing_server.attention_stream import AttentionReader
from lapwing_server.context import Context
from lapwing_server.detector_service import DetectorService, deadline_of
from lapwing_server.engine import Loaded
from lapwing_server.guard import Guard
from lapwing_server.health import Health
from lapwing_server.interpreter import for_good, take_short_turns
from lapwing_server.metrics import Metrics
from lapwing_server.metrics_server import MetricsServer
from lapwing_server.mishap import report
from lapwing_server.parsing import Parser
from lapwing_server.probes_service import ProbesService
from lapwing_server.readiness import Phase, Readiness
from lapwing_server.refusal import Refusal
from lapwing_server.registrar import Registrar
from lapwing_server.scheduler import Scheduler
from lapwing_server.security import authenticator, credentials
from lapwing_server.security.principals import Principal
from lapwing_server.security.scopes import require_listed
from lapwing_server.security.watched import Watcher
from lapwing_server.settings import Settings as Settings
from lapwing_server.shelf import LONGEST_REASON
from lapwing_server.soundness import Checkup
from lapwing_server.swapping import Swapper
from lapwing_server.worker import Worker

log = logging.getLogger("lapwing.server")

SERVICES = (
    detector_pb2.DESCRIPTOR.services_by_name["Detector"].full_name,
    probes_pb2.DESCRIPTOR.services_by_name["Probes"].full_name,
)

SCORED = frozenset({"/lapwing.v1.Detector/Score", "/lapwing.v1.Detector/ScoreBatch"})
"""The methods whose calls wait in the queue, and are refused when their turn would come too late."""

FOREIGN_GRACE = 1.0
"""Seconds that streams which are not ours have at the end: a client of the reflection may keep one open for ever."""


class Server:
    """One server. Answers health checks and GetServerInfo from `start` on, and scores as soon as loading is done."""

    def __init__(self, load: Callable[[], Loaded], settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.watcher = Watcher()
        self._credentials = credentials(self.settings, self.watcher)
        self.metrics = Metrics()
        self.authenticator = authenticator(self.settings, self.metrics.shed, self.watcher)
        for name, file in self.watcher.files.items():
            self.metrics.watch(name, partial(getattr, file, "stale"))
        limits = self.settings.limits_in_force
        self._parser = Parser(limits)
        self.guard = Guard(self.metrics, self._admit, self._parser)
        self.readiness = Readiness(limits=limits)
        self.worker = Worker("lapwing-worker")
        self._checkup = Checkup(self._works, self._tell_whether_it_works, self._stuck)
        self.scheduler = Scheduler(self.worker, limits, self.metrics, doubt=self._checkup.doubt)
        self._artist = Worker("lapwing-artist")
        self._reader = Worker("lapwing-reader")
        self._swapper = Swapper(self.readiness, self._load_again, self.metrics.probes)
        self._load = load
        self._health = Health(SERVICES)
        self._loading: asyncio.Task[None] | None = None
        self._page: MetricsServer | None = None
        self.metrics_port: int | None = None
        """Where the metrics are; None without them."""
        self._grpc = grpc.aio.server(options=self.settings.options)
        self._grpc.add_generic_rpc_handlers((self.guard,))
        require_listed(self._register())

    async def start(self) -> int:
        """Listens, begins to load, and returns the port.

        Raises:
            OSError: a port can't be listened on.
        """
        port = self._bind()
        if self.settings.metrics_port is not None:
            self._page = MetricsServer(self.metrics.registry, self.settings.metrics_port, self.settings.metrics_host)
            self.metrics_port = self._page.start()
            log.info("metrics on http://%s:%d/metrics", bracketed(self.settings.metrics_host), self.metrics_port)
        await self._grpc.start()
        self.watcher.start()
        self._loading = asyncio.create_task(self._prepare())
        return port

    async def loaded(self) -> None:
        """Waits until loading is done, well or not."""
        assert self._loading is not None, "start() comes first"
        await asyncio.shield(self._loading)

    async def stop(self) -> None:
        """Says NOT_SERVING, lets calls in flight finish, ends."""
        self.readiness.stop()
        self._checkup.close()
        if self._loading is not None:
            self._loading.cancel()
        await self._health.close()
        await self._drain()
        self._parser.close()
        self.worker.close()
        self._artist.close()
        self._reader.close()
        await self._swapper.close()
        self.watcher.stop()  # up to then a token that is taken back is refused
        if self._page is not None:
            await asyncio.to_thread(self._page.stop)  # it waits for its threads

    async def _drain(self) -> None:
        """Lets our own calls finish, those included that came together with the signal; of others not for long."""
        stopping = asyncio.create_task(self._grpc.stop(self.settings.grace))
        while not stopping.done():
            idle = asyncio.create_task(self.guard.idle())
            await asyncio.wait((stopping, idle), return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
            await asyncio.wait((stopping,), timeout=FOREIGN_GRACE)
            if not self.guard.in_flight:
                break
        await self._grpc.stop(None)
        await stopping

    def _admit(self, method: str, context: Context) -> Principal:
        principal = self.authenticator.admit(method, context)
        if method in SCORED and self.readiness.loaded_or_none is not None:
            self.scheduler.require_hope(deadline=deadline_of(context), client=principal.name)
        return principal

    def _register(self) -> frozenset[str]:
        registrar = Registrar(self.guard)
        attention = AttentionReader(self.readiness, self._reader, self.metrics)
        detector = DetectorService(self.readiness, self.scheduler, attention, self.metrics)
        detector_pb2_grpc.add_DetectorServicer_to_server(detector, registrar)  # type: ignore[no-untyped-call]
        probes_pb2_grpc.add_ProbesServicer_to_server(
            ProbesService(self.readiness, self._artist, self._swapper, self.metrics.shed), registrar
        )  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registrar)
        if self.settings.reflection:
            mirror = reflection.aio.ReflectionServicer((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME))
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(mirror, registrar)
        return registrar.methods

    def _bind(self) -> int:
        settings = self.settings
        address = f"{settings.address}:{settings.port}"
        try:
            if self._credentials is not None:
                return self._grpc.add_secure_port(address, self._credentials)
            return self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(
                f"port {settings.port} of host {settings.host} can't be listened on: perhaps another server "
                "has it, or the host is not of this machine; give another --port (0 for a free one) or --host"
            ) from error

    async def _prepare(self) -> None:
        try:
            loaded = await self.worker.run(self._load)
        except DetectorError as error:
            log.error("not serving: %s (ReloadProbes loads once more)", error)
            self.readiness.fail(escaped(str(error), LONGEST_REASON))
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            message = f"loading failed with {type(error).__name__}, error {report(error, 'loading')}"
            log.error("not serving: %s; --log-level debug has its words", message)
            self.readiness.fail(f"{message}; the log has the rest")
        else:
            self.scheduler.begin(loaded.engine)
            self.readiness.succeed(loaded)
            self.metrics.probes(loaded.shelf)
            self._checkup.begin()
            await self._health.set_serving(True)
            log.info("serving %s with probe %s", loaded.engine.identity.name, loaded.shelf.active.name)

    async def _load_again(self) -> Loaded:
        """Loads once more, where nothing could be loaded.

        Raises:
            Refusal: it still can't be, or the first time is not over, or the server goes.
        """
        if self.readiness.begin_again():
            self._loading = asyncio.create_task(self._prepare())
            await asyncio.wait((self._loading,))
            if self.readiness.phase is Phase.FAILED:
                message = f"not serving: {self.readiness.message}"
                raise Refusal(StatusCode.FAILED_PRECONDITION, "SERVER_FAILED", message)
        return self.readiness.loaded

    async def _works(self) -> bool:
        return await self.scheduler.works(self.readiness.loaded.shelf.active)

    def _stuck(self) -> bool:
        return self.scheduler.computing > self.readiness.limits.stuck_seconds

    async def _tell_whether_it_works(self, why_not: str | None) -> None:
        if why_not is None:
            self.readiness.mended()
            log.info("serving again: the model works")
        else:
            log.error("not serving: %s; start the server anew if that goes on", why_not)
            self.readiness.broken(why_not)
        await self._health.set_serving(why_not is None)


async def serve(load: Callable[[], Loaded], settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        load: see `Server`.
        settings: how to serve.
        announce: told "HOST:PORT" as soon as the server listens.

    Raises:
        UnusableFile: a certificate, key or file of tokens can't be used.
        OSError: a port can't be listened on, or what `announce` raises.
    """
    logs.catch_strays()
    take_short_turns()
    server = Server(for_good(load), settings)
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
