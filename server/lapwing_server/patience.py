"""Ends what waits for too long, where so many wait, and so shortly, that a timer for each would be much of the work."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from types import TracebackType
from typing import Any, NamedTuple

Waiting = asyncio.Task[Any]


class _Turn(NamedTuple):
    end: float
    """As the event loop counts."""

    cancelled: int
    """How often its task was cancelled before it came."""


class Patience:
    """`asyncio.timeout` for many: all wait for equally long, so one timer does, for whoever has waited longest.

    A task inside of `with patience:` gets TimeoutError when its time is over. It must leave before it enters again, and
    all must be on one event loop.

    Args:
        seconds: that each may wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turns: OrderedDict[Waiting, _Turn] = OrderedDict()
        """Of those inside whose time is not over; who came first ends first."""
        self._ended: dict[Waiting, _Turn] = {}
        """Of those that are being thrown out."""
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Nobody is inside any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> None:
        task = current()
        assert task not in self._turns, "it is inside already"
        self._turns[task] = _Turn(task.get_loop().time() + self._seconds, task.cancelling())
        if self._timer is None:
            self._set_timer()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        task = current()
        self._turns.pop(task, None)
        turn = self._ended.pop(task, None)
        # Who was cancelled by somebody else as well stays cancelled.
        if turn is not None and task.uncancel() <= turn.cancelled and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _set_timer(self) -> None:
        """For the first of those inside. It stays set when that one leaves, since it only looks around."""
        task, turn = next(iter(self._turns.items()))
        self._timer = task.get_loop().call_at(turn.end, self._look)

    def _look(self) -> None:
        now, self._timer = asyncio.get_running_loop().time(), None
        while self._turns:
            task, turn = next(iter(self._turns.items()))
            if turn.end > now:
                return self._set_timer()
            self._ended[task] = self._turns.pop(task)
            task.cancel()


def current() -> Waiting:
    """The task that runs."""
    task = asyncio.current_task()
    assert task is not None, "there is one wherever something is awaited"
    return task
