"""Registries of probes of the tiny engine's model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_fakes import FakeEngine, a_probe, an_identity
from service_fakes import Running

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
