"""A model that computes no longer takes its server out of service, until it computes again; bad requests don't."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from engine_fakes import FakeStreams, FakeToken, PoisonError, a_probe
from grpc_health.v1 import health_pb2, health_pb2_grpc
from metrics_pages import registry_page
from service_fakes import WAIT, FakeEngine, Gate, Running, refused, told, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Reason, State
from lapwing_detector.errors import CaptureError, InvalidInput, UnsupportedGeneration
from lapwing_detector.options import GenerationOptions
from lapwing_server import soundness
from lapwing_server.admission import TooLate
from lapwing_server.limits import Limits
from lapwing_server.mishap import Panic, is_ours
from lapwing_server.refusal import invalid
from lapwing_server.soundness import FAILED_IN_A_ROW, FAILS, STUCK, Checkup, Row

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

GOOD = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
BAD = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "!"})
WRITE = detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=3)


class Failing(FakeEngine):
    """Scores or writes nothing, if it is told so."""

    fails = ""

    def forward(self, what: str, sequences: Any) -> None:
        super().forward(what, sequences)
        if what in self.fails.split():
            raise PoisonError


class Asked:
    """A client and what the server says of itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = detector_pb2_grpc.DetectorStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def says(self) -> tuple[int, int, bool]:
        """Health, state, and whether there is a reason."""
        info = self.stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT)
        answer = self.health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT)
        return answer.status, info.state, "the model fails" in info.message


WELL = (SERVING, detector_pb2.SERVER_STATE_SERVING, False)
BROKEN = (NOT_SERVING, detector_pb2.SERVER_STATE_FAILED, True)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "AGAIN", 0.02)
    monkeypatch.setattr(soundness, "LOOK", 0.02)


@contextmanager
def asked(engine: FakeEngine, **limits: Any) -> Iterator[tuple[Running, Asked]]:
    with Running(engine, limits=Limits(**limits)) as server, grpc.insecure_channel(server.target) as channel:
        yield server, Asked(channel)


def settled(server: Running) -> None:
    """Waits until the server has nothing left to do, and no doubt either."""
    server.settle()
    task = server.server._checkup._task
    wait_until(lambda: task is None or task.done())


def fail(one: Asked, what: str) -> None:
    """One request that fails."""
    answer = refused(one.stub.Score, GOOD) if what == "score" else refused(one.stub.Generate, WRITE)
    assert (answer.reason, len(answer.error_id)) == ("INTERNAL", 12)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("what", ["score", "read", "step", "score read step"])
def test_a_model_that_fails_takes_the_server_out_of_service_until_it_works(what: str) -> None:
    engine = Failing()
    with asked(engine) as (server, one):
        engine.fails = what
        for _ in range(FAILED_IN_A_ROW - 1):
            fail(one, what)
        settled(server)
        assert one.says() == WELL, "so far it may be the requests"
        forwards = engine.forwards
        fail(one, what)
        wait_until(lambda: one.says() == BROKEN)
        wait_until(lambda: engine.forwards > forwards + 10)  # it is tried again and again, though nobody asks
        assert one.says() == BROKEN
        engine.fails = ""
        wait_until(lambda: one.says() == WELL)
        settled(server)
        forwards = engine.forwards
        assert one.stub.Score(GOOD, timeout=WAIT).detection.HasField("probability")
        assert engine.forwards == forwards + 1, "and it is not tried any more"


@pytest.mark.usefixtures("often")
def test_control_requests_that_fail_alone_take_nothing_out_of_service() -> None:
    """However many there are in a row, and among others: the model's own try works."""
    engine = FakeEngine(poison=ord("!"))
    with asked(engine) as (server, one):
        watch = one.health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT)
        assert next(watch).status == SERVING
        for _ in range(3 * FAILED_IN_A_ROW):
            assert refused(one.stub.Score, BAD).reason == "INTERNAL"
        settled(server)
        tried = engine.calls.count("read")
        assert 1 <= tried <= 3, "a doubt for each row, unless one is being looked into"
        assert one.says() == WELL
        for _ in range(3 * FAILED_IN_A_ROW):
            assert refused(one.stub.Score, BAD).reason == "INTERNAL"
            one.stub.Score(GOOD, timeout=WAIT)
        settled(server)
        assert engine.calls.count("read") == tried, "a row that is broken raises no doubt"
        server.close()
        assert [response.status for response in watch] == [NOT_SERVING], "nor was it out of service in between"


@pytest.mark.usefixtures("often")
def test_what_the_server_tries_is_not_counted_as_a_verdict() -> None:
    engine = FakeEngine(poison=ord("!"))
    with asked(engine) as (server, one):
        for _ in range(FAILED_IN_A_ROW):
            refused(one.stub.Score, BAD)
        settled(server)
        wait_until(lambda: engine.calls.count("step") == 1)
        settled(server)
        assert registry_page(server.server.metrics)("detections_total") == 0
        one.stub.Score(GOOD, timeout=WAIT)
        assert registry_page(server.server.metrics)("detections_total") == 1, "control"


class Melting(FakeEngine):
    """Of which no score is finite, if it is told so."""

    melted = False

    def score_ids(self, jobs: Any) -> Any:
        scored = super().score_ids(jobs)
        return [melted(one) for one in scored] if self.melted else scored

    def streams(self) -> FakeStreams:
        return MeltingStreams(self)


class MeltingStreams(FakeStreams):
    def step(self) -> Any:
        return [
            (stream, melted(event) if self._engine.melted and hasattr(event, "detection") else event)  # type: ignore[attr-defined]
            for stream, event in super().step()
        ]


def unscored(one: Asked, what: str) -> bool:
    if what == "score":
        return not one.stub.Score(GOOD, timeout=WAIT).detection.HasField("probability")
    *_, last = one.stub.Generate(WRITE, timeout=WAIT)
    return not last.generation.detection.HasField("probability")


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("what", ["score", "generate"])
def test_a_model_of_which_no_score_is_finite_does_not_serve(what: str) -> None:
    engine = Melting()
    with asked(engine) as (_, one):
        engine.melted = True
        for _ in range(FAILED_IN_A_ROW):
            assert unscored(one, what)
        wait_until(lambda: one.says() == BROKEN)
        engine.melted = False
        wait_until(lambda: one.says() == WELL)


def melted(scored: Any) -> Any:
    unscored = {"state": State.UNSCORED, "reason": Reason.NON_FINITE, "probability": None, "logit": None}
    nothing = np.empty(0, np.float32)
    return replace(scored, detection=replace(scored.detection, **unscored, token_contributions=nothing))


@pytest.mark.usefixtures("often")
def test_streams_that_break_as_a_whole_raise_a_doubt() -> None:
    class Breaking(FakeEngine):
        broken = False

        def streams(self) -> FakeStreams:
            if self.broken:
                raise MemoryError
            return super().streams()

    engine = Breaking()
    with asked(engine) as (server, one):
        engine.broken = True
        for _ in range(FAILED_IN_A_ROW):
            with pytest.raises(grpc.RpcError) as caught:
                list(one.stub.Generate(WRITE, timeout=WAIT))
            assert told(caught.value).reason == "INTERNAL"
        wait_until(lambda: one.says() == BROKEN)
        server.close()  # while it is being tried


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("what", ["Score", "Generate"])
def test_a_model_that_does_not_come_back_takes_the_server_out_of_service_until_it_does(what: str) -> None:
    engine, gate = FakeEngine(), Gate()
    with asked(engine, stuck_seconds=0.2) as (_, one):
        engine.before = gate
        answers = asking(one, what)
        assert gate.reached.wait(WAIT)
        wait_until(lambda: one.says() == (NOT_SERVING, detector_pb2.SERVER_STATE_FAILED, False))
        assert STUCK in one.stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT).message
        gate.open()
        wait_until(lambda: one.says() == WELL)
        assert answers.result(WAIT) >= 1, "and what was under way is answered"


@pytest.mark.usefixtures("often")
def test_control_a_model_that_takes_its_time_serves_on() -> None:
    engine, gate = FakeEngine(), Gate()
    with asked(engine, stuck_seconds=WAIT) as (server, one):
        watch = one.health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT)
        assert next(watch).status == SERVING
        engine.before = gate
        answers = asking(one, "Score")
        assert gate.reached.wait(WAIT)
        wait_until(lambda: server.server.scheduler.computing > 0.3)
        gate.open()
        assert answers.result(WAIT) == 1
        server.close()
        assert [response.status for response in watch] == [NOT_SERVING], "only at its end"


def asking(one: Asked, what: str) -> Future[int]:
    """How many answers a request has, once it has them all."""

    def answers() -> int:
        return len([one.stub.Score(GOOD, timeout=WAIT)] if what == "Score" else list(one.stub.Generate(WRITE)))

    pool = ThreadPoolExecutor(1)
    future = pool.submit(answers)
    pool.shutdown(wait=False)
    return future


OURS = [RuntimeError(), Panic("x"), CaptureError("x"), MemoryError()]
THEIRS = [TooLate(), invalid("prompt", "is empty"), InvalidInput("prompt", "is empty"), UnsupportedGeneration("x")]


@pytest.mark.parametrize("error", [*OURS, *THEIRS], ids=lambda error: type(error).__name__)
def test_what_is_refused_says_nothing_of_the_model(error: Exception) -> None:
    doubts: list[int] = []
    row = Row(lambda: doubts.append(1))
    for _ in range(FAILED_IN_A_ROW - 1):
        row.saw(RuntimeError())
    row.saw(error)
    assert is_ours(error) == (error in OURS)
    assert len(doubts) == (error in OURS)
    row.saw(RuntimeError())
    assert len(doubts) == 1, "a refusal neither ends a row nor belongs to it"


def test_a_token_neither_ends_a_row_nor_belongs_to_it() -> None:
    """A request may fail after it; its end says what came of it."""
    doubts: list[int] = []
    row, token = Row(lambda: doubts.append(1)), FakeToken(0, 65, "A", -1.0, None, None)
    for _ in range(FAILED_IN_A_ROW):
        row.saw(token)
        row.saw(RuntimeError())
    assert doubts == [1]
    [(_, generation)] = finished(FakeEngine())
    for _ in range(FAILED_IN_A_ROW):
        row.saw(generation)
        row.saw(RuntimeError())
    assert doubts == [1], "control: a score does"


def finished(engine: FakeEngine) -> list[Any]:
    """The last event of a generation."""
    streams = engine.streams()
    streams.add(engine.tokens("hello"), a_probe(), GenerationOptions(max_new_tokens=1))
    return [event for _ in range(3) for event in streams.step() if hasattr(event[1], "detection")]


def test_no_doubt_is_looked_into_after_the_end() -> None:
    tries: list[int] = []

    async def works() -> bool:
        tries.append(1)
        return True

    async def tell(why: str | None) -> None:
        raise AssertionError("it works")

    async def main(closed: bool) -> None:
        checkup = Checkup(works, tell)
        if closed:
            checkup.close()
        checkup.doubt()
        await asyncio.sleep(0.01)

    asyncio.run(main(closed=True))
    assert tries == []
    asyncio.run(main(closed=False))
    assert tries == [1], "control"


def test_a_stuck_model_is_told_of_once_and_ends_the_try_that_waits_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "AGAIN", 0.01)
    monkeypatch.setattr(soundness, "LOOK", 0.01)
    said: list[str | None] = []

    async def main() -> None:
        free = asyncio.Event()

        async def works() -> bool:
            await free.wait()
            return True

        async def tell(why: str | None) -> None:
            said.append(why)

        checkup = Checkup(works, tell, lambda: not free.is_set())
        checkup.doubt()
        await asyncio.sleep(0)
        first = checkup._task
        assert first is not None
        checkup.begin()
        await asyncio.sleep(0.2)
        assert said == [STUCK]
        assert first.cancelled()
        free.set()
        await asyncio.sleep(0.2)
        assert said == [STUCK, None]
        checkup.close()
        await asyncio.sleep(0)
        assert checkup._watch is not None
        assert checkup._watch.cancelled()

    asyncio.run(main())


def test_a_model_that_comes_back_and_fails_is_told_of_as_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "AGAIN", 0)
    monkeypatch.setattr(soundness, "LOOK", 0)
    said: list[str | None] = []
    tries = iter([False, False, True])

    async def works() -> bool:
        return next(tries)

    async def tell(why: str | None) -> None:
        said.append(why)

    async def main() -> None:
        checkup = Checkup(works, tell, lambda: not said)
        checkup.begin()
        await asyncio.sleep(0.1)
        checkup.close()

    asyncio.run(main())
    assert said == [STUCK, FAILS, None]


def test_a_doubt_that_comes_while_one_is_looked_into_starts_nothing() -> None:
    tries, said = [], []

    async def works() -> bool:
        tries.append(1)
        await asyncio.sleep(0)
        return True

    async def tell(why: str | None) -> None:
        said.append(why)

    async def main() -> None:
        checkup = Checkup(works, tell)
        checkup.doubt()
        checkup.doubt()
        await asyncio.sleep(0.01)
        assert len(tries) == 1
        checkup.doubt()
        await asyncio.sleep(0.01)
        assert len(tries) == 2, "control: the next one does"

    asyncio.run(main())
    assert said == []
