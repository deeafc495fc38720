"""ReloadProbes and ActivateProbe: what is sound takes over, what is not leaves what served before, and says why."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from probe_registries import a_registry, a_revision, foreign, publish, serving
from service_fakes import WAIT, Gate, Running, a_shelf, refused, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector import durable
from lapwing_detector.errors import ProbeCorrupt, RegistryError
from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from lapwing_server import swapping
from lapwing_server.shelving import shelve
from tests.detector.registries import resign, write_probe

ALPHA = [a_revision(number) for number in range(4)]
BETA = [a_revision(number, "beta") for number in range(2)]


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


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """One revision of alpha, which is active, and one of beta."""
    return a_registry(tmp_path / "registry", ALPHA[0], BETA[0])


@pytest.fixture
def caller(registry: Registry) -> Iterator[Caller]:
    with calling(registry.root) as caller:
        yield caller


# What a registry says.


def test_a_server_shows_what_its_registry_says(registry: Registry, caller: Caller) -> None:
    assert caller.scores() == caller.scores("alpha") == scored_by(ALPHA[0])
    assert caller.scores("beta") == scored_by(BETA[0])
    publish(registry, ALPHA[1], BETA[1])
    registry.shadow("beta")
    assert list(caller.get("alpha").revisions) == [ALPHA[0].revision], "only a reload looks again"
    shown = caller.reload()
    assert {name: (probe.state, probe.revision, list(probe.revisions)) for name, probe in shown.items()} == {
        "alpha": (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[0].revision, [ALPHA[1].revision, ALPHA[0].revision]),
        "beta": (probes_pb2.PROBE_STATE_SHADOW, BETA[1].revision, [BETA[1].revision, BETA[0].revision]),
    }
    assert caller.get() == shown["alpha"]
    assert list(caller.probes.ListProbes(probes_pb2.ListProbesRequest()).probes) == list(shown.values())


def test_a_reload_takes_over_what_the_registry_says(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], activate=True)
    assert caller.scores() == scored_by(ALPHA[0])
    assert caller.reload()["alpha"].revision == ALPHA[1].revision
    assert caller.scores() == scored_by(ALPHA[1])
    registry.activate("beta")
    caller.reload()
    assert caller.scores() == scored_by(BETA[0])
    registry.rollback()
    registry.rollback()
    caller.reload()
    assert caller.scores() == scored_by(ALPHA[0])
    info = caller.detector.GetServerInfo(detector_pb2.GetServerInfoRequest())
    assert (info.probe_name, info.probe_revision) == scored_by(ALPHA[0])[:2]


def test_a_heatmap_names_the_revision_that_it_shows(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], activate=True)
    caller.reload()
    shown = caller.probes.GetHeatmap(probes_pb2.GetHeatmapRequest(statistic="STATISTIC_WEIGHT"))
    assert (shown.probe_name, shown.probe_revision) == (ALPHA[1].name, ALPHA[1].revision)


def test_a_shadow_revision_of_the_active_name_scores_unseen(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1])
    registry.shadow("alpha", ALPHA[1].revision)
    assert caller.reload()["alpha"].state == probes_pb2.PROBE_STATE_ACTIVE
    [shadow] = caller.server.server.readiness.loaded.shelf.shadows
    assert shadow.revision == ALPHA[1].revision
    assert caller.scores() == scored_by(ALPHA[0])
    counted = caller.server.server.metrics.registry.get_sample_value
    wait_until(lambda: counted("lapwing_score_probability_count", {"role": "shadow", "probe": "alpha"}) == 1.0)
    caller.activate(ALPHA[1])
    assert caller.server.server.readiness.loaded.shelf.shadows == ()


# What fails its checks.


def damaged(registry: Registry, probe: Probe) -> None:
    path = registry.root / probe.name / probe.revision / "probe.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def too_new(registry: Registry, probe: Probe) -> None:
    resign(registry.root / probe.name / probe.revision, schema_version=2)


def missing(registry: Registry, probe: Probe) -> None:
    shutil.rmtree(registry.root / probe.name / probe.revision)


def led_out(registry: Registry, probe: Probe) -> None:
    place = registry.root / probe.name / probe.revision
    outside = registry.root.parent / "outside"
    shutil.move(place, outside)
    place.symlink_to(outside)


BREAK: list[tuple[Callable[[Registry, Probe], None], str]] = [
    (damaged, "sha256 differs"),
    (too_new, "not what was published"),
    (missing, "is missing"),
    (led_out, "leads elsewhere"),
]


@pytest.mark.parametrize(("spoil", "said"), BREAK, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_revision_never_serves_and_the_previous_one_stays(
    registry: Registry, caller: Caller, spoil: Callable[[Registry, Probe], None], said: str
) -> None:
    publish(registry, ALPHA[1], activate=True)
    spoil(registry, ALPHA[1])
    shown = caller.reload()["alpha"]
    assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[0].revision)
    [rejected] = shown.rejected_revisions
    assert rejected.revision == ALPHA[1].revision
    assert said in rejected.message
    assert caller.get("alpha") == shown
    assert caller.scores() == caller.scores("alpha") == scored_by(ALPHA[0])
    assert caller.rejections == 1
    # Control: the same revision, whole again, serves.
    shutil.rmtree(registry.root / "alpha" / ALPHA[1].revision, ignore_errors=True)
    if (registry.root / "alpha" / ALPHA[1].revision).is_symlink():
        (registry.root / "alpha" / ALPHA[1].revision).unlink()
    publish(registry, ALPHA[1])
    shown = caller.reload()["alpha"]
    assert (shown.revision, list(shown.rejected_revisions)) == (ALPHA[1].revision, [])
    assert caller.scores() == scored_by(ALPHA[1])


def test_a_probe_of_another_model_never_serves(registry: Registry, caller: Caller) -> None:
    publish(registry, foreign(1), activate=True)
    shown = caller.reload()["alpha"]
    assert shown.revision == ALPHA[0].revision
    assert "was fitted on other-model with tokenizer" in shown.rejected_revisions[0].message
    assert caller.scores() == scored_by(ALPHA[0])
    error = caller.refused("alpha", foreign(1).revision)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_MISMATCH")
    assert "lapwing extract" in error.message


def test_where_another_name_should_take_over_and_is_broken_the_active_one_stays(
    registry: Registry, caller: Caller
) -> None:
    publish(registry, BETA[1], activate=True)
    damaged(registry, BETA[1])
    shown = caller.reload()
    assert (shown["alpha"].state, shown["beta"].state) == (
        probes_pb2.PROBE_STATE_ACTIVE,
        probes_pb2.PROBE_STATE_LOADED,
    )
    assert shown["beta"].revision == BETA[0].revision, "it was loaded before"
    assert caller.scores() == scored_by(ALPHA[0])
    assert caller.scores("beta") == scored_by(BETA[0])


def test_a_broken_name_that_was_never_loaded_is_rejected_and_says_why(registry: Registry, caller: Caller) -> None:
    gamma = a_revision(0, "gamma")
    publish(registry, gamma)
    damaged(registry, gamma)
    shown = caller.reload()["gamma"]
    assert shown.state == probes_pb2.PROBE_STATE_REJECTED
    assert "sha256 differs" in shown.state_message
    assert [one.revision for one in shown.rejected_revisions] == list(shown.revisions) == [gamma.revision]
    request = detector_pb2.ScoreRequest(probe="gamma")
    request.prompt.text, request.response.text = "hello", "world"
    error = refused(caller.detector.Score, request)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_REJECTED")


def test_a_broken_shadow_ceases_and_says_why(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1])
    registry.shadow("alpha", ALPHA[1].revision)
    caller.reload()
    damaged(registry, ALPHA[1])
    shown = caller.reload()["alpha"]
    assert (shown.revision, shown.rejected_revisions[0].revision) == (ALPHA[0].revision, ALPHA[1].revision)
    assert caller.server.server.readiness.loaded.shelf.shadows == ()


def test_a_registry_that_can_not_be_read_changes_nothing(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], activate=True)
    whole = (registry.root / "CURRENT").read_bytes()
    (registry.root / "CURRENT").write_bytes(whole[:-40])
    error = refused(caller.probes.ReloadProbes, probes_pb2.ReloadProbesRequest())
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REGISTRY_FAILED")
    assert "is damaged" in error.message
    assert caller.refused("alpha").reason == "REGISTRY_FAILED"
    assert caller.scores() == scored_by(ALPHA[0])
    (registry.root / "CURRENT").write_bytes(whole)
    caller.reload()
    assert caller.scores() == scored_by(ALPHA[1])


def test_at_the_start_a_foreign_probe_is_left_out_and_a_foreign_active_one_stops_the_loading(tmp_path: Path) -> None:
    registry = a_registry(tmp_path / "registry", ALPHA[0], foreign(0, "beta"))
    with calling(registry.root) as caller:
        shown = caller.get("beta")
        assert shown.state == probes_pb2.PROBE_STATE_REJECTED
        assert "was fitted on other-model" in shown.state_message
        assert caller.scores() == scored_by(ALPHA[0])
        assert caller.rejections == 1
    registry.activate("beta")
    with calling(registry.root) as caller:
        info = caller.detector.GetServerInfo(detector_pb2.GetServerInfoRequest())
        assert info.state == detector_pb2.SERVER_STATE_FAILED
        assert "was fitted on other-model" in info.message
        assert "lapwing probes rollback" in info.message
    registry.rollback()
    with calling(registry.root) as caller:
        assert caller.scores() == scored_by(ALPHA[0]), "control"


def test_what_a_registry_does_not_say_stops_the_loading(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="says itself that alpha scores; leave --probe beta out"):
        shelve(registry.root, "beta")
    assert shelve(registry.root, "alpha").active.revision == ALPHA[0].revision
    damaged(registry, ALPHA[0])
    with pytest.raises(ProbeCorrupt, match=r"no sound probe named 'alpha'.*lapwing probes rollback"):
        shelve(registry.root)
    (registry.root / "CURRENT").unlink()
    with pytest.raises(RegistryError, match="is an empty registry; publish a probe"):
        shelve(registry.root)


# ActivateProbe.


def test_what_is_activated_scores_and_is_kept(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], ALPHA[2])
    done = caller.activate(ALPHA[2])
    assert (done.active.name, done.active.revision) == ("alpha", ALPHA[2].revision)
    assert done.active.state == probes_pb2.PROBE_STATE_ACTIVE
    assert list(done.active.revisions) == [probe.revision for probe in reversed(ALPHA[:3])]
    assert (done.previous_name, done.previous_revision) == ("alpha", ALPHA[0].revision)
    assert caller.scores() == scored_by(ALPHA[2])
    assert registry.current().revisions["alpha"] == ALPHA[2].revision
    done = caller.activate(BETA[0], exactly=False)
    assert (done.previous_name, done.previous_revision) == ("alpha", ALPHA[2].revision)
    assert caller.get("alpha").state == probes_pb2.PROBE_STATE_LOADED
    caller.activate(ALPHA[2])
    assert caller.activate(ALPHA[2]).previous_revision == ALPHA[2].revision, "again is harmless"
    with calling(registry.root) as restarted:
        assert restarted.scores() == scored_by(ALPHA[2])


def test_what_was_published_since_can_be_activated_without_a_reload(registry: Registry, caller: Caller) -> None:
    gamma = a_revision(3, "gamma")
    publish(registry, gamma)
    caller.activate(gamma, exactly=False)
    assert caller.scores() == caller.scores("gamma") == scored_by(gamma)


@pytest.mark.parametrize(
    ("name", "revision", "code", "reason", "field"),
    [
        ("", "", grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT", "name"),
        ("gamma", "", grpc.StatusCode.NOT_FOUND, "UNKNOWN_PROBE", "name"),
        ("../registry/alpha", "", grpc.StatusCode.NOT_FOUND, "UNKNOWN_PROBE", "name"),
        ("alpha", "0" * 12, grpc.StatusCode.NOT_FOUND, "UNKNOWN_REVISION", "revision"),
        ("alpha", "../../beta", grpc.StatusCode.NOT_FOUND, "UNKNOWN_REVISION", "revision"),
    ],
)
def test_what_is_not_there_is_not_activated(
    registry: Registry, caller: Caller, name: str, revision: str, code: Any, reason: str, field: str
) -> None:
    error = caller.refused(name, revision)
    assert (error.code, error.reason, error.field) == (code, reason, field)
    assert code is not grpc.StatusCode.NOT_FOUND or "known are " in error.message
    assert ".." not in error.message
    assert caller.scores() == scored_by(ALPHA[0])


def test_a_broken_revision_is_not_activated_and_the_reason_stays_to_be_seen(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1])
    damaged(registry, ALPHA[1])
    error = caller.refused("alpha", ALPHA[1].revision)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_CORRUPT")
    assert "sha256 differs" in error.message
    shown = caller.get("alpha")
    assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[0].revision)
    assert [one.revision for one in shown.rejected_revisions] == [ALPHA[1].revision]
    assert caller.rejections == 1
    assert caller.scores() == scored_by(ALPHA[0])
    assert registry.current().revisions["alpha"] == ALPHA[0].revision


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_the_registry_can_not_be_written_nothing_changes(
    registry: Registry, caller: Caller, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    publish(registry, ALPHA[1])

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as locked:
        locked.setattr(durable, "replace", refuse)
        error = caller.refused("alpha", ALPHA[1].revision)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REGISTRY_READ_ONLY")
    assert "lapwing probes activate alpha" in error.message
    assert caller.scores() == scored_by(ALPHA[0])
    assert registry.current().revisions["alpha"] == ALPHA[0].revision
    caller.activate(ALPHA[1])
    assert caller.scores() == scored_by(ALPHA[1]), "control"


def test_a_failure_that_nobody_foresaw_is_told_by_its_id_only(
    registry: Registry, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space", "/secret/place")

    monkeypatch.setattr(durable, "replace", full)
    publish_error = caller.refused("beta")
    assert (publish_error.code, publish_error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert publish_error.error_id
    assert "secret" not in publish_error.message
    assert caller.scores() == scored_by(ALPHA[0])


# While it changes.


class Held:
    """Holds a function of the librarian's until the gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.gate, self.threads = Gate(), set[str]()
        real = getattr(swapping, name)

        def held(*arguments: Any, **named: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            self.gate()
            return real(*arguments, **named)

        monkeypatch.setattr(swapping, name, held)


def test_nobody_waits_for_a_reload(registry: Registry, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "shelve")
    publish(registry, ALPHA[1], activate=True)
    with ThreadPoolExecutor(1) as pool:
        reloading = pool.submit(caller.reload)
        assert held.gate.reached.wait(WAIT)
        assert caller.scores() == scored_by(ALPHA[0])
        picture = probes_pb2.GetHeatmapRequest(statistic="STATISTIC_WEIGHT", image_format="IMAGE_FORMAT_SVG")
        assert caller.probes.GetHeatmap(picture, timeout=WAIT).image, "pictures have a thread of their own"
        assert not reloading.done()
        held.gate.open()
        assert reloading.result(WAIT)["alpha"].revision == ALPHA[1].revision
    assert held.threads == {"lapwing-librarian"}


def test_an_activation_whose_caller_left_is_finished(
    registry: Registry, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, ALPHA[1])
    held = Held(monkeypatch, "activated")
    request = probes_pb2.ActivateProbeRequest(name="alpha", revision=ALPHA[1].revision)
    call = caller.probes.ActivateProbe.future(request)
    assert held.gate.reached.wait(WAIT)
    call.cancel()
    caller.server.settle()
    held.gate.open()
    wait_until(lambda: caller.scores() == scored_by(ALPHA[1]))
    assert registry.current().revisions["alpha"] == ALPHA[1].revision, "the registry and the server agree"


def test_a_server_that_is_stopped_does_not_wait_for_a_change(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, "activated")
    with calling(registry.root, grace=0.0) as caller:
        call = caller.probes.ActivateProbe.future(probes_pb2.ActivateProbeRequest(name="beta"))
        assert held.gate.reached.wait(WAIT)
        caller.server.close()
        assert isinstance(call.exception(WAIT), grpc.RpcError)
    held.gate.open()


def test_changes_that_are_asked_for_at_once_come_one_after_another(registry: Registry, caller: Caller) -> None:
    publish(registry, *ALPHA[1:])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(caller.activate, (ALPHA + BETA[:1]) * 3))
        list(pool.map(lambda _: caller.reload(), range(4)))
    before = [(one.previous_name, one.previous_revision) for one in answers]
    after = [(one.active.name, one.active.revision) for one in answers]
    current = registry.current()
    last = (current.active, current.revisions[current.active])
    # A chain from the first to the last, each link once: what one brought is what the next one took away.
    assert sorted([*before, last]) == sorted([("alpha", ALPHA[0].revision), *after])
    assert caller.scores()[:2] == last


# Without a registry.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for probe in (ALPHA[0], BETA[0]):
        write_probe(tmp_path / "probes" / probe.name, probe)
    return tmp_path / "probes"


def test_in_a_directory_of_probes_what_is_activated_is_kept_in_memory(folder: Path) -> None:
    with calling(folder) as caller:
        assert list(caller.get("alpha").revisions) == [ALPHA[0].revision]
        done = caller.activate(BETA[0])
        assert (done.previous_name, done.previous_revision) == scored_by(ALPHA[0])[:2]
        assert caller.reload()["beta"].state == probes_pb2.PROBE_STATE_ACTIVE
        assert caller.scores() == scored_by(BETA[0])
        error = caller.refused("alpha", "0" * 12)
        assert (error.reason, error.field) == ("UNKNOWN_REVISION", "revision")
        assert caller.refused("gamma").reason == "UNKNOWN_PROBE"
    with calling(folder) as restarted:
        assert restarted.scores() == scored_by(ALPHA[0]), "control"


def test_in_a_directory_of_probes_a_reload_finds_what_came_changed_and_went(folder: Path) -> None:
    with calling(folder) as caller:
        write_probe(folder / "alpha", ALPHA[1])
        write_probe(folder / "gamma", a_revision(0, "gamma"))
        shutil.rmtree(folder / "beta")
        assert sorted(caller.reload()) == ["alpha", "gamma"]
        assert caller.scores() == scored_by(ALPHA[1])
        (folder / "alpha" / "README.md").write_text("not what was saved")
        shown = caller.reload()["alpha"]
        assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[1].revision)
        assert "README.md is not the file" in shown.rejected_revisions[0].message
        shutil.rmtree(folder / "alpha")
        shown = caller.reload()["alpha"]
        assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[1].revision)
        assert "does not hold it any more" in shown.rejected_revisions[0].message
        write_probe(folder / "beta", foreign(0, "beta"))
        assert caller.reload()["beta"].state == probes_pb2.PROBE_STATE_REJECTED
        assert caller.refused("beta").reason == "PROBE_CORRUPT"
        assert len(caller.get("beta").rejected_revisions) == 1
        assert caller.scores() == scored_by(ALPHA[1])


def test_probes_that_came_from_nowhere_stay_as_they_are() -> None:
    with Running(shelf=a_shelf("alpha", "beta")) as server, grpc.insecure_channel(server.target) as channel:
        caller = Caller(server, channel)
        assert sorted(caller.reload()) == ["alpha", "beta"]
        assert server.server.readiness.loaded.shelf.active.name == "alpha"


def test_nothing_is_changed_before_anything_was_loaded(registry: Registry) -> None:
    gate = Gate()

    def load() -> Any:
        gate()
        raise ProbeCorrupt("it is none")

    with Running(load=load, ready=False) as server, grpc.insecure_channel(server.target) as channel:
        caller = Caller(server, channel)
        error = refused(caller.probes.ReloadProbes, probes_pb2.ReloadProbesRequest())
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_LOADING")
        assert caller.refused("alpha").reason == "SERVER_LOADING"
        gate.open()
