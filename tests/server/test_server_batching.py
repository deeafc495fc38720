"""Which sequences share a forward, and which never reach one."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from math import ceil

import pytest
from engine_fakes import FakeEngine, PoisonError, a_probe
from scheduler_fakes import PROBE, Desk, a_desk, an_item, run
from service_fakes import Gate

from lapwing_detector.detection import Detection
from lapwing_detector.errors import InvalidInput
from lapwing_server.batching import FIRST_OVERHEAD, LEAST_OVERHEAD, MOST_OVERHEAD, Overhead, cut
from lapwing_server.waiting import Waiting, call_of

TOKENS, ITEMS = 1000, 16


def padded(lengths: list[int], places: list[int]) -> int:
    return len(places) * max(lengths[place] for place in places)


def cost(lengths: list[int], shared: list[list[int]], overhead: float) -> float:
    return sum(overhead + padded(lengths, places) for places in shared)


@pytest.mark.parametrize("seed", range(50))
def test_every_sequence_is_in_one_forward_that_is_not_too_large(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [round(2 ** generator.uniform(0, 11)) for _ in range(generator.randrange(1, 80))]
    shared = cut(lengths, TOKENS, ITEMS)
    assert sorted(place for places in shared for place in places) == list(range(len(lengths)))
    for places in shared:
        assert len(places) == 1 or (padded(lengths, places) <= TOKENS and len(places) <= ITEMS)
    assert [places[0] for places in shared] == sorted(places[0] for places in shared), "the earliest goes first"


def partitions(places: list[int]) -> Iterator[list[list[int]]]:
    """All ways to share."""
    if not places:
        yield []
        return
    first, *rest = places
    for others in partitions(rest):
        yield [[first], *others]
        for i, group in enumerate(others):
            yield [*others[:i], [first, *group], *others[i + 1 :]]


@pytest.mark.parametrize("seed", range(30))
def test_no_other_way_to_share_takes_less_time(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [round(2 ** generator.uniform(2, 9)) for _ in range(7)]
    tokens, items, overhead = (
        generator.choice([300, 1000, 9999]),
        generator.choice([2, 3, 7]),
        2 ** generator.uniform(2, 9),
    )
    allowed = [
        cost(lengths, shared, overhead)
        for shared in partitions(list(range(7)))
        if all(len(one) == 1 or (padded(lengths, one) <= tokens and len(one) <= items) for one in shared)
    ]
    assert cost(lengths, cut(lengths, tokens, items, overhead), overhead) == pytest.approx(min(allowed))


def test_control_neighbours_by_arrival_are_padded_too_much() -> None:
    lengths = [10, 900] * 8
    by_arrival = [list(range(start, start + 2)) for start in range(0, 16, 2)]
    assert cost(lengths, by_arrival, 64) > 1.5 * cost(lengths, cut(lengths, TOKENS, ITEMS, 64), 64)


def test_the_more_a_forward_costs_by_itself_the_fewer_there_are() -> None:
    lengths = [20, 25, 40, 60, 100, 200, 210]
    counts = [len(cut(lengths, 10_000, 64, overhead)) for overhead in (0, 10, 60, 300, 3000)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (7, 1)


def test_what_a_forward_costs_by_itself_is_measured() -> None:
    overhead, generator = Overhead(), random.Random(3)
    for _ in range(200):
        tokens = generator.randrange(10, 2000)
        overhead.saw(tokens, (0.010 + 0.0001 * tokens) * generator.uniform(0.9, 1.1))
    assert 50 < overhead.tokens < 200, "0.010 s are worth 100 tokens"


@pytest.mark.parametrize("seconds", [lambda tokens: 0.0, lambda tokens: 1.0 / tokens, lambda tokens: 0.01])
def test_what_makes_no_sense_is_not_believed(seconds: Callable[[int], float]) -> None:
    overhead = Overhead()
    for _ in range(10):
        overhead.saw(100, seconds(100))
    assert overhead.tokens == FIRST_OVERHEAD, "forwards of one size tell nothing"
    for tokens in (10, 1000, 50, 500):
        overhead.saw(tokens, seconds(tokens))
    assert LEAST_OVERHEAD <= overhead.tokens <= MOST_OVERHEAD


@pytest.mark.parametrize(("count", "length"), [(1, 10), (16, 10), (17, 10), (64, 50), (7, 400), (3, 5000)])
def test_equal_lengths_need_no_more_forwards_than_the_bounds_ask_for(count: int, length: int) -> None:
    fits = max(1, min(ITEMS, TOKENS // length))
    assert len(cut([length] * count, TOKENS, ITEMS)) == ceil(count / fits)


def test_nothing_needs_no_forward() -> None:
    assert cut([], TOKENS, ITEMS) == []


def test_calls_take_turns() -> None:
    waiting = Waiting()
    for name, size in (("a", 3), ("b", 1), ("c", 2)):
        waiting.add(call_of([an_item(f"{name}{i}") for i in range(size)], [1] * size, 0.0, None, None))
    order = []
    while (entry := waiting.take()) is not None:
        order.append(f"{entry.item.prompt}{entry.item.response}")
    assert order == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert (waiting.items, waiting.tokens) == (0, 0)


def test_what_is_ahead_of_a_call_is_what_is_taken_before_it() -> None:
    waiting = Waiting()
    waiting.add(call_of([an_item("ab")] * 10, [5] * 10, 0.0, None, None))
    waiting.add(call_of([an_item("ab")], [7], 0.0, None, None))
    assert waiting.tokens == 57
    assert waiting.ahead_of(1) == 12
    assert waiting.ahead_of(2) == 17
    assert waiting.ahead_of(64) == 57


async def held(desk: Desk) -> asyncio.Task[object]:
    """A call that stands at the gate, so that the next ones wait."""
    first = desk.score("first")
    await desk.reached(desk.engine.before)
    return first  # type: ignore[return-value]


@pytest.mark.parametrize(("items", "forwards"), [(64, 2), (31, 2), (16, 3), (1, 32)])
def test_calls_share_a_forward(items: int, forwards: int) -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate()), batch_forward_items=items) as desk:
            await held(desk)
            calls = [desk.score(f"text {i:02d}") for i in range(31)]
            await desk.queued(31)
            desk.engine.before.open()  # type: ignore[attr-defined]
            for i, call in enumerate(calls):
                [found] = await call
                assert isinstance(found, Detection)
                assert found.token_ids == tuple(f"text {i:02d}".encode()), "each gets its own"
                assert found.logit == FakeEngine().score(f"text {i:0>2d}"[:-1], str(i)[-1]).logit
            assert desk.engine.forwards == forwards

    run(main())


def test_unlike_lengths_do_not_share_a_forward() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            await held(desk)
            calls = [desk.score("x" * size) for size in (300, 10, 320, 12, 11)]
            await desk.queued(5)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(*calls)
            assert desk.engine.batches == [[5], [300, 320], [10, 12, 11]]

    run(main())


def test_padding_counts_towards_the_budget() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate()), batch_tokens=400) as desk:
            await held(desk)
            call = desk.score(*["x" * size for size in (100, 100, 100, 90, 90)])
            await desk.queued(5)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await call
            assert desk.engine.batches == [[5], [100, 100, 100, 90], [90]]

    run(main())


def test_a_forward_is_no_longer_than_it_is_worth() -> None:
    """Else all would wait long for what saves next to nothing: scores, and the streams that take turns with them."""

    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            await held(desk)
            call = desk.score(*["x" * 100] * 40)
            await desk.queued(40)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await call
            sizes = [sum(batch) for batch in desk.engine.batches[1:]]
            assert sizes == [1300, 1300, 1300, 100], "20 times what one costs by itself, and what is begun is finished"

    run(main())


def test_the_bound_holds_where_more_would_be_worth_it() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate()), batch_tokens=950) as desk:
            desk.scheduler.admission.wording.saw(1.0, 1)  # one token a character, as this engine has it
            await held(desk)
            call = desk.score(*["x" * 100] * 30)
            await desk.queued(30)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await call
            assert [len(batch) for batch in desk.engine.batches] == [1, 9, 9, 9, 3], "and no small forwards in between"

    run(main())


def test_one_bad_item_fails_alone() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate(), poison=ord("!"))) as desk:
            await held(desk)
            calls = [desk.score(text) for text in ("good", "bad!", "fine")]
            batch = desk.score("well", "evil!", "kind")
            await desk.queued(6)
            desk.engine.before.open()  # type: ignore[attr-defined]
            outcomes = [*[found for call in calls for found in await call], *await batch]
            assert [isinstance(one, PoisonError) for one in outcomes] == [False, True, False, False, True, False]
            assert all(isinstance(one, Detection | PoisonError) for one in outcomes)
            assert [len(sizes) for sizes in desk.engine.batches] == [1] + [1] * 4
            assert desk.engine.forwards == 1 + 1 + 6, "all together, and then each alone, once"

    run(main())


def test_control_without_a_bad_item_there_is_no_second_forward() -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            await held(desk)
            batch = desk.score("good", "bad!", "fine")
            await desk.queued(3)
            desk.engine.before.open()  # type: ignore[attr-defined]
            assert all(isinstance(one, Detection) for one in await batch)
            assert desk.engine.forwards == 2

    run(main())


def test_what_can_not_be_tokenised_fails_before_any_forward() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            [good, bad] = await desk.scheduler.score([an_item("good"), an_item("x" * 401)])
            assert isinstance(good, Detection)
            assert isinstance(bad, InvalidInput)
            assert desk.engine.batches == [[4]]

    run(main())


def test_an_error_without_a_name_belongs_to_its_item() -> None:
    class Odd(FakeEngine):
        def tokens(self, prompt: object, response: object = None) -> object:  # type: ignore[override]
            if prompt == "od":
                raise MemoryError
            return super().tokens(prompt, response)

    async def main() -> None:
        async with a_desk(Odd()) as desk:
            [good, odd] = await desk.scheduler.score([an_item("good"), an_item("odd")])
            assert isinstance(good, Detection)
            assert isinstance(odd, MemoryError)

    run(main())


@pytest.mark.parametrize("leaves", [True, False])
def test_what_is_cancelled_is_never_computed(leaves: bool) -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            first = await held(desk)
            calls = [desk.score("one"), desk.score("two", "three"), desk.score("four")]
            await desk.queued(4)
            if leaves:  # else it is the control
                calls[1].cancel()
                await desk.queued(2)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(first, *calls, return_exceptions=True)
            await desk.settle()
            computed = {bytes(ids).decode() for ids in desk.engine.scored}
            assert computed == {"first", "one", "four"} | (set() if leaves else {"two", "three"})
            assert desk.counted("lapwing_dropped_total", reason="cancelled") == (2 if leaves else 0)
            assert (desk.scheduler.waiting, desk.scheduler.in_flight) == (0, 0)

    run(main())


@pytest.mark.parametrize("passes", [True, False])
def test_what_is_past_its_deadline_is_never_computed(passes: bool) -> None:
    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            first = await held(desk)
            calls = [
                desk.score("one"),
                desk.score("two", "three", deadline=1010.0),
                desk.score("four", deadline=1020.0),
            ]
            await desk.queued(4)
            desk.clock.now = 1010.0 if passes else 1009.9
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(first, *calls, return_exceptions=True)
            computed = {bytes(ids).decode() for ids in desk.engine.scored}
            assert computed == {"first", "one", "four"} | (set() if passes else {"two", "three"})
            error = calls[1].exception()
            assert (getattr(error, "reason", "") == "DEADLINE_EXCEEDED") == passes
            assert desk.counted("lapwing_dropped_total", reason="expired") == (2 if passes else 0)

    run(main())


class Held(FakeEngine):
    """Stands at the gate before its second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.before = lambda: self.gate() if self.forwards == 1 else None


@pytest.mark.parametrize("why", ["cancelled", "expired", "control"])
def test_what_was_taken_but_not_begun_can_still_be_dropped(why: str) -> None:
    """Two forwards are cut at once; while the first of them runs, the reason for the second one goes."""

    async def main() -> None:
        async with a_desk(Held()) as desk:
            engine: Held = desk.engine  # type: ignore[assignment]
            await desk.score("first")
            busy = Gate()
            desk.worker.post(busy)
            short, long = desk.score("x" * 10), desk.score("x" * 300, deadline=2000.0)
            await desk.queued(2)
            busy.open()
            await desk.reached(engine.gate)
            assert (desk.scheduler.waiting, desk.scheduler.in_flight) == (0, 2)
            if why == "cancelled":
                long.cancel()
                await asyncio.sleep(0)
            elif why == "expired":
                desk.clock.now = 2000.0
            engine.gate.open()
            await asyncio.gather(short, long, return_exceptions=True)
            await desk.settle()
            assert engine.batches == [[5], [10], *([[300]] if why == "control" else [])]
            assert desk.scheduler.in_flight == 0

    run(main())


def test_shadows_share_the_forward_and_show_in_metrics_only() -> None:
    shadow = a_probe("shadow-probe", bias=1.0)

    async def main() -> None:
        async with a_desk() as desk:
            [found] = await desk.scheduler.score([an_item("hello", shadows=(shadow,))])
            assert isinstance(found, Detection)
            assert found.probe_name == PROBE.name
            assert desk.engine.forwards == 1
            for role, count in (("active", 1), ("shadow", 1), ("named", 0)):
                labels = {"role": role, "probe": "other", "verdict": "unflagged"}
                seen = desk.counted("lapwing_detections_total", **labels)
                seen += desk.counted("lapwing_detections_total", **labels | {"verdict": "flagged"})
                assert seen == count

    run(main())


def test_every_stage_is_timed() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            [found] = await desk.score("hello")
            assert isinstance(found, Detection)
            assert set(found.seconds) == {"queue", "tokenise", "forward", "probe"}

    run(main())


def test_nothing_of_a_call_is_kept() -> None:
    class Text(str):
        """Can be watched."""

        __slots__ = ("__weakref__",)

    async def main() -> None:
        async with a_desk() as desk:
            item = an_item("hello")
            text = Text("hello")
            alive = weakref.ref(text)
            await desk.scheduler.score([type(item)(text, "x", PROBE, 0.05)])
            del text
            await desk.settle()
            gc.collect()
            assert alive() is None

    run(main())
