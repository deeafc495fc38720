"""The thread that computes, so that the event loop never does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")


class Worker:
    """One thread that runs what it is given, in order, one at a time.

    The thread is a daemon: a model that is still being loaded does not keep a process alive that was told to stop.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], Result]) -> Result:
        """What the function returns or raises. If the waiting task is cancelled before its turn, it never runs."""
        return await asyncio.wrap_future(self.post(function))

    def post(self, function: Callable[[], Result]) -> Future[Result]:
        """Puts the function at the end of the queue and does not wait."""
        future: Future[Result] = Future()
        self._queue.put((future, function))
        return future

    @property
    def waiting(self) -> int:
        """How many functions are in the queue."""
        return self._queue.qsize()

    def close(self) -> None:
        """Lets the thread end after what is in the queue by now."""
        self._queue.put(None)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            future, function = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # it belongs to whoever waits
                    future.set_exception(error)
            del task, future, function  # else the last request is kept until the next one
