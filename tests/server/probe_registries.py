"""Registries of probes of the tiny engine's model, and what is asked of servers that read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from engine_fakes import FakeEngine, a_probe, an_identity
from service_fakes import WAIT, Running, refused

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from lapwing_server.engine import Loaded
from lapwing_server.shelving import shelve
from tests.detector.registries import write_probe


def a_revision(number: int, name: str = "alpha", **changes: Any) -> Probe:
    """Revisions of one name differ in their bias, by 10; those of two names by less."""
    bias = 10.0 * number + len(name) / 10
    return a_probe(name, **{"bias": bias, "metrics": {}, "statistics": {}} | changes)


def foreign(number: int, name: str = "alpha") -> Probe:
    """A revision that was fitted on another model."""
    return a_revision(number, name, identity=replace(an_identity("other-model"), tokenizer="cd" * 32))


def publish(registry: Registry, *probes: Probe, activate: bool = False) -> None:
    """Publishes probes, which are saved beside the registry first."""
    for probe in probes:
        source = registry.root.parent / "sources" / f"{probe.name}-{probe.revision}"
        if not source.exists():
            write_probe(source, probe)
        registry.publish(source, activate=activate)


def a_registry(root: Path, *probes: Probe) -> Registry:
    """A registry in which the first probe is active."""
    registry = Registry(root)
    publish(registry, *probes)
    return registry


def serving(root: Path, engine: FakeEngine | None = None, **settings: Any) -> Running:
    """A server whose probes come from a directory."""
    engine = engine or FakeEngine()
    return Running(engine, load=lambda: Loaded(engine, shelve(root, require=engine.require)), **settings)


def damaged(registry: Registry, probe: Probe) -> None:
    path = registry.root / probe.name / probe.revision / "probe.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Caller:
    """All the calls that these tests make."""

    def __init__(self, server: Running, channel: Any) -> None:
        self.server = server
        self.probes = probes_pb2_grpc.ProbesStub(channel)  # type: ignore[no-untyped-call]
        self.detector = detector_pb2_grpc.DetectorStub(channel)  # type: ignore[no-untyped-call]

    def reload(self) -> dict[str, Any]:
        """Every probe after a reload, by name."""
        answer = self.probes.ReloadProbes(probes_pb2.ReloadProbesRequest(), timeout=WAIT)
        return {probe.name: probe for probe in answer.probes}

    def activate(self, probe: Probe, *, exactly: bool = True) -> Any:
        request = probes_pb2.ActivateProbeRequest(name=probe.name, revision=probe.revision if exactly else "")
        return self.probes.ActivateProbe(request, timeout=WAIT)

    def refused(self, name: str, revision: str = "") -> Any:
        return refused(self.probes.ActivateProbe, probes_pb2.ActivateProbeRequest(name=name, revision=revision))

    def get(self, name: str = "") -> Any:
        return self.probes.GetProbe(probes_pb2.GetProbeRequest(name=name), timeout=WAIT).probe

    def scores(self, name: str = "") -> tuple[str, str, float]:
        """Name, revision and bias of the probe that a score comes from."""
        request = detector_pb2.ScoreRequest(probe=name)
        request.prompt.text, request.response.text = "hello", "world"
        shown = self.detector.Score(request, timeout=WAIT).detection
        return shown.probe_name, shown.probe_revision, shown.bias

    @property
    def rejections(self) -> float:
        counted = self.server.server.metrics.registry.get_sample_value("lapwing_probe_rejections_total")
        assert counted is not None
        return counted


def scored_by(probe: Probe) -> tuple[str, str, float]:
    return probe.name, probe.revision, probe.bias


@contextmanager
def calling(root: Path, **settings: Any) -> Iterator[Caller]:
    with serving(root, **settings) as server, grpc.insecure_channel(server.target) as channel:
        yield Caller(server, channel)
