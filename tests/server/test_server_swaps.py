"""Hot swaps under load: nothing fails, no answer mixes two revisions, and what was swapped out is freed.

100 swaps; 1,000 with LAPWING_SOAK=1.
"""

from __future__ import annotations

import gc
import math
import os
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine_fakes import FakeEngine, detect
from probe_registries import a_registry, a_revision, publish, serving
from service_fakes import WAIT, Gate, Running, wait_until

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector.calibration import Calibration
from lapwing_detector.probe import Probe, Threshold
from lapwing_detector.registry import Registry
from lapwing_detector.tokens import TokenIds
from lapwing_server.limits import Limits

SWAPS = 1000 if os.environ.get("LAPWING_SOAK") else 100
CLIENTS = 16
RATE = 0.05


def revision(number: int, name: str) -> Probe:
    """Differs from the others in all that an answer is made of."""
    probe = a_revision(number, name)
    return replace(
        probe,
        calibration=Calibration(1.0 + number / 10, 0.0),
        thresholds=(Threshold(RATE, probe.bias + 0.01 * number, 0.04, 100),),
    )


ALPHA = [revision(number, "alpha") for number in range(4)]
BETA = [revision(number, "beta") for number in range(2)]
PROBES = {(probe.name, probe.revision): probe for probe in (*ALPHA, *BETA)}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = a_registry(tmp_path / "registry", ALPHA[0])
    publish(registry, *ALPHA[1:], *BETA)
    registry.shadow("beta")
    return registry


def mixed(shown: detection_pb2.Detection) -> str:
    """Where a detection is not, to the last number, that of the revision that it names; empty if it is."""
    probe = PROBES[shown.probe_name, shown.probe_revision]
    ids = tuple(shown.token_ids)
    split = shown.prompt_tokens
    expected = detect(probe, TokenIds(ids[:split], ids[split:]), RATE)
    for field in ("bias", "logit", "probability", "flagged"):
        if not math.isclose(getattr(shown, field), getattr(expected, field), rel_tol=1e-6):
            return f"{field} is {getattr(shown, field)}, of {probe.name} {probe.revision} {getattr(expected, field)}"
    return ""


def test_control_an_answer_of_two_revisions_is_noticed() -> None:
    one = detect(ALPHA[1], TokenIds((100, 101), (102, 103)), RATE)
    shown = detection_pb2.Detection(
        probe_name="alpha",
        probe_revision=ALPHA[1].revision,
        bias=one.bias,
        logit=one.logit,
        probability=one.probability,
        flagged=one.flagged,
        token_ids=one.token_ids,
        prompt_tokens=2,
    )
    assert not mixed(shown)
    shown.probe_revision = ALPHA[2].revision
    assert "bias is" in mixed(shown)
    shown.probe_revision, shown.logit = ALPHA[1].revision, ALPHA[2].bias
    assert "logit is" in mixed(shown)


class Client:
    """One of those that keep a server busy, and what it was answered."""

    def __init__(self, target: str, seed: int) -> None:
        self._channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = detector_pb2_grpc.DetectorStub(self._channel)  # type: ignore[no-untyped-call]
        self._draw = random.Random(seed)
        self.wrong: list[str] = []
        self.answers: Counter[tuple[str, str]] = Counter()

    def work(self, over: threading.Event) -> None:
        calls: list[Callable[[str], None]] = [self.score, self.score, self.batch, self.generate]
        while not over.is_set():
            try:
                self._draw.choice(calls)(self._draw.choice(["", "", "alpha", "beta"]))
            except grpc.RpcError as error:
                self.wrong.append(f"{error.code()} {error.details()}")  # type: ignore[attr-defined]
        self._channel.close()

    def score(self, probe: str) -> None:
        request = detector_pb2.ScoreRequest(probe=probe, false_positive_rate=RATE)
        request.prompt.text, request.response.text = self._text(), self._text()
        self._look(probe, self._stub.Score(request, timeout=WAIT).detection)

    def batch(self, probe: str) -> None:
        request = detector_pb2.ScoreBatchRequest(probe=probe, false_positive_rate=RATE)
        for _ in range(4):
            item = request.items.add()
            item.prompt.text, item.response.text = self._text(), self._text()
        shown = [result.detection for result in self._stub.ScoreBatch(request, timeout=WAIT).results]
        for one in shown:
            self._look(probe, one)
        if len({one.probe_revision for one in shown}) != 1:
            self.wrong.append("the items of one batch are of several revisions")

    def generate(self, probe: str) -> None:
        request = detector_pb2.GenerateRequest(probe=probe, false_positive_rate=RATE, max_new_tokens=8)
        request.prompt.text = self._text()
        *tokens, last = self._stub.Generate(request, timeout=WAIT)
        shown = last.generation.detection
        self._look(probe, shown)
        for event in tokens:  # by the bias alone two revisions are 10 apart
            if abs(event.token.logit - shown.logit) > 5:
                self.wrong.append(f"a token was scored {event.token.logit}, the whole {shown.logit}")

    def _look(self, probe: str, shown: detection_pb2.Detection) -> None:
        said = mixed(shown)
        if said or (probe and shown.probe_name != probe):
            self.wrong.append(said or f"asked for {probe}, answered by {shown.probe_name}")
        self.answers[shown.probe_name, shown.probe_revision] += 1

    def _text(self) -> str:
        return "".join(self._draw.choices("abcdefgh", k=self._draw.randint(2, 12)))


@contextmanager
def load(target: str) -> Iterator[list[Client]]:
    """Clients that work until this is left."""
    clients, over = [Client(target, seed) for seed in range(CLIENTS)], threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        working = [pool.submit(client.work, over) for client in clients]
        try:
            yield clients
        finally:
            over.set()
            for one in working:
                one.result(WAIT)


def swap(number: int, registry: Registry, stub: Any) -> tuple[str, str]:
    """By turns asked for, and found by a reload; what scores afterwards."""
    probe = ALPHA[number % len(ALPHA)] if number % 5 else BETA[number // 5 % len(BETA)]
    if number % 3:
        answer = stub.ActivateProbe(
            probes_pb2.ActivateProbeRequest(name=probe.name, revision=probe.revision), timeout=WAIT
        )
        return answer.active.name, answer.active.revision
    registry.activate(probe.name, probe.revision)
    shown = stub.ReloadProbes(probes_pb2.ReloadProbesRequest(), timeout=WAIT).probes
    [active] = [one for one in shown if one.state == probes_pb2.PROBE_STATE_ACTIVE]
    return active.name, active.revision


def freed(server: Running, old: list[weakref.ref[Probe]]) -> bool:
    """Whether of all these probes only those are left that the server holds now."""
    gc.collect()
    shelf = server.server.readiness.loaded.shelf
    held = {id(entry.probe) for entry in shelf.entries} | {id(shadow) for shadow in shelf.shadows}
    return all(probe is None or id(probe) in held for probe in (one() for one in old))


@pytest.mark.timeout(1200)
def test_swaps_under_load_fail_nobody_and_mix_nothing_and_the_old_ones_are_freed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is not what this is about
    old: list[weakref.ref[Probe]] = []
    room = Limits(generate_streams=CLIENTS, streams_per_client=CLIENTS)  # whom there is no room for, no swap has failed
    with serving(registry.root, limits=room) as server, grpc.insecure_channel(server.target) as channel:
        stub = probes_pb2_grpc.ProbesStub(channel)  # type: ignore[no-untyped-call]
        with load(server.target) as clients:
            for number in range(SWAPS):
                active = swap(number, registry, stub)
                current = registry.current()
                assert active == (current.active, current.revisions[current.active])
                shelf = server.server.readiness.loaded.shelf
                old += [weakref.ref(entry.probe) for entry in shelf.entries if entry.probe is not None]
        assert [said for client in clients for said in client.wrong] == []
        answers = sum((client.answers for client in clients), Counter[tuple[str, str]]())
        assert len(answers) == len(PROBES), "control: every revision answered"
        assert answers.total() > SWAPS
        server.settle()
        wait_until(lambda: freed(server, old))
        alive = {id(one()) for one in old if one() is not None}
        assert 2 <= len(alive) <= 3, "control: those that serve are there"


def test_a_probe_is_freed_after_its_last_request_and_not_before(registry: Registry) -> None:
    gate = Gate()
    with (
        serving(registry.root, FakeEngine(before=gate)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        old = weakref.ref(server.server.readiness.loaded.shelf.active)
        request = detector_pb2.ScoreRequest(false_positive_rate=RATE)
        request.prompt.text, request.response.text = "hello", "world"
        call = detector_pb2_grpc.DetectorStub(channel).Score.future(request)  # type: ignore[no-untyped-call]
        assert gate.reached.wait(WAIT)
        stub = probes_pb2_grpc.ProbesStub(channel)  # type: ignore[no-untyped-call]
        stub.ActivateProbe(probes_pb2.ActivateProbeRequest(name="alpha", revision=ALPHA[1].revision), timeout=WAIT)
        gc.collect()
        assert old() is not None, "a request still needs it"
        gate.open()
        shown = call.result(WAIT).detection
        assert shown.probe_revision == ALPHA[0].revision, "it began with it"
        assert not mixed(shown)
        server.settle()
        wait_until(lambda: freed(server, [old]))
        assert old() is None
