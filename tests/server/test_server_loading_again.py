"""A server that could not load is mended without a restart: ReloadProbes loads once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from metrics_pages import registry_page, score
from service_fakes import WAIT, FakeEngine, Gate, Running, a_probe, refused, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector.errors import UnsupportedModel
from lapwing_server.engine import Loaded, loader
from tests.detector.registries import write_probe

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FAILED, LOADING = detector_pb2.SERVER_STATE_FAILED, detector_pb2.SERVER_STATE_LOADING

RELOAD = probes_pb2.ReloadProbesRequest()


class Asked:
    """A client of a server that does not serve."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.detector = detector_pb2_grpc.DetectorStub(channel)
        self.probes = probes_pb2_grpc.ProbesStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def info(self) -> Any:
        return self.detector.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT)

    def watch(self) -> Iterator[int]:
        request = health_pb2.HealthCheckRequest()
        return (answer.status for answer in self.health.Watch(request, timeout=WAIT))


def damage(directory: Path) -> bytes:
    """Damages the weights of a probe, and returns what they were."""
    path = directory / "probe.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def test_a_mended_probe_is_loaded_without_a_restart(tmp_path: Path) -> None:
    directory = write_probe(tmp_path / "alpha", a_probe("alpha", metrics={}))
    sound, gate, made = damage(directory), Gate(), []

    def make(*_: Any) -> FakeEngine:
        made.append(1)
        gate()
        return FakeEngine()

    with Running(load=loader(probes=tmp_path, make=make)) as server, grpc.insecure_channel(server.target) as channel:
        one, watch = Asked(channel), Asked(channel).watch()
        assert next(watch) == NOT_SERVING
        first = one.info()
        assert (first.state, "alpha" in first.message) == (FAILED, True)
        again = refused(one.probes.ReloadProbes, RELOAD)
        assert (again.code, again.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SERVER_FAILED")
        assert first.message[:100] in again.message
        assert (one.info().state, made) == (FAILED, []), "control: what is not mended does not serve"
        (directory / "probe.safetensors").write_bytes(sound)
        reload = one.probes.ReloadProbes.future(RELOAD, timeout=WAIT)
        assert gate.reached.wait(WAIT)
        assert one.info().state == LOADING
        assert refused(one.detector.Score, score("hello", "world")).reason == "SERVER_LOADING"
        second = one.probes.ReloadProbes.future(RELOAD, timeout=WAIT)  # waits for the first, and reloads the probes
        gate.open()
        assert [probe.name for probe in reload.result(WAIT).probes] == ["alpha"]
        assert [probe.name for probe in second.result(WAIT).probes] == ["alpha"]
        assert next(watch) == SERVING
        assert one.detector.Score(score("hello", "world"), timeout=WAIT).detection.probe_name == "alpha"
        assert len(made) == 1
        assert registry_page(server.server.metrics)("probe_info", role="active", name="alpha") == 1


@pytest.mark.parametrize("error", [UnsupportedModel("its attention can't be captured"), MemoryError("a secret")])
def test_a_model_that_could_not_be_loaded_is_tried_again(error: Exception) -> None:
    left = [error, error]

    def load() -> Loaded:
        if left:
            raise left.pop()
        return Loaded(FakeEngine(), shelf)

    with Running() as other:
        shelf = other.server.readiness.loaded.shelf
    with Running(load=load) as server, grpc.insecure_channel(server.target) as channel:
        one = Asked(channel)
        again = refused(one.probes.ReloadProbes, RELOAD)
        assert again.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "secret" not in again.message
        assert len(one.probes.ReloadProbes(RELOAD, timeout=WAIT).probes) == 1
        assert one.info().state == detector_pb2.SERVER_STATE_SERVING


def test_whoever_asked_may_leave_and_it_is_loaded_nevertheless() -> None:
    gate, failing = Gate(), [True]

    def load() -> Loaded:
        if failing.pop():
            failing.append(False)
            raise MemoryError
        gate()
        return loaded

    with Running() as other:
        loaded = other.server.readiness.loaded
    with Running(load=load) as server, grpc.insecure_channel(server.target) as channel:
        one = Asked(channel)
        call = one.probes.ReloadProbes.future(RELOAD, timeout=WAIT)
        assert gate.reached.wait(WAIT)
        call.cancel()
        wait_until(lambda: server.server.guard.in_flight == 0)
        gate.open()
        wait_until(lambda: one.info().state == detector_pb2.SERVER_STATE_SERVING)


def test_the_end_of_the_server_ends_it() -> None:
    gate, failing = Gate(), [True]

    def load() -> Loaded:
        if failing.pop():
            failing.append(False)
            raise MemoryError
        gate()
        raise AssertionError("nobody waits for it")

    with Running(load=load) as server, grpc.insecure_channel(server.target) as channel:
        one = Asked(channel)
        call = one.probes.ReloadProbes.future(RELOAD, timeout=WAIT)
        assert gate.reached.wait(WAIT)
        server.close()
        with pytest.raises(grpc.RpcError):
            call.result(WAIT)
        gate.open()


def test_while_it_loads_for_the_first_time_there_is_nothing_to_load_again() -> None:
    gate, begun = Gate(), []

    def load() -> Loaded:
        begun.append(1)
        gate()
        return loaded

    with Running() as other:
        loaded = other.server.readiness.loaded
    with Running(load=load, ready=False) as server, grpc.insecure_channel(server.target) as channel:
        assert gate.reached.wait(WAIT)
        early = refused(Asked(channel).probes.ReloadProbes, RELOAD)
        assert (early.code, early.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_LOADING")
        gate.open()
        server.call(server.server.loaded())
        assert begun == [1]


def test_only_an_administrator_loads_again() -> None:
    begun: list[int] = []

    def load() -> Loaded:
        begun.append(1)
        raise MemoryError

    with Running(load=load, open_admin=False) as server, grpc.insecure_channel(server.target) as channel:
        refusal = refused(Asked(channel).probes.ReloadProbes, RELOAD)
        assert refusal.code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        assert begun == [1], "as when it started"
