"""A timer for all, held against `asyncio.timeout`, which has one for each."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from lapwing_server.patience import Patience

SHORT, NEEDED, LONG = 0.05, 1.0, 60.0
"""Seconds: that it may wait, that it takes, and more than that."""

Inside = Callable[[], Awaitable[str]]


async def patiently(patience: Patience, inside: Inside) -> str:
    """How it ended."""
    try:
        with patience:
            return await inside()
    except TimeoutError:
        return "too late"


async def alone(seconds: float, inside: Inside) -> str:
    """The same by a timer of its own."""
    try:
        async with asyncio.timeout(seconds):
            return await inside()
    except TimeoutError:
        return "too late"


async def quick() -> str:
    await asyncio.sleep(0)
    return "done"


async def slow() -> str:
    await asyncio.sleep(NEEDED)
    return "done"


async def stubborn() -> str:
    """Has something to say when it is cancelled."""
    try:
        return await slow()
    except asyncio.CancelledError:
        return "done all the same"


async def broken() -> str:
    try:
        return await slow()
    except asyncio.CancelledError:
        raise ValueError("broken by it") from None


async def outcome(waiting: Awaitable[str], *, cancelled_before: bool) -> tuple[str, int]:
    """How it ended, and how often its task is cancelled then."""
    task = asyncio.current_task()
    assert task is not None
    if cancelled_before:
        task.cancel()
        with suppress(asyncio.CancelledError):  # and nobody takes it back
            await asyncio.sleep(0)
    try:
        how = await waiting
    except ValueError as error:
        how = str(error)
    return how, task.cancelling()


@pytest.mark.parametrize("cancelled_before", [False, True])
@pytest.mark.parametrize("inside", [quick, slow, stubborn, broken])
def test_each_ends_as_it_would_by_a_timer_of_its_own(inside: Inside, cancelled_before: bool) -> None:
    mine = asyncio.run(outcome(patiently(Patience(SHORT), inside), cancelled_before=cancelled_before))
    theirs = asyncio.run(outcome(alone(SHORT, inside), cancelled_before=cancelled_before))
    assert mine == theirs
    if not cancelled_before:
        assert asyncio.run(outcome(patiently(Patience(LONG), inside), cancelled_before=False)) == ("done", 0), "control"


def test_each_is_ended_when_its_own_time_is_over() -> None:
    """Of twins that come in turn, one by the timer for all and one by its own, each is ended in the turn it came."""
    order: list[str] = []

    async def one(name: str, waiting: Awaitable[str]) -> None:
        order.append(f"{name} {await waiting}")

    async def all_of_them() -> None:
        seconds = 0.8
        patience = Patience(seconds)
        tasks = []
        for place in range(3):
            tasks.append(asyncio.create_task(one(f"{place}", patiently(patience, slow))))
            await asyncio.sleep(0.05)
            tasks.append(asyncio.create_task(one(f"{place} alone", alone(seconds, slow))))
            tasks.append(asyncio.create_task(one(f"{place} quick", patiently(patience, quick))))
            await asyncio.sleep(0.2)
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    ended = [name for name in order if not name.endswith("done")]
    assert ended == [f"{place}{kind} too late" for place in range(3) for kind in ("", " alone")]
    assert len(order) == 9


def test_it_begins_anew_after_nobody_waited() -> None:
    async def again() -> list[str]:
        patience, found = Patience(SHORT), []
        for inside in (quick, slow, quick, slow, slow):
            found.append(await patiently(patience, inside))
            await asyncio.sleep(2 * SHORT)  # the timer of the one that is done goes off in vain
        return found

    assert asyncio.run(again()) == ["done", "too late", "done", "too late", "too late"]


@pytest.mark.parametrize("both", [False, True], ids=["", "in the moment in which its time is over"])
def test_whom_somebody_else_cancels_is_cancelled(both: bool) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(patiently(Patience(SHORT), slow))
        await asyncio.sleep(0)  # it is inside by now
        asyncio.get_running_loop().call_later(SHORT if both else SHORT / 5, task.cancel)
        if both:
            time.sleep(2 * SHORT)  # so that both timers are due at once
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


@pytest.mark.parametrize("inside", [quick, slow])
def test_nobody_is_remembered(inside: Inside) -> None:
    async def remembered() -> object:
        patience = Patience(SHORT)
        task = asyncio.create_task(patiently(patience, inside))
        found = weakref.ref(task)
        await task
        del task
        await asyncio.sleep(0)  # the event loop lets go of it, too
        gc.collect()
        return patience and found()

    assert asyncio.run(remembered()) is None


@pytest.mark.parametrize("closed", [True, False], ids=["", "control: left open"])
def test_closed_it_leaves_no_timer(closed: bool) -> None:
    async def left() -> object:
        patience = Patience(SHORT)
        await patiently(patience, quick)
        loop = asyncio.get_running_loop()
        scheduled = [handle for handle in loop._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        assert len(scheduled) == 1
        if closed:
            patience.close()
        return scheduled[0].cancelled()

    assert asyncio.run(left()) is closed


def test_a_task_that_is_inside_does_not_enter() -> None:
    async def twice() -> None:
        patience = Patience(SHORT)
        with patience, pytest.raises(AssertionError, match="inside already"), patience:
            pass

    asyncio.run(twice())
