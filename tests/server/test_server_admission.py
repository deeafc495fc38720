"""What is refused at once, and why: too much is waiting, or it would be too late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import grpc
import pytest
from engine_fakes import FakeEngine
from google.rpc import error_details_pb2, status_pb2
from scheduler_fakes import PROBE, Clock, a_desk, an_item, run
from service_fakes import WAIT, Gate, Running, told

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.tokens import TokenIds
from lapwing_server.admission import LONGEST_PUSHBACK, Places, Ratio, TooLate, pushback
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.refusal import Refusal
from lapwing_server.security.principals import Principal
from lapwing_server.waiting import Item

ME, YOU = Principal("me", frozenset()), Principal("you", frozenset())


def test_a_ratio_follows_what_was_seen_lately() -> None:
    ratio = Ratio(0.3)
    assert ratio.of(10) == 3.0, "as long as nothing was seen"
    ratio.saw(20.0, 10)
    assert ratio.of(10) == 20.0
    for _ in range(100):
        ratio.saw(1.0, 10)
    assert ratio.of(10) == pytest.approx(1.0, abs=0.01)


def test_a_ratio_weighs_by_size() -> None:
    ratio = Ratio()
    ratio.saw(1.0, 1)
    ratio.saw(1.0, 1000)
    assert ratio.of(1) < 0.002, "what a small batch costs for each token tells little of a large one"


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate()), queue_items=4) as desk:
            first = desk.score("first")
            await desk.reached(desk.engine.before)
            calls = [desk.score("one"), desk.score("two", "three", "four")]
            await desk.queued(4)
            with pytest.raises(Refusal) as caught:
                await desk.score("five")
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert 0 < (caught.value.retry_after or 0) <= 1.25 * LONGEST_PUSHBACK
            calls[1].cancel()
            await desk.queued(1)
            late = desk.score("six", "seven", "eight")
            await desk.queued(4)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(first, calls[0], late)
            computed = {bytes(ids).decode() for ids in desk.engine.scored}
            assert computed == {"first", "one", "six", "seven", "eight"}
            assert desk.counted("lapwing_shed_total", reason="QUEUE_FULL") == 1

    run(main())


def test_what_never_fits_is_never_tried_again() -> None:
    async def main() -> None:
        async with a_desk(queue_items=2) as desk:
            with pytest.raises(Refusal) as caught:
                await desk.score("one", "two", "three")
            assert (caught.value.reason, caught.value.never_retry) == ("QUEUE_FULL", True)
            assert dict(caught.value.trailers())["grpc-retry-pushback-ms"] == "-1"
            assert len(await desk.score("one", "two")) == 2

    run(main())


@pytest.mark.parametrize(("deadline", "reachable"), [(1060.0, False), (1200.0, True), (None, True)])
def test_a_deadline_that_can_not_be_reached_is_refused_at_once(deadline: float | None, reachable: bool) -> None:
    """One token takes a second; ten are being scored and a hundred wait."""

    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            desk.scheduler.admission.pace.saw(1.0, 1)
            first = desk.score("x" * 10)
            await desk.reached(desk.engine.before)
            second = desk.score("x" * 100)
            await desk.queued(1)
            third = desk.score("third", deadline=deadline)
            await asyncio.sleep(0)
            assert desk.scheduler.waiting == (2 if reachable else 1)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(first, second, third, return_exceptions=True)
            error: Any = third.exception()
            assert (getattr(error, "reason", "") == "DEADLINE_UNREACHABLE") is not reachable
            assert (bytes("third", "ascii") in map(bytes, desk.engine.scored)) is reachable
            if error is not None:
                assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert error.retry_after > 0
                assert desk.counted("lapwing_shed_total", reason="DEADLINE_UNREACHABLE") == 1

    run(main())


@pytest.mark.parametrize(("together", "reachable"), [(5.0, True), (100.0, False)])
def test_an_item_is_done_when_its_forward_is(together: float, reachable: bool) -> None:
    """Under load, those who come later make the forward as long as the ones before."""

    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            desk.scheduler.admission.pace.saw(1.0, 1)
            desk.scheduler.admission.together.saw(together, 1)
            first = desk.score("x" * 10)
            await desk.reached(desk.engine.before)
            second = desk.score("small", deadline=1100.0)
            await asyncio.sleep(0)
            assert desk.scheduler.waiting == reachable
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(first, second, return_exceptions=True)

    run(main())


def test_a_large_call_that_takes_turns_does_not_make_a_small_one_late() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            desk.scheduler.admission.pace.saw(1.0, 1)
            first = desk.score("x" * 10)
            await desk.reached(desk.engine.before)
            large = desk.score(*["x" * 100] * 20)
            await desk.queued(20)
            small = desk.score("small", deadline=1200.0)
            await desk.queued(21)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(first, large, small)

    run(main())


class TimedEngine(FakeEngine):
    """A score takes a second and a step of the streams ten; stands at the gate before the seventh score."""

    SECONDS: ClassVar = {"score": 1.0, "step": 10.0}
    gate: Gate
    clock: Clock

    def forward(self, what: str, sequences: Sequence[tuple[int, ...]]) -> None:
        if what == "score" and self.calls.count("score") == 6:
            self.gate()
        super().forward(what, sequences)
        self.clock.now += self.SECONDS.get(what, 0.0)


class Blind(Ratio):
    """Has seen nothing."""

    def of(self, units: float) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("streams", "blind", "outcome"),
    [(2, False, "DEADLINE_UNREACHABLE"), (0, False, "in time"), (2, True, "DEADLINE_EXCEEDED")],
    ids=["streams", "control: none is open", "control: their steps are not counted"],
)
def test_what_open_streams_take_counts_for_a_deadline(streams: int, blind: bool, outcome: str) -> None:
    """Each of the five forwards until then waits for a step of the streams, so that 30 seconds are too few."""

    async def main() -> None:
        engine = TimedEngine()
        async with a_desk(engine, batch_forward_items=1) as desk:
            engine.gate, engine.clock, busy = Gate(), desk.clock, Gate()
            if blind:
                desk.scheduler.admission.rest = Blind()
            desk.worker.post(busy)
            opened = [desk.generate(max_new_tokens=100) for _ in range(streams)]
            calls = [desk.score(*["learn"] * 6), desk.score("first")]
            await desk.queued(7)
            busy.open()
            await desk.reached(engine.gate)
            assert engine.calls.count("step") == (6 if streams else 0)
            calls += [desk.score("other") for _ in range(3)]
            await desk.queued(3)
            asked = desk.score("asked", deadline=desk.clock.now + 30)
            await asyncio.sleep(0)
            engine.gate.open()
            await asyncio.gather(*calls)
            [error] = await asyncio.gather(asked, return_exceptions=True)
            assert getattr(error, "reason", "in time") == outcome
            assert (b"asked" in map(bytes, engine.scored)) is (outcome == "in time")
            for stream in opened:
                stream.close()

    run(main())


@pytest.mark.parametrize("pace", [None, 1000.0])
def test_an_idle_server_tries_whatever_it_thinks_of_itself(pace: float | None) -> None:
    """Else one slow forward would refuse everybody for ever, since nothing would correct the average."""

    async def main() -> None:
        async with a_desk() as desk:
            if pace is not None:
                desk.scheduler.admission.pace.saw(pace, 1)
            assert len(await desk.score("hello", deadline=1000.1)) == 1
            for _ in range(100):
                await desk.score("hello", deadline=1000.1)
            assert desk.scheduler.admission.pace.of(1) < 1.0

    run(main())


def test_what_is_late_already_is_not_taken_on() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            with pytest.raises(TooLate):
                await desk.score("hello", deadline=desk.clock.now)
            with pytest.raises(TooLate):
                desk.generate(deadline=desk.clock.now)
            assert desk.engine.forwards == 0

    run(main())


def test_not_all_who_are_refused_come_again_at_once() -> None:
    seconds = [pushback(1.0) for _ in range(100)]
    assert len(set(seconds)) > 90
    assert 0.75 <= min(seconds) <= max(seconds) <= 1.25
    assert pushback(-1.0) > 0
    assert pushback(1e9) <= 1.25 * LONGEST_PUSHBACK


# Streams.


def places(**limits: Any) -> Places:
    return Places(Limits(**limits), Metrics())


def test_streams_are_counted_for_all_and_for_each() -> None:
    counted = places(generate_streams=3, attention_streams=1, streams_per_client=2)
    with ExitStack() as stack:
        take = lambda kind, who: stack.enter_context(counted.take(kind, who))  # noqa: E731
        take("generate", ME)
        take("attention", ME)
        with pytest.raises(Refusal, match="2 streams of this client"):
            take("generate", ME)
        take("generate", YOU)
        with pytest.raises(Refusal, match="1 streams of this kind"):
            take("attention", YOU)
        take("generate", YOU)
        with pytest.raises(Refusal, match="3 streams of this kind") as caught:
            take("generate", Principal("third", frozenset()))
        assert (caught.value.reason, caught.value.retry_after) == ("TOO_MANY_STREAMS", 1.0)
        assert counted.taken == 4
    assert counted.taken == 0
    assert not counted._of_client, "who is gone is forgotten"


def test_a_token_may_have_a_limit_of_its_own() -> None:
    counted = places(generate_streams=8, streams_per_client=1)
    rich = Principal("rich", frozenset(), streams=2)
    with counted.take("generate", rich), counted.take("generate", rich), pytest.raises(Refusal):
        counted.take("generate", rich).__enter__()


def test_a_place_is_free_again_after_an_error() -> None:
    counted = places(generate_streams=1)
    with pytest.raises(KeyError), counted.take("generate", ME):
        raise KeyError
    with counted.take("generate", ME):
        pass


# Over the wire.


def score(text: str = "hello") -> detector_pb2.ScoreRequest:
    return detector_pb2.ScoreRequest(prompt={"text": text}, response={"text": "world"})


def test_a_client_is_told_to_come_again_and_when() -> None:
    gate = Gate()
    limits = Limits(queue_items=1, batch_items=1)
    with Running(FakeEngine(before=gate), limits=limits) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [stub.Score.future(score())]
        assert gate.reached.wait(WAIT)
        calls.append(stub.Score.future(score()))
        server.queued(1)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(score(), timeout=WAIT)
        error = told(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        trailers = dict(caught.value.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) > 0
        details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in details)
        assert retry.retry_delay.ToNanoseconds() > 0
        gate.open()
        assert all(call.result(WAIT).detection.logit for call in calls)
        assert stub.Score(score(), timeout=WAIT).detection.logit, "and it is taken on again"


def test_health_and_information_are_not_queued() -> None:
    gate = Gate()
    limits = Limits(queue_items=1, batch_items=1)
    with Running(FakeEngine(before=gate), limits=limits) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [stub.Score.future(score())]
        assert gate.reached.wait(WAIT)
        calls.append(stub.Score.future(score()))
        server.queued(1)
        assert stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT).version
        gate.open()
        assert all(call.result(WAIT) for call in calls)


class StrippingEngine(FakeEngine):
    """Drops a stop token at the end of an answer, as the real detector does."""

    def tokens(self, prompt: Any, response: Any = None) -> TokenIds:
        ids = super().tokens(prompt, response)
        return TokenIds(ids.prompt_ids, ids.response_ids[:-1] if ids.response_ids[-1:] == (2,) else ids.response_ids)


def test_token_ids_teach_nothing_of_texts() -> None:
    async def main() -> None:
        async with a_desk(StrippingEngine()) as desk:
            await desk.scheduler.score([an_item("hello")])
            before = desk.scheduler.admission.wording.of(1)
            for _ in range(50):
                await desk.scheduler.score([Item([65, 66, 67], [68, 69, 2], PROBE, 0.05)])
            assert desk.scheduler.admission.wording.of(1) == before > 0

    run(main())


def test_an_average_of_next_to_nothing_falls_back_to_what_it_began_with() -> None:
    ratio = Ratio(0.3)
    ratio.saw(5, 5)
    for _ in range(9_000):
        ratio.saw(-1, 0)
    assert ratio.of(10) == pytest.approx(3.0)
