"""Nothing is begun after its deadline: not one of many random ones, and not over the wire."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from engine_fakes import FakeEngine, a_probe
from scheduler_fakes import PROBE, Clock, Desk, a_desk, an_item, run
from service_fakes import WAIT, Gate, Running, wait_until
from test_server_real import a_model

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_detector.detector import Detector
from lapwing_detector.identity import identity_of
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.scoring import Scored, ScoreJob
from lapwing_detector.streams import Streams
from lapwing_server.forwards import Forwards
from lapwing_server.refusal import Refusal
from lapwing_server.writing import Writing

REQUESTS = 10_000 if os.environ.get("LAPWING_SOAK") else 300


@dataclass
class Ledger:
    """Knows the deadline of all that is in a forward, each of which takes a while."""

    generator: random.Random
    clock: Clock = field(default_factory=Clock)
    deadlines: dict[tuple[int, ...], float] = field(default_factory=dict)
    """By the ids of a name, with which the prompt of one request begins and no other."""

    begun: int = 0
    late: int = 0
    shared: int = 0
    """Forwards of more than one sequence."""

    def forward(self, sequences: Sequence[tuple[int, ...]]) -> None:
        """Notes one that begins, and what it takes."""
        length = len(next(iter(self.deadlines)))
        for ids in sequences:
            self.begun += 1
            self.late += self.deadlines[ids[:length]] <= self.clock.now
        self.shared += len(sequences) > 1
        self.clock.now += self.generator.expovariate(1 / 0.05)


class Strict(FakeEngine):
    """Tells a ledger of its forwards."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger, self.probe = ledger, PROBE

    def forward(self, what: str, sequences: Sequence[tuple[int, ...]]) -> None:
        self.ledger.forward(sequences)
        super().forward(what, sequences)


class StrictStreams(Streams):
    """The real ones, which tell a ledger of their forwards."""

    ledger: Ledger

    def _read(self, streams: list[Any]) -> Any:
        self.ledger.forward([stream.prompt.prompt_ids for stream in streams])
        return super()._read(streams)

    def _advance(self, group: Any) -> Any:
        self.ledger.forward([stream.prompt.prompt_ids for stream in group.streams])
        return super()._advance(group)


class StrictDetector(Detector):
    """The real one with a tiny random model, which tells a ledger of its forwards."""

    ledger: Ledger

    @classmethod
    def telling(cls, ledger: Ledger) -> StrictDetector:
        model, tokenizer = a_model()
        probe = replace(a_probe(identity=identity_of(model, tokenizer)), layers=(0, 1))
        detector = cls(LanguageModel(model, tokenizer), probe)
        detector.ledger = ledger
        return detector

    def score_ids(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        self.ledger.forward([job.ids.all for job in jobs])
        return super().score_ids(jobs)

    def streams(self) -> StrictStreams:
        streams = StrictStreams(self.language_model)
        streams.ledger = self.ledger
        return streams


Made = Callable[[Ledger], Any]


async def ask(desk: Desk, ledger: Ledger, name: str, ids: tuple[int, ...]) -> str:
    """One request with a random deadline; how it ended."""
    generator, probe = ledger.generator, desk.engine.probe
    deadline = ledger.deadlines[ids] = ledger.clock.now + generator.uniform(-0.02, 0.6)
    try:
        if generator.random() < 0.1:
            options = GenerationOptions(max_new_tokens=generator.randrange(1, 12))
            stream = desk.scheduler.generate(name, probe, options, deadline=deadline)
            _ = [event async for event in stream]
            return "ok"
        texts = [name + "x" * generator.choice([1, 10, 200]) for _ in range(generator.choice([1, 1, 1, 5]))]
        outcomes = await desk.scheduler.score([an_item(text, probe) for text in texts], deadline=deadline)
        assert all(isinstance(one, Detection) for one in outcomes)
        return "ok"
    except Refusal as refusal:
        return refusal.reason


def ends(seed: int, requests: int, make: Made = Strict) -> tuple[Ledger, dict[str, int]]:
    """The ledger after so many requests, and how many ended in which way."""
    ledger, counts = Ledger(random.Random(seed)), {}
    engine = make(ledger)
    names = [f"{number:06d}" for number in range(requests)]
    ids = [engine.tokens(name).prompt_ids for name in names]

    async def main() -> None:
        async with a_desk(engine, batch_tokens=600) as desk:
            ledger.clock = desk.clock
            asked: list[asyncio.Task[str]] = []
            for name, own in zip(names, ids, strict=True):
                asked.append(asyncio.create_task(ask(desk, ledger, name, own)))
                if ledger.generator.random() < 0.3:
                    await asyncio.sleep(0)
            for task in asked:
                reason = await task
                counts[reason] = counts.get(reason, 0) + 1
            await desk.settle()
            assert (desk.scheduler.waiting, desk.scheduler.in_flight) == (0, 0)

    run(main())
    return ledger, counts


MAKES = {"fake": (Strict, REQUESTS), "real": (StrictDetector.telling, 150)}


@pytest.mark.parametrize(("make", "requests"), MAKES.values(), ids=MAKES)
def test_no_forward_begins_after_a_deadline(make: Made, requests: int) -> None:
    ledger, counts = ends(7, requests, make)
    assert sum(counts.values()) == requests
    assert ledger.late == 0
    assert ledger.begun > requests / 20, "some are computed"
    assert ledger.shared > 3, "some together"
    assert counts["DEADLINE_EXCEEDED"] > requests / 50, "some are late"
    assert counts["ok"] > requests / 20
    assert set(counts) <= {"ok", "DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE", "QUEUE_FULL"}


@pytest.mark.parametrize(("make", "requests"), [(Strict, 300), (StrictDetector.telling, 60)], ids=MAKES)
def test_control_without_a_look_at_the_deadline_many_do(
    monkeypatch: pytest.MonkeyPatch, make: Made, requests: int
) -> None:
    monkeypatch.setattr(Forwards, "_wanted", lambda self, entry: True)
    monkeypatch.setattr(Writing, "_wanted", lambda self, stream: True)
    monkeypatch.setattr(Writing, "_goes_on", lambda self, handle: True)
    ledger, _ = ends(7, requests, make)
    assert ledger.late > 0


def test_over_the_wire_what_waits_past_its_deadline_is_never_computed() -> None:
    gate = Gate()
    message = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    late = detector_pb2.ScoreRequest(prompt={"text": "late"}, response={"text": "world"})
    item = detector_pb2.ScoreItem(prompt=late.prompt, response=late.response)
    with Running(FakeEngine(before=gate)) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        first = stub.Score.future(message)
        assert gate.reached.wait(WAIT)
        calls = [
            stub.Score.future(late, timeout=0.2),
            stub.ScoreBatch.future(detector_pb2.ScoreBatchRequest(items=[item] * 3), timeout=0.2),
            stub.Generate(detector_pb2.GenerateRequest(prompt=late.prompt), timeout=0.2),
        ]
        for call in calls:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: server.server.guard.in_flight == 1)
        assert server.server.scheduler.waiting == 0, "nor does it keep its place"
        gate.open()
        assert first.result(WAIT)
        server.settle()
        assert (server.engine.forwards, server.engine.tokenised) == (1, 1)
