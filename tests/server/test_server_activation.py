"""ActivateProbe: it scores from now on and is kept, or nothing changes; and nobody waits for it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from probe_registries import Caller, a_registry, a_revision, calling, damaged, publish, scored_by
from service_fakes import WAIT, Gate, wait_until

from lapwing.v1 import probes_pb2
from lapwing_detector import durable
from lapwing_detector.registry import Registry
from lapwing_server import swapping

ALPHA = [a_revision(number) for number in range(4)]
BETA = [a_revision(number, "beta") for number in range(2)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """One revision of alpha, which is active, and one of beta."""
    return a_registry(tmp_path / "registry", ALPHA[0], BETA[0])


@pytest.fixture
def caller(registry: Registry) -> Iterator[Caller]:
    with calling(registry.root) as caller:
        yield caller


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


@pytest.mark.parametrize("leaves", [True, False])
def test_an_activation_whose_caller_left_before_its_turn_never_begins(
    registry: Registry, caller: Caller, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    publish(registry, *ALPHA[1:3])
    held, guard = Held(monkeypatch, "activated"), caller.server.server.guard
    calls = []
    for number in (1, 2):
        request = probes_pb2.ActivateProbeRequest(name="alpha", revision=ALPHA[number].revision)
        calls.append(caller.probes.ActivateProbe.future(request, timeout=WAIT))
        assert held.gate.reached.wait(WAIT)
        wait_until(lambda number=number: guard.in_flight == number)
    if leaves:  # else it is the control
        calls[1].cancel()
        wait_until(lambda: guard.in_flight == 1)
    held.gate.open()
    assert calls[0].result(WAIT)
    caller.reload()  # comes behind whatever waits
    last = ALPHA[1 if leaves else 2]
    assert caller.scores() == scored_by(last)
    assert registry.current().revisions["alpha"] == last.revision


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
