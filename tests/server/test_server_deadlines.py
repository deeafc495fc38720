"""Nothing is begun after its deadline: not one of many random ones, and not over the wire."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import pytest
from engine_fakes import FakeEngine
from scheduler_fakes import PROBE, Clock, Desk, a_desk, an_item, run
from service_fakes import WAIT, Gate, Running, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_detector.options import GenerationOptions
from lapwing_server.forwards import Forwards
from lapwing_server.refusal import Refusal
from lapwing_server.writing import Writing

REQUESTS = 10_000 if os.environ.get("LAPWING_SOAK") else 300


@dataclass
class Strict(FakeEngine):
    """Every forward takes a while, and knows the deadline of all that is in it."""

    clock: Clock = field(default_factory=Clock)
    generator: random.Random = field(default_factory=random.Random)
    deadlines: dict[bytes, float] = field(default_factory=dict)
    """By the prompt, which is of one request only."""

    begun: int = 0
    late: int = 0

    def forward(self, what: str, sequences: Sequence[tuple[int, ...]]) -> None:
        for ids in sequences:
            self.begun += 1
            self.late += self.deadlines[bytes(ids)[:6]] <= self.clock.now
        super().forward(what, sequences)
        self.clock.now += self.generator.expovariate(1 / 0.05)


async def ask(desk: Desk, engine: Strict, number: int) -> str:
    """One request with a random deadline; how it ended."""
    name, generator = f"{number:06d}", engine.generator
    deadline = engine.deadlines[name.encode()] = engine.clock.now + generator.uniform(-0.02, 0.6)
    try:
        if generator.random() < 0.1:
            options = GenerationOptions(max_new_tokens=generator.randrange(1, 12))
            stream = desk.scheduler.generate(name, PROBE, options, deadline=deadline)
            _ = [event async for event in stream]
            return "ok"
        items = [an_item(name + "x" * generator.choice([1, 10, 200])) for _ in range(generator.choice([1, 1, 1, 5]))]
        outcomes = await desk.scheduler.score(items, deadline=deadline)
        assert all(isinstance(one, Detection) for one in outcomes)
        return "ok"
    except Refusal as refusal:
        return refusal.reason


def ends(seed: int, requests: int) -> tuple[Strict, dict[str, int]]:
    """The engine after so many requests, and how many ended in which way."""
    engine, counts = Strict(generator=random.Random(seed)), {}

    async def main() -> None:
        async with a_desk(engine, batch_tokens=600) as desk:
            engine.clock = desk.clock
            asked: list[asyncio.Task[str]] = []
            for number in range(requests):
                asked.append(asyncio.create_task(ask(desk, engine, number)))
                if engine.generator.random() < 0.3:
                    await asyncio.sleep(0)
            for task in asked:
                reason = await task
                counts[reason] = counts.get(reason, 0) + 1
            await desk.settle()
            assert (desk.scheduler.waiting, desk.scheduler.in_flight) == (0, 0)

    run(main())
    return engine, counts


def test_no_forward_begins_after_a_deadline() -> None:
    engine, counts = ends(7, REQUESTS)
    assert sum(counts.values()) == REQUESTS
    assert engine.late == 0
    assert engine.begun > REQUESTS / 20, "some are computed"
    assert counts["DEADLINE_EXCEEDED"] > REQUESTS / 50, "some are late"
    assert counts["ok"] > REQUESTS / 20
    assert set(counts) <= {"ok", "DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE", "QUEUE_FULL"}


def test_control_without_a_look_at_the_deadline_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forwards, "_wanted", lambda self, entry: True)
    monkeypatch.setattr(Writing, "_wanted", lambda self, stream: True)
    monkeypatch.setattr(Writing, "_goes_on", lambda self, handle: True)
    engine, _ = ends(7, 300)
    assert engine.late > 0


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
