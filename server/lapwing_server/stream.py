"""A generation that the worker takes one token further at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Generic, TypeVar

from lapwing_server.worker import Worker

Event = TypeVar("Event")


class Stream(Generic[Event]):
    """The events of an iterator whose every step runs in a worker.

    Each step queues anew, so that other work comes in between. After `close` no step begins.
    """

    def __init__(self, worker: Worker, start: Callable[[], Iterator[Event]]) -> None:
        self._worker = worker
        self._start = start
        self._events: Iterator[Event] | None = None
        self._stopped = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._worker.run(self._advance)) is not None:
            yield event

    def close(self) -> None:
        """Begins no further step, and closes the iterator after the one that runs; as often as one likes."""
        if not self._stopped:
            self._stopped = True
            self._worker.post(self._close)

    def _advance(self) -> Event | None:
        if self._stopped:
            return None
        if self._events is None:
            self._events = self._start()
        return next(self._events, None)

    def _close(self) -> None:
        if isinstance(self._events, Generator):
            self._events.close()
        self._events = None
