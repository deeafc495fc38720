"""Many responses at once: order, laziness, how much is asked for at the same time, errors, leaving."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from test_client_retries import Refusing
from wire_server import WAIT, WireServer

from lapwing_client import (
    AsyncClient,
    Cancelled,
    Client,
    Detection,
    InvalidRequest,
    LapwingError,
    NotFound,
    Overloaded,
    PermissionDenied,
    ServerError,
    Unavailable,
    many,
)
from lapwing_client.deadline import Deadline
from lapwing_client.many import FOR_ALL, LOOK_AHEAD, Window
from lapwing_client.plans import Ask, Pause
from lapwing_client.retries import ATTEMPTS

BUSY, BROKEN = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL


def pairs(count: int) -> Iterator[tuple[str, str]]:
    return (("prompt", "x" * i) for i in range(1, count + 1))


class Held:
    """Holds every call until it is opened; knows how many are there at once."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.lock = threading.Lock()
        self.inside = self.most = self.ended = 0

    def __call__(self, method: str, context: grpc.ServicerContext) -> None:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        while not self.opened.wait(0.005) and context.is_active():
            pass
        with self.lock:
            self.inside -= 1
            self.ended += not context.is_active()


def all_but_the_first(held: Held) -> WireServer:
    """Answers the first item once three others are held."""

    def before(method: str, context: grpc.ServicerContext) -> None:
        if server.request.response.text == "x":
            until(lambda: held.inside == 3)
        elif not held.ended:
            held(method, context)

    server = WireServer(before)
    return server


def until(condition: Any) -> None:
    ticks = threading.Event()
    for _ in range(int(WAIT / 0.005)):
        if condition():
            return
        ticks.wait(0.005)
    raise AssertionError("it did not come true")


async def gathered(target: str, items: Any, **options: Any) -> list[Any]:
    async with AsyncClient(target) as client:
        return [pair async for pair in client.score_many(items, **options)]


def collected(kind: str, target: str, items: Any, **options: Any) -> list[Any]:
    """What either client makes of the items."""
    if kind == "awaits":
        return asyncio.run(gathered(target, items, **options))
    with Client(target) as client:
        return list(client.score_many(items, **options))


both = pytest.mark.parametrize("kind", ["blocks", "awaits"])


# Order and numbers.


@both
@pytest.mark.parametrize("concurrency", [1, 7])
def test_answers_come_in_the_order_of_the_items(kind: str, concurrency: int) -> None:
    count = itertools.count()

    def unevenly(method: str, context: object) -> None:
        threading.Event().wait(0.01 if next(count) % 5 == 0 else 0)

    with WireServer(unevenly) as server:
        found = collected(kind, server.target, list(pairs(60)), concurrency=concurrency)
    assert [item for item, _ in found] == list(pairs(60))
    assert [outcome.logit for _, outcome in found] == list(range(1, 61))


@both
def test_nothing_in_nothing_out(kind: str) -> None:
    with WireServer() as server:
        assert collected(kind, server.target, []) == []
    assert server.calls == []


@both
def test_as_many_are_asked_for_at_once_as_is_said(kind: str) -> None:
    held = Held()
    with WireServer(held) as server:
        reader = threading.Thread(target=collected, args=(kind, server.target, pairs(40)), kwargs={"concurrency": 6})
        reader.start()
        until(lambda: held.inside == 6)
        held.opened.set()
        reader.join(WAIT)
        assert held.most == 6


def test_items_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def items() -> Iterator[tuple[str, str]]:
        for i, pair in enumerate(pairs(10_000)):
            read.append(i)
            yield pair

    with WireServer() as server, Client(server.target) as client:
        scored = client.score_many(items(), concurrency=3)
        assert read == [], "nothing before the first answer is asked for"
        for taken in range(1, 30):
            next(scored)
            assert len(read) <= taken - 1 + 3 * LOOK_AHEAD + 1
        scored.close()
    assert len(read) < 100


def test_an_answer_that_is_there_comes_before_an_item_that_is_not() -> None:
    """A source that is slow, such as people who type, gets each answer before its next item."""
    more = threading.Event()

    def items() -> Iterator[tuple[str, str]]:
        yield "prompt", "x"
        until(lambda: server.calls == ["Score"])
        threading.Event().wait(0.1)
        yield "prompt", "xx"
        assert more.wait(WAIT), "it was read before its turn"
        yield "prompt", "xxx"

    with WireServer() as server, Client(server.target) as client:
        scored = client.score_many(items())
        assert next(scored)[0] == ("prompt", "x")
        more.set()
        assert [item[1] for item, _ in scored] == ["xx", "xxx"]


@both
def test_one_slow_item_does_not_stop_the_others(kind: str) -> None:
    opened = threading.Event()
    found: list[Any] = []

    def hold_the_first(method: str, context: object) -> None:
        if server.request.response.text == "x":
            assert opened.wait(WAIT)

    with WireServer(hold_the_first) as server:
        reader = threading.Thread(target=lambda: found.extend(collected(kind, server.target, pairs(50), concurrency=4)))
        reader.start()
        until(lambda: len(server.calls) == 4 * LOOK_AHEAD)
        opened.set()
        reader.join(WAIT)
    assert [outcome.logit for _, outcome in found] == list(range(1, 51))


def test_asynchronous_items() -> None:
    async def items() -> AsyncIterator[tuple[str, str]]:
        for pair in pairs(20):
            await asyncio.sleep(0)
            yield pair

    with WireServer() as server:
        found = asyncio.run(gathered(server.target, items()))
    assert [outcome.logit for _, outcome in found] == list(range(1, 21))


# Errors.


@both
def test_an_item_that_fails_has_its_error_in_its_place(kind: str) -> None:
    items: list[Any] = [("a", "b"), ("a", 3), "ab", (), ("a", "b", "c"), None, ("a", "b")]
    with WireServer() as server:
        outcomes = [outcome for _, outcome in collected(kind, server.target, items)]
    assert [type(outcome) for outcome in outcomes] == [Detection, *[InvalidRequest] * 5, Detection]
    assert [outcome.field for outcome in outcomes[1:-1]] == ["response", "item", "item", "item", "item"]
    assert "give a pair of prompt and response" in outcomes[2].message
    assert server.calls.count("Score") == 2


@both
def test_an_error_of_the_server_stands_in_the_place_of_its_item(kind: str) -> None:
    with WireServer(Refusing("Score", 1, BROKEN)) as server:
        found = collected(kind, server.target, list(pairs(3)), concurrency=1)
    assert [type(outcome) for _, outcome in found] == [ServerError, Detection, Detection]


@both
@pytest.mark.parametrize(
    ("code", "kind_of_error"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
    ],
)
def test_an_error_that_all_would_get_is_raised(
    kind: str, code: grpc.StatusCode, kind_of_error: type[LapwingError]
) -> None:
    with WireServer(Refusing("Score", 100, code)) as server, pytest.raises(kind_of_error):
        collected(kind, server.target, pairs(10_000), concurrency=2)
    assert len(server.calls) <= ATTEMPTS * 2 * LOOK_AHEAD


def test_a_closed_client_is_an_error_for_all() -> None:
    with WireServer() as server:
        client = Client(server.target)
        client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            list(client.score_many(pairs(3)))


@both
def test_what_the_items_raise_comes_after_the_answers_to_those_before(kind: str) -> None:
    def items() -> Iterator[tuple[str, str]]:
        yield from pairs(5)
        raise ZeroDivisionError("in the items")

    answered: list[Any] = []

    async def read(target: str) -> None:
        async with AsyncClient(target) as client:
            async for pair in client.score_many(items()):
                answered.append(pair)

    def read_blocking(target: str) -> None:
        with Client(target) as client:
            for pair in client.score_many(items()):
                answered.append(pair)

    with WireServer() as server, pytest.raises(ZeroDivisionError, match="in the items"):
        read_blocking(server.target) if kind == "blocks" else asyncio.run(read(server.target))
    assert len(answered) == 5


@pytest.mark.parametrize("concurrency", [0, -1, 1001, 2.5, "4", True, None])
def test_the_concurrency_is_checked_before_anything_begins(concurrency: Any) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequest) as caught:
        client.score_many([], concurrency=concurrency)
    assert caught.value.field == "concurrency"
    with pytest.raises(InvalidRequest):
        AsyncClient("localhost:1").score_many([], concurrency=concurrency)


@pytest.mark.parametrize("items", [None, 5, object()])
def test_what_holds_no_items_is_refused_before_anything_begins(items: Any) -> None:
    for client in (Client("localhost:1"), AsyncClient("localhost:1")):
        with pytest.raises(InvalidRequest, match="give an iterable of pairs of prompt and response") as caught:
            client.score_many(items)
        assert caught.value.field == "items"


def test_only_the_client_that_awaits_reads_asynchronous_items() -> None:
    async def items() -> AsyncIterator[tuple[str, str]]:
        yield "a", "b"

    with Client("localhost:1") as client, pytest.raises(InvalidRequest, match="AsyncClient can read it"):
        client.score_many(items())  # type: ignore[type-var]
    assert AsyncClient("localhost:1").score_many(items()), "control"


# A server that has too much to do.


@both
def test_an_overloaded_server_is_asked_again(kind: str) -> None:
    """gRPC gives up after five attempts; here it goes on for as long as the deadline allows."""
    refusing = Refusing("Score", 11, BUSY, milliseconds=1, retry_after=0.001)
    with WireServer(refusing) as server:
        [(_, outcome)] = collected(kind, server.target, [("a", "b")])
    assert isinstance(outcome, Detection)
    assert server.calls.count("Score") == 12


@both
@pytest.mark.parametrize(
    ("push_back", "calls"),
    [
        ({"milliseconds": -1}, 1),  # never again
        ({"milliseconds": -1, "retry_after": 60.0}, 1),  # later than the deadline
    ],
)
def test_but_not_when_that_is_of_no_use(kind: str, push_back: Any, calls: int) -> None:
    with WireServer(Refusing("Score", 99, BUSY, **push_back)) as server:
        [(_, outcome)] = collected(kind, server.target, [("a", "b")], timeout=5.0)
    assert isinstance(outcome, LapwingError)
    assert outcome.code == "RESOURCE_EXHAUSTED"
    assert len(server.calls) == calls


def test_the_plan_of_one_item() -> None:
    """Asked, told to come again, asked, answered: without a server or a clock."""
    plan = many.outcome(("a", "b"), {}, Deadline(60))
    assert isinstance(next(plan), Ask)
    assert plan.throw(Overloaded("busy", retry_after=7.0)) == Pause(7.0)
    assert isinstance(plan.send(None), Ask)
    assert plan.throw(Overloaded("busy", retry_after=0.0)) == Pause(0.05), "never at once"
    plan.send(None)
    with pytest.raises(StopIteration) as ended:
        plan.throw(Overloaded("busy", retry_after=61.0))
    assert isinstance(ended.value.value, Overloaded)


def test_every_error_is_either_for_one_or_for_all() -> None:
    for kind in FOR_ALL:
        plan = many.outcome(("a", "b"), {}, Deadline(60))
        next(plan)
        with pytest.raises(kind):
            plan.throw(kind("no"))


# Leaving.


def leave_by_closing(scored: Any) -> None:
    next(scored)
    scored.close()
    assert list(scored) == []


def leave_by_dropping(scored: Any) -> None:
    for _ in scored:
        break


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_dropping])
def test_leaving_ends_the_calls_that_run(leave: Any) -> None:
    held = Held()
    before = threading.active_count()
    with all_but_the_first(held) as server, Client(server.target) as client:
        leave(client.score_many(pairs(10_000), concurrency=4))
        gc.collect()
        until(lambda: held.inside == 0)
        assert held.ended == 3, "they were cancelled, not answered"
        assert len(server.calls) == 4
        assert client.score("a", "bc").logit == 2, "the client goes on"
    until(lambda: threading.active_count() <= before + 1)


def test_leaving_an_asynchronous_one_ends_its_calls() -> None:
    held = Held()

    async def read() -> int:
        async with AsyncClient(server.target) as client:
            scored = client.score_many(pairs(10_000), concurrency=4)
            await anext(scored)
            await scored.aclose()
            while held.inside:
                await asyncio.sleep(0.005)
            return len(asyncio.all_tasks())

    with all_but_the_first(held) as server:
        assert asyncio.run(read()) <= 2
    assert held.ended == 3


# The window.


class Job:
    def __init__(self, done: bool = False) -> None:
        self.is_done = done

    def done(self) -> bool:
        return self.is_done


def test_a_window_reads_until_enough_is_under_way() -> None:
    window: Window[int, Job] = Window(2)
    jobs = [Job() for _ in range(20)]
    for i in range(2):
        assert window.wants_more
        window.add(i, jobs[i])
    assert not window.wants_more
    assert window.awaited == jobs[:2]
    jobs[1].is_done = True
    assert window.wants_more, "one of the two is free again, though the oldest is not done"
    for i in range(2, 2 * LOOK_AHEAD):
        window.add(i, jobs[i])
        jobs[i].is_done = True
    assert not window.wants_more, "as far ahead as allowed"
    assert window.awaited == jobs[:1]
    jobs[0].is_done = True
    assert window.awaited == []
    assert window.pop() == (0, jobs[0])
    assert window.wants_more
    window.end(None)
    assert not window.wants_more
    assert window
    window.check()
