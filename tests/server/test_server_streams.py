"""Streams and scores take turns; a slow reader slows nobody else; nobody's errors are another's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from engine_fakes import CONTEXT, FakeEngine, FakeStream, FakeStreams, PoisonError, a_probe
from scheduler_fakes import PROBE, a_desk, run, until
from service_fakes import Gate

from lapwing_detector.errors import InvalidInput, TooLong
from lapwing_detector.options import GenerationOptions
from lapwing_server.stream import ROOM, Stream


async def texts(stream: Stream) -> str:
    """The text of all tokens of a stream, read to its end."""
    return "".join([event.text async for event in stream if hasattr(event, "token_id")])


def alphabet(count: int) -> str:
    return "".join(chr(65 + i % 26) for i in range(count))


def test_every_event_arrives_in_order() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            events = [event async for event in desk.generate(max_new_tokens=100)]
            assert [getattr(event, "index", None) for event in events] == [*range(100), None]
            assert events[-1].finish_reason == "length"  # type: ignore[union-attr]

    run(main())


def test_streams_share_forwards() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            streams = [desk.generate(f"prompt {i}", max_new_tokens=30) for i in range(8)]
            await desk.reached(desk.engine.before)
            desk.engine.before.open()  # type: ignore[attr-defined]
            assert await asyncio.gather(*map(texts, streams)) == [alphabet(30)] * 8
            assert desk.engine.steps == 8 * 30
            assert desk.engine.calls.count("step") <= 31, "control: one after another they would be 240"
            assert desk.engine.calls.count("read") <= 2

    run(main())


def test_scores_and_steps_take_turns() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate()), batch_forward_items=1) as desk:
            stream = desk.generate(max_new_tokens=40)
            await desk.reached(desk.engine.before)
            calls = [desk.score("hello") for _ in range(20)]
            await desk.queued(20)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(texts(stream), *calls)
            assert desk.engine.calls == ["read", "step", *["score", "step"] * 20, *["step"] * 19]

    run(main())


def test_a_slow_reader_slows_nobody_and_holds_little() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            slow, quick = desk.generate("slow", max_new_tokens=300), desk.generate("quick", max_new_tokens=300)
            assert await texts(quick) == alphabet(300)
            await desk.settle()
            assert slow.paused
            assert len(slow.outbox) == ROOM
            assert desk.engine.steps == 300 + ROOM, "nothing more is computed for whom nobody reads"
            assert desk.scheduler.in_flight == 1
            assert await texts(slow) == alphabet(300), "and nothing was lost"
            assert desk.engine.steps == 600
            await desk.settle()
            assert desk.scheduler.in_flight == 0

    run(main())


def test_a_paused_stream_goes_on_when_half_of_its_events_are_read() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            stream = desk.generate(max_new_tokens=300)
            await until(lambda: stream.paused)
            await desk.settle()
            reader = aiter(stream)
            for _ in range(ROOM // 2 - 1):
                await anext(reader)
            await desk.settle()
            assert desk.engine.steps == ROOM, "not for every single event"
            await anext(reader)
            await until(lambda: desk.engine.steps == ROOM + ROOM // 2)
            await desk.settle()
            assert stream.paused
            stream.close()
            await desk.settle()
            assert (desk.engine.closed, desk.scheduler.in_flight) == (1, 0)

    run(main())


@pytest.mark.parametrize("seed", range(5))
def test_readers_that_come_and_go_lose_nothing(seed: int) -> None:
    async def main() -> None:
        async with a_desk() as desk:
            generator = random.Random(seed)

            async def read(count: int, pause: float, leaves: int | None) -> None:
                stream, seen = desk.generate(max_new_tokens=count), ""
                async for event in stream:
                    seen += getattr(event, "text", "")[:1] if hasattr(event, "token_id") else ""
                    if generator.random() < pause:
                        await asyncio.sleep(0.001)
                    if leaves is not None and len(seen) == leaves:
                        stream.close()
                        return
                assert seen == alphabet(count)

            readers = [
                read(generator.randrange(1, 300), generator.choice([0, 0.1, 0.5]), generator.choice([None, None, 20]))
                for _ in range(12)
            ]
            await asyncio.gather(*readers)
            await desk.settle()
            assert (desk.scheduler.in_flight, len(desk.engine.threads)) == (0, 1)
            assert desk.engine.closed == 12

    run(main())


@pytest.mark.parametrize("leaves", [True, False])
def test_a_closed_stream_gets_at_most_one_more_token(leaves: bool) -> None:
    class Held(FakeEngine):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()
            self.before = lambda: self.gate() if self.steps == 5 else None

    async def main() -> None:
        async with a_desk(Held()) as desk:
            stream = desk.generate(max_new_tokens=50)
            await desk.reached(desk.engine.gate)  # type: ignore[attr-defined]
            if leaves:  # else it is the control
                stream.close()
                stream.close()
            desk.engine.gate.open()  # type: ignore[attr-defined]
            await desk.settle()
            assert desk.engine.steps == (6 if leaves else 50)
            assert desk.engine.closed == 1

    run(main())


@pytest.mark.parametrize("why", ["closed", "late", "control"])
def test_a_stream_that_nobody_waits_for_never_begins(why: str) -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            first = desk.score("first")
            await desk.reached(desk.engine.before)
            stream = desk.generate(max_new_tokens=5, deadline=1010.0)
            if why == "closed":
                stream.close()
            elif why == "late":
                desk.clock.now = 1010.0
            desk.engine.before.open()  # type: ignore[attr-defined]
            await first
            await desk.settle()
            assert desk.engine.steps == (5 if why == "control" else 0)
            assert desk.engine.tokenised == (2 if why == "control" else 1)
            assert desk.scheduler.in_flight == 0

    run(main())


def test_a_deadline_ends_a_stream_between_two_tokens() -> None:
    async def main() -> None:
        async with a_desk() as desk:

            def tick() -> None:
                desk.clock.now += 1.0

            desk.engine.before = tick
            with pytest.raises(Exception, match="deadline passed"):
                await texts(desk.generate(max_new_tokens=50, deadline=1010.0))
            assert (desk.engine.forwards, desk.engine.steps) == (10, 9)
            assert await texts(desk.generate(max_new_tokens=5, deadline=desk.clock.now + 10)) == alphabet(5)

    run(main())


def test_wrong_input_ends_its_own_stream_alone() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            wrong = desk.scheduler.generate([1, 999], PROBE, GenerationOptions(max_new_tokens=3))
            long = desk.generate("x" * CONTEXT, max_new_tokens=3)
            right = desk.generate(max_new_tokens=3)
            with pytest.raises(InvalidInput):
                await texts(wrong)
            with pytest.raises(TooLong):
                await texts(long)
            assert await texts(right) == "ABC"
            await desk.settle()
            assert desk.scheduler.in_flight == 0

    run(main())


class Bomb(FakeEngine):
    """A forward fails that reads the fifth token of a certain text, as all do that it shares with others."""

    def forward(self, what: str, sequences: Sequence[tuple[int, ...]]) -> None:
        super().forward(what, sequences)
        if any(bytes(ids).startswith(b"bomb") and bytes(ids).endswith(b"ABCDE") for ids in sequences):
            raise PoisonError


class AllAtOnce(FakeStreams):
    """Ends all that were in a forward that failed."""

    def _apart(self, what: str, group: Sequence[FakeStream], error: Exception) -> Any:
        return [self._failed(stream, error) for stream in group]


def test_a_prompt_that_fails_ends_its_own_stream_alone() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(poison=1)) as desk:
            busy = Gate()
            desk.worker.post(busy)
            bad = desk.scheduler.generate([1, 2, 3], PROBE, GenerationOptions(max_new_tokens=3))
            good = desk.generate(max_new_tokens=3)
            busy.open()
            with pytest.raises(PoisonError):
                await texts(bad)
            assert await texts(good) == "ABC"
            assert desk.engine.calls[:3] == ["read"] * 3, "together, and each alone"

    run(main())


@pytest.mark.parametrize("kind", [FakeStreams, AllAtOnce])
def test_a_running_stream_that_fails_is_nobody_elses_fault(kind: type[FakeStreams]) -> None:
    """With streams that don't look whose fault it was, which is the control, the others end, too."""

    async def main() -> None:
        async with a_desk(Bomb()) as desk:
            undisturbed = [event async for event in desk.generate("others", max_new_tokens=9)]
            desk.engine.streams = lambda: kind(desk.engine)  # type: ignore[method-assign]
            desk.scheduler._writing._streams = None
            busy = Gate()
            desk.worker.post(busy)
            streams = [desk.generate(prompt, max_new_tokens=9) for prompt in ("others", "bomb", "others")]
            busy.open()
            found = [[event async for event in caught(stream)] for stream in streams]
            assert [getattr(event, "text", event) for event in found[1][:-1]] == list("ABCD")
            assert isinstance(found[1][-1], PoisonError)
            for other in (found[0], found[2]):
                if kind is FakeStreams:
                    assert told_by(other) == told_by(undisturbed)
                else:
                    assert isinstance(other[-1], PoisonError)
            await desk.settle()
            assert desk.scheduler.in_flight == 0

    run(main())


async def caught(stream: Stream) -> AsyncIterator[Any]:
    """The events of a stream, and the error that ended it."""
    try:
        async for event in stream:
            yield event
    except Exception as error:
        yield error


def told_by(events: Sequence[Any]) -> list[Any]:
    """Text and score of each token, and of the whole."""
    *tokens, last = events
    return [*((token.text, token.logit, token.probability) for token in tokens), last.text, last.detection.logit]


@pytest.mark.parametrize("where", ["step", "streams"])
def test_when_all_streams_break_each_hears_of_it_and_new_ones_work(where: str) -> None:
    class Breaking(FakeEngine):
        def broken(self, here: str) -> None:
            if here == where and self.steps < 10:
                self.steps = 10
                raise RuntimeError("broken")

        def streams(self) -> FakeStreams:
            self.broken("streams")
            streams = FakeStreams(self)
            good = streams.step

            def step() -> Any:
                if self.steps >= 4:
                    self.broken("step")
                return good()

            streams.step = step  # type: ignore[method-assign]
            return streams

    async def main() -> None:
        async with a_desk(Breaking()) as desk:
            busy = Gate()
            desk.worker.post(busy)
            streams = [desk.generate(max_new_tokens=20) for _ in range(2)]
            busy.open()
            found = await asyncio.gather(*map(texts, streams), return_exceptions=True)
            assert [type(one) for one in found] == [RuntimeError] * 2
            assert await texts(desk.generate(max_new_tokens=3)) == "ABC"
            await desk.settle()
            assert desk.scheduler.in_flight == 0

    run(main())


@pytest.mark.parametrize("waiting", [0, 3])
def test_shadows_score_a_finished_response_when_there_is_room(waiting: int) -> None:
    shadow = a_probe("shadow-probe", bias=1.0)

    class Held(FakeEngine):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()
            self.before = lambda: self.gate() if self.steps == 2 and self.calls[-1] == "step" else None

    async def main() -> None:
        async with a_desk(Held(), queue_items=4, batch_forward_items=1) as desk:
            stream = desk.scheduler.generate(
                "hello", PROBE, GenerationOptions(max_new_tokens=3), shadows=(shadow, shadow)
            )
            await desk.reached(desk.engine.gate)  # type: ignore[attr-defined]
            calls = [desk.score("other") for _ in range(waiting)]
            await desk.queued(waiting)
            desk.engine.gate.open()  # type: ignore[attr-defined]
            assert await texts(stream) == "ABC"
            await asyncio.gather(*calls)
            await desk.settle()
            shadowed = [bytes(ids) for ids in desk.engine.scored].count(b"helloABC")
            assert shadowed == (0 if waiting else 1), "only the metrics want it, so it is the first to be left out"
            seen = desk.counted("lapwing_detections_total", role="shadow", probe="other", verdict="flagged")
            assert seen == 2 * shadowed
            skipped = desk.counted("lapwing_shadow_skips_total", reason="no_room")
            assert skipped == (0 if shadowed else 2), "but not unseen"

    run(main())


def test_stages_of_a_stream_are_timed() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            stream = desk.generate(max_new_tokens=2)
            await texts(stream)
            assert set(stream.seconds) == {"queue", "tokenise", "first_token"}
            assert desk.counted("lapwing_generated_tokens_total") == 2

    run(main())
