"""Bytes to any method, with nothing of ours between a test and the wire; and a server without our guard."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from service_fakes import WAIT

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2

SECRET = "the key is in /root/secret"
GARBAGE = b"\xff\xff\xff"

METHODS = [
    method
    for file in (detector_pb2.DESCRIPTOR, probes_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]


def path_of(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def send_raw(channel: grpc.Channel, path: str, data: bytes, requests: bool = False, responses: bool = False) -> Any:
    """The error that these bytes are answered with."""
    kind = f"{'stream' if requests else 'unary'}_{'stream' if responses else 'unary'}"
    try:
        answer = getattr(channel, kind)(path)(iter([data]) if requests else data, timeout=WAIT)
        answers = list(answer) if responses else [answer]
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"the bytes were answered with {answers}")


@contextmanager
def bare_server() -> Iterator[grpc.Channel]:
    """grpc.aio without our guard: the control."""

    class Service(detector_pb2_grpc.DetectorServicer):
        async def Score(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise RuntimeError(SECRET)

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server()
        detector_pb2_grpc.add_DetectorServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(WAIT)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT)
        loop.close()


def good_score() -> bytes:
    request = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    return request.SerializeToString()
