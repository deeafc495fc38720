"""A timer for all: each waits for as long as it may, and nobody is ended for another."""

from __future__ import annotations

import asyncio
import time

import pytest

from lapwing_server.patience import Patience

SHORT = 0.05


async def waits(patience: Patience, seconds: float) -> str:
    """How it ended."""
    try:
        with patience:
            await asyncio.sleep(seconds)
    except TimeoutError:
        return "too late"
    return "done"


def test_each_is_ended_when_its_own_time_is_over_and_not_before() -> None:
    async def one(patience: Patience, start: float, seconds: float) -> tuple[str, float]:
        await asyncio.sleep(start)
        begun = time.monotonic()
        return await waits(patience, seconds), time.monotonic() - begun

    async def all_of_them() -> list[tuple[str, float]]:
        patience = Patience(0.3)
        return await asyncio.gather(
            one(patience, 0.0, 60), one(patience, 0.1, 0.0), one(patience, 0.15, 60), one(patience, 0.2, 0.0)
        )

    endings = asyncio.run(all_of_them())
    assert [ending for ending, _ in endings] == ["too late", "done", "too late", "done"]
    assert min(endings[0][1], endings[2][1]) >= 0.299, "each of the two had all of its time"


def test_it_begins_anew_after_nobody_waited() -> None:
    async def again() -> list[str]:
        patience = Patience(SHORT)
        found = []
        for seconds in (0.0, 60, 0.0, 60, 60):
            found.append(await waits(patience, seconds))
            await asyncio.sleep(2 * SHORT)  # the timer of the one that is done goes off in vain
        return found

    assert asyncio.run(again()) == ["done", "too late", "done", "too late", "too late"]


def test_what_was_inside_goes_on_undisturbed_outside() -> None:
    async def outside() -> tuple[str, str, int]:
        patience = Patience(SHORT)
        late, done = await waits(patience, 60), await waits(patience, 0.0)
        await asyncio.sleep(3 * SHORT)
        task = asyncio.current_task()
        assert task is not None
        return late, done, task.cancelling()

    assert asyncio.run(outside()) == ("too late", "done", 0)


@pytest.mark.parametrize("both", [False, True], ids=["", "in the moment in which its time is over"])
def test_whom_somebody_else_cancels_is_cancelled(both: bool) -> None:
    async def cancelled() -> None:
        patience = Patience(SHORT)
        task = asyncio.create_task(waits(patience, 60))
        if both:
            await asyncio.sleep(0)  # it is inside by now
            asyncio.get_running_loop().call_later(SHORT, task.cancel)
            time.sleep(2 * SHORT)
        else:
            asyncio.get_running_loop().call_later(SHORT / 5, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_control_without_patience_nobody_is_ended() -> None:
    assert asyncio.run(waits(Patience(60), 3 * SHORT)) == "done"
