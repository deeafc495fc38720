"""A tiny server of the wire alone: no model, no engine. It does what a test tells it to, over a real connection."""

# ruff: noqa: N802

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc

WAIT = 20.0
"""Seconds after which a test gives up waiting; none of them is measured."""

SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def the_detection(text: str) -> detection_pb2.Detection:
    """What every text is answered with: its length tells which one it was."""
    return detection_pb2.Detection(
        state="DETECTION_STATE_SCORED", probability=0.5, logit=float(len(text)), probe_name="wire"
    )


class WireServer(detector_pb2_grpc.DetectorServicer, probes_pb2_grpc.ProbesServicer):
    """Answers every call, after `before(method, context)`, which may wait or abort."""

    def __init__(
        self,
        before: Callable[[str, grpc.ServicerContext], None] = lambda method, context: None,
        *,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
        serving: bool = True,
        threads: int = 40,
        max_request_bytes: int = 0,
        reads_bytes: int = 4 * 2**20,
    ) -> None:
        self.before = before
        self.max_request_bytes = max_request_bytes
        self.calls: list[str] = []
        self.arrived: list[str] = []
        """Methods whose calls have begun, whether or not their request was read."""
        self.metadata: list[dict[str, str]] = []
        self.peers: set[str] = set()
        self.serving = threading.Event()
        if serving:
            self.serving.set()
        self._stopped = threading.Event()
        self._local = threading.local()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads),
            handlers=[Health(self)],
            interceptors=[Arrivals(self.arrived)],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", reads_bytes)],
        )
        detector_pb2_grpc.add_DetectorServicer_to_server(self, self._server)
        probes_pb2_grpc.add_ProbesServicer_to_server(self, self._server)
        address = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.target = f"127.0.0.1:{self.port}"

    def __enter__(self) -> WireServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def request(self) -> Any:
        """The Score request that `before` is called for."""
        return self._local.request

    def stop(self, grace: float | None = None) -> None:
        """Ends; with a grace after what is in flight."""
        self._stopped.set()
        self._server.stop(grace).wait()

    def Score(self, request: Any, context: Any) -> Any:
        self._local.request = request
        self._called("Score", context)
        return detector_pb2.ScoreResponse(detection=the_detection(request.response.text))

    def ScoreBatch(self, request: Any, context: Any) -> Any:
        self._called("ScoreBatch", context)
        return detector_pb2.ScoreBatchResponse(
            results=[{"detection": the_detection(item.response.text)} for item in request.items]
        )

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self._called("Generate", context)
        for index in range(request.max_new_tokens or 3):
            self.before("token", context)
            yield detector_pb2.GenerateResponse(token={"index": index, "token_id": 7, "text": "x"})
        yield detector_pb2.GenerateResponse(
            generation={"text": "x", "finish_reason": "FINISH_REASON_LENGTH", "detection": the_detection("x")}
        )

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self._called("GetServerInfo", context)
        limits = {"max_request_bytes": self.max_request_bytes}
        return detector_pb2.GetServerInfoResponse(state="SERVER_STATE_SERVING", probe_name="wire", limits=limits)

    def ListProbes(self, request: Any, context: Any) -> Any:
        self._called("ListProbes", context)
        page = int(request.page_token or 0)
        token = str(page + 1) if page < 2 else ""
        return probes_pb2.ListProbesResponse(probes=[{"name": f"probe-{page}"}], next_page_token=token)

    def GetProbe(self, request: Any, context: Any) -> Any:
        self._called("GetProbe", context)
        return probes_pb2.GetProbeResponse(probe={"name": request.name or "wire"})

    def GetHeatmap(self, request: Any, context: Any) -> Any:
        self._called("GetHeatmap", context)
        values = {"dtype": "DATA_TYPE_FLOAT32", "shape": [1, 2], "data": b"\0\0\x80\x3f\0\0\0\x40"}
        return probes_pb2.GetHeatmapResponse(statistic=request.statistic, values=values)

    def ActivateProbe(self, request: Any, context: Any) -> Any:
        self._called("ActivateProbe", context)
        active = {"name": request.name, "revision": request.revision or "newest"}
        return probes_pb2.ActivateProbeResponse(active=active, previous_name="wire", previous_revision="older")

    def ReloadProbes(self, request: Any, context: Any) -> Any:
        self._called("ReloadProbes", context)
        return probes_pb2.ReloadProbesResponse(probes=[{"name": "wire"}, {"name": "fresh"}])

    def _called(self, method: str, context: Any) -> None:
        self.calls.append(method)
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.add(context.peer())
        self.before(method, context)


class Arrivals(grpc.ServerInterceptor):
    """Notes every attempt of a call."""

    def __init__(self, arrived: list[str]) -> None:
        self._arrived = arrived

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        self._arrived.append(details.method.rpartition("/")[2])
        return continuation(details)


class Health(grpc.GenericRpcHandler):
    """grpc.health.v1, by its bytes."""

    def __init__(self, server: WireServer) -> None:
        self._server = server

    def service(self, details: Any) -> Any:
        if details.method == "/grpc.health.v1.Health/Check":
            return grpc.unary_unary_rpc_method_handler(self._check)
        if details.method == "/grpc.health.v1.Health/Watch":
            return grpc.unary_stream_rpc_method_handler(self._watch)
        return None

    def _check(self, request: bytes, context: Any) -> bytes:
        self._server.calls.append("Check")
        self._server.before("Check", context)
        return SERVING if self._server.serving.is_set() else NOT_SERVING

    def _watch(self, request: bytes, context: Any) -> Iterator[bytes]:
        said = None
        while context.is_active() and not self._server._stopped.is_set():
            now = SERVING if self._server.serving.is_set() else NOT_SERVING
            if now != said:
                said = now
                yield now
            time.sleep(0.01)
