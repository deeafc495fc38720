"""grpc.health.v1, for any number of watchers, whose watch ends when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lapwing_server.context import Context
from lapwing_server.refusal import Refusal


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says NOT_SERVING until told otherwise.

    The servicer of grpcio-health-checking says SERVING when constructed, forgets every watcher of a service as soon as
    one of them leaves, and lets no watch end.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._status: dict[str, int] = dict.fromkeys(("", *services), health_pb2.HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Condition()
        self._closed = False

    async def set_serving(self, serving: bool) -> None:
        """The status of all services; once the health is closed, it stays NOT_SERVING."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        async with self._changed:
            if not self._closed:
                self._status = dict.fromkeys(self._status, status)
                self._changed.notify_all()

    async def close(self) -> None:
        """NOT_SERVING for good; every watch says so and ends."""
        await self.set_serving(False)
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The status of a service now."""
        if request.service not in self._status:
            raise Refusal(
                StatusCode.NOT_FOUND, "UNKNOWN_SERVICE", "service: there is no such service here", field="service"
            )
        return health_pb2.HealthCheckResponse(status=self._status[request.service])

    async def List(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Asked for by versions of grpcio-health-checking that know it; there it would be a plain function."""
        raise Refusal(StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD", "ask for one service by Check")

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status of a service now and whenever it changes."""
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        said = None
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self._closed or self._status.get(request.service, unknown) != said  # noqa: B023
                )
                status, closed = self._status.get(request.service, unknown), self._closed
            if status != said:
                said = status
                yield health_pb2.HealthCheckResponse(status=status)
            if closed:
                return
