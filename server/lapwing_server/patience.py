"""Ends what waits for too long, where so many wait, and so shortly, that a timer for each would be most of the work."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

Waiting = asyncio.Task[Any]


class Patience:
    """Everybody waits for equally long, so one timer, for whoever has waited longest, does for all.

    While a task is inside of `with patience:`, it gets TimeoutError when its time is over. On one event loop only; a
    task must not enter it twice.

    Args:
        seconds: that each may wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: dict[Waiting, float] = {}
        """When each is to end, the first one first: a dict keeps the order in which they came."""
        self._ended: set[Waiting] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        task = current()
        self._ends[task] = task.get_loop().time() + self._seconds
        if self._timer is None:
            self._set_timer()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        task = current()
        self._ends.pop(task, None)
        if task in self._ended:
            self._ended.remove(task)
            if task.uncancel() == 0 and kind is asyncio.CancelledError:  # else somebody cancels it as well
                raise TimeoutError from error

    def _set_timer(self) -> None:
        """For the first of those that wait; the timer of somebody who has gone stands, since it only looks around."""
        task, end = next(iter(self._ends.items()))
        self._timer = task.get_loop().call_at(end, self._look)

    def _look(self) -> None:
        now, self._timer = asyncio.get_running_loop().time(), None
        for task, end in list(self._ends.items()):
            if end > now:
                return self._set_timer()
            del self._ends[task]
            self._ended.add(task)
            task.cancel()


def current() -> Waiting:
    """The task that runs."""
    task = asyncio.current_task()
    assert task is not None, "there is one wherever something is awaited"
    return task
