"""From the first breath to the last: ports, readiness, health, a failed load, draining."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from attention_fakes import a_header, a_summary, requests, score_now, some_maps
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from service_fakes import WAIT, FakeEngine, Gate, Running, a_probe, a_shelf

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Reason, State
from lapwing_detector.errors import CaptureError, ProbeCorrupt
from lapwing_server.engine import Loaded, loader, warm_up
from lapwing_server.server import Server, Settings

HERE = Path(__file__).parent
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
NAMES = ["", "lapwing.v1.Detector", "lapwing.v1.Probes"]

SCORE = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})


def check(target: str, service: str = "") -> int:
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT).status)


def info_of(target: str) -> detector_pb2.GetServerInfoResponse:
    with grpc.insecure_channel(target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        return stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT)


def score_error(target: str) -> grpc.RpcError:
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        detector_pb2_grpc.DetectorStub(channel).Score(SCORE, timeout=WAIT)
    return caught.value


# Ports.


def test_a_port_belongs_to_one_server() -> None:
    with (
        Running() as server,
        pytest.raises(OSError, match=f"port {server.port} of host 127.0.0.1 can't be listened on"),
    ):
        start_and_stop(Settings(port=server.port))


def test_control_by_default_two_servers_share_a_port() -> None:
    async def both() -> list[int]:
        servers = [grpc.aio.server(), grpc.aio.server()]
        port = servers[0].add_insecure_port("127.0.0.1:0")
        ports = [port, servers[1].add_insecure_port(f"127.0.0.1:{port}")]
        for server in servers:
            await server.stop(None)
        return ports

    first, second = asyncio.run(both())
    assert first == second, "and each would get a part of the calls"


def start_and_stop(settings: Settings) -> int:
    """The port of a server that lives for a moment."""

    async def start() -> int:
        server = Server(lambda: Loaded(FakeEngine(), a_shelf()), settings)
        try:
            return await server.start()
        finally:
            await server.stop()

    return asyncio.run(start())


def test_a_port_is_free_again_after_the_server() -> None:
    with Running() as server:
        port = server.port
    assert start_and_stop(Settings(port=port)) == port


# Readiness.


def test_not_serving_until_model_and_probe_are_loaded() -> None:
    gate = Gate()

    def load() -> Loaded:
        gate()
        return Loaded(FakeEngine(), a_shelf())

    with Running(load=load, ready=False) as server:
        assert gate.reached.wait(WAIT)
        assert [check(server.target, name) for name in NAMES] == [NOT_SERVING] * 3
        info = info_of(server.target)
        assert info.state == detector_pb2.SERVER_STATE_LOADING
        assert not info.HasField("model")
        error = score_error(server.target)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "being loaded" in error.details()
        gate.open()
        server.call(server.server.loaded())
        assert [check(server.target, name) for name in NAMES] == [SERVING] * 3
        assert info_of(server.target).state == detector_pb2.SERVER_STATE_SERVING


def test_control_the_usual_health_servicer_says_serving_at_once() -> None:
    from grpc_health.v1.health import aio

    response = asyncio.run(aio.HealthServicer().Check(health_pb2.HealthCheckRequest(), None))
    assert response.status == SERVING


def test_a_failed_load_leaves_the_server_alive_and_says_why() -> None:
    def load() -> Loaded:
        raise ProbeCorrupt("the probe is torn; fetch it again")

    with Running(load=load) as server:
        assert check(server.target) == NOT_SERVING
        info = info_of(server.target)
        assert info.state == detector_pb2.SERVER_STATE_FAILED
        assert info.message == "the probe is torn; fetch it again"
        error = score_error(server.target)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the probe is torn" in error.details()


def test_the_text_of_an_unforeseen_failure_stays_in_the_log() -> None:
    def load() -> Loaded:
        raise RuntimeError("the key is in /root/secret")

    with Running(load=load) as server:
        message = info_of(server.target).message
    assert "RuntimeError" in message
    assert "secret" not in message


def test_loading_loads_the_probe_makes_the_engine_and_warms_it_up(tmp_path: Path) -> None:
    a_probe("alpha", metrics={}, statistics={}).save_pretrained(tmp_path / "alpha")
    made: list[Any] = []

    def make(model: str | None, probe: Any) -> FakeEngine:
        made.extend([model, probe.name])
        return FakeEngine()

    loaded = loader("some-model", tmp_path, None, make)()
    assert made == ["some-model", "alpha"]
    assert loaded.shelf.active.name == "alpha"
    calls = loaded.engine.calls  # type: ignore[attr-defined]
    assert calls == ["score", "read", "step", "step", "step"], "the first client does not pay for the first forward"


def test_a_model_whose_attention_is_not_finite_never_serves() -> None:
    class Broken(FakeEngine):
        def score_ids(self, jobs: Any) -> Any:
            broken = {"state": State.UNSCORED, "reason": Reason.NON_FINITE}
            scored = super().score_ids(jobs)
            return [dataclasses.replace(one, detection=dataclasses.replace(one.detection, **broken)) for one in scored]

    with pytest.raises(CaptureError, match="the attention of fake-model is not finite"):
        warm_up(Broken(), a_probe())
    warm_up(FakeEngine(), a_probe())


# Health.


def test_an_unknown_service_is_not_found() -> None:
    with Running() as server, pytest.raises(grpc.RpcError) as caught:
        check(server.target, "nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def watch(target: str, service: str = "") -> Iterator[Any]:
    channel = grpc.insecure_channel(target)
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT)


def test_a_watcher_sees_every_change_and_the_end() -> None:
    gate = Gate()

    def load() -> Loaded:
        gate()
        return Loaded(FakeEngine(), a_shelf())

    with Running(load=load, ready=False) as server:
        seen = watch(server.target)
        assert next(seen).status == NOT_SERVING
        gate.open()
        assert next(seen).status == SERVING
        server.close()
        assert [response.status for response in seen] == [NOT_SERVING], "and then the watch ends well"


def test_a_watcher_that_leaves_does_not_silence_the_others() -> None:
    with Running() as server:
        leaver, stayer, stranger = watch(server.target), watch(server.target), watch(server.target, "nope")
        assert [next(one).status for one in (leaver, stayer, stranger)] == [SERVING, SERVING, UNKNOWN]
        leaver.cancel()  # type: ignore[attr-defined]
        server.close()
        assert next(stayer).status == NOT_SERVING
        assert list(stranger) == []


def test_reflection_lists_the_services() -> None:
    with Running(reflection=True) as server, grpc.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        [reply] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in reply.list_services_response.service}
    assert {"lapwing.v1.Detector", "lapwing.v1.Probes", "grpc.health.v1.Health"} <= names


def test_without_the_flag_there_is_no_reflection() -> None:
    with Running() as server, grpc.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_open_reflection_stream_does_not_keep_the_server() -> None:
    with Running(grace=60.0, reflection=True) as server, grpc.insecure_channel(server.target) as channel:
        never = threading.Event()
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        stream = stub.ServerReflectionInfo(iter(lambda: never.wait(WAIT), True))
        server.close()  # fails after WAIT, which is less than the grace
        never.set()
        with pytest.raises(grpc.RpcError):
            list(stream)


# The end.


def test_calls_in_flight_finish_before_the_end() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate)) as server, grpc.insecure_channel(server.target) as channel:
        score = detector_pb2_grpc.DetectorStub(channel).Score.future(SCORE)
        assert gate.reached.wait(WAIT)
        health = watch(server.target)
        assert next(health).status == SERVING
        stopping = server.begin(server.server.stop())
        assert [response.status for response in health] == [NOT_SERVING]
        assert not stopping.done()
        gate.open()
        assert score.result(WAIT).detection.probability
        stopping.result(WAIT)


def test_streams_in_flight_finish_before_the_end() -> None:
    gate, engine, outgoing = Gate(), FakeEngine(), SimpleQueue[Any]()
    engine.before = lambda: gate() if engine.steps == 3 else None
    maps = some_maps(13)
    with Running(engine) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        written = stub.Generate(detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=20), timeout=WAIT)
        sent = stub.ScoreAttention(iter(outgoing.get, None), timeout=WAIT)
        for part in requests(a_header(), a_summary(maps, 0, 6), score_now()):
            outgoing.put(part)
        assert next(sent).running
        assert gate.reached.wait(WAIT)
        health = watch(server.target)
        assert next(health).status == SERVING
        stopping = server.begin(server.server.stop())
        assert [response.status for response in health] == [NOT_SERVING]
        gate.open()
        assert len(list(written)) == 21
        assert not stopping.done(), "the other stream is still open"
        for part in requests(a_summary(maps, 6)):
            outgoing.put(part)
        outgoing.put(None)
        [last] = sent
        assert last.detection.HasField("logit")
        stopping.result(WAIT)


def test_the_grace_is_bounded() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate), grace=0.05) as server, grpc.insecure_channel(server.target) as channel:
        score = detector_pb2_grpc.DetectorStub(channel).Score.future(SCORE)
        assert gate.reached.wait(WAIT)
        server.close()
        with pytest.raises(grpc.RpcError):
            score.result(WAIT)
        gate.open()


PROGRAM = """
import asyncio, gc, sys
from lapwing_server.engine import Loaded
from lapwing_server.server import Settings, serve
from service_fakes import FakeEngine, a_shelf

def before():
    print("computing", gc.get_freeze_count() > 10_000, f"{sys.getswitchinterval():g}", flush=True)
    sys.stdin.readline()

engine = FakeEngine(before=before)
asyncio.run(serve(lambda: Loaded(engine, a_shelf()), Settings(port=0), lambda address: print(address, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_process_ends_with_0(number: signal.Signals) -> None:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        target = process.stdout.readline().strip()
        health = watch(target)
        while next(health).status != SERVING:
            pass
        with grpc.insecure_channel(target) as channel:
            score = detector_pb2_grpc.DetectorStub(channel).Score.future(SCORE, timeout=WAIT)
            assert process.stdout.readline() == "computing True 0.0005\n", "with nothing to collect, in short turns"
            process.send_signal(number)
            assert next(health).status == NOT_SERVING
            assert not score.done(), "watchers hear of the end before the last answer"
            process.stdin.write("\n")
            process.stdin.flush()
            assert score.result(WAIT).detection.probability
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_stream_that_comes_together_with_the_signal_finishes() -> None:
    engine, asked = FakeEngine(before=lambda: time.sleep(0.03)), threading.Event()
    with Running(engine) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT)  # it is connected

        async def stop() -> None:
            asked.set()
            time.sleep(0.3)  # the event loop is busy for a moment, in which the call arrives
            await server.server.stop()

        stopping = server.begin(stop())
        assert asked.wait(WAIT)
        call = stub.Generate(detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=60), timeout=WAIT)
        assert len(list(call)) == 61
        stopping.result(WAIT)
