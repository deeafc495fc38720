"""Many responses, several at once, answered in their order: which to read, what becomes of each. Starts nothing."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, Protocol, TypeVar

from lapwing_client import calls, plans, requests
from lapwing_client.deadline import Deadline
from lapwing_client.errors import (
    Cancelled,
    LapwingError,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    TLSError,
    Unavailable,
    Unimplemented,
)
from lapwing_client.plans import Plan
from lapwing_client.results import Detection

LOOK_AHEAD = 4
"""Items that are read before the oldest one is answered, for each that may be asked for at once."""

FOR_ALL = (Cancelled, NotFound, PermissionDenied, PreconditionFailed, TLSError, Unavailable, Unimplemented)
"""Errors that any other item would get, too; they are raised. Every other one stands in the place of its item."""


class Work(Protocol):
    """A future or a task."""

    def done(self) -> bool:
        """Whether it has ended."""


Item = TypeVar("Item")
Job = TypeVar("Job", bound=Work)
Outcome = Detection | LapwingError


def at_once(concurrency: int) -> int:
    """How many items may be asked for at the same time."""
    if not (requests.is_whole(concurrency) and 1 <= concurrency <= 1000):
        raise requests.unusable("concurrency", f"is {concurrency!r:.40}; give a whole number from 1 to 1000")
    return int(concurrency)


def outcome(item: Any, options: dict[str, Any], deadline: Deadline) -> Plan[Outcome]:
    """What becomes of one item; it waits while the server has too much to do."""
    try:
        call = calls.score(*requests.pair(item, "item"), **options)
        found: Detection = yield from plans.patient(call, deadline)
    except FOR_ALL:
        raise
    except LapwingError as error:
        return error
    return found


def require_items(items: Any, *ways: str) -> None:
    """Refuses at once what no items can be read from: what has none of the methods for it.

    Raises:
        InvalidRequest: it is not iterable.
    """
    if not any(hasattr(items, way) for way in ("__iter__", "__getitem__", *ways)):
        hint = " (AsyncClient can read it)" if hasattr(items, "__aiter__") else ""
        message = f"is a {type(items).__name__}{hint}; give an iterable of pairs of prompt and response"
        raise requests.unusable("items", message)


class Window(Generic[Item, Job]):
    """The items between the one that is read next and the one that is answered next."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._jobs: deque[tuple[Item, Job]] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._just_read = False

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, item: Item, job: Job) -> None:
        """An item that was read, and the work on it."""
        self._jobs.append((item, job))
        self._just_read = True

    def end(self, error: Exception | None) -> None:
        """Nothing more can be read, perhaps because the caller's iterable failed."""
        self._ended, self._error = True, error

    def pop(self) -> tuple[Item, Job]:
        """Takes the oldest out."""
        self._just_read = False
        return self._jobs.popleft()

    @property
    def wants_more(self) -> bool:
        """Whether another item should be read now. An answer that lies ready comes first, but for one item each."""
        ready = self._jobs and self._jobs[0][1].done() and self._just_read
        return not (ready or self._closed) and len(self._unfinished) < self._concurrency

    @property
    def awaited(self) -> list[Job]:
        """What to wait for, until the first of it is done; empty when the oldest is done already."""
        oldest = self._jobs[0][1]
        if oldest.done():
            return []
        return [oldest] if self._closed else self._unfinished

    def check(self) -> None:
        """Raises, after the last answer, what the caller's iterable raised."""
        if self._error is not None:
            raise self._error

    @property
    def _closed(self) -> bool:
        return self._ended or len(self._jobs) >= self._concurrency * LOOK_AHEAD

    @property
    def _unfinished(self) -> list[Job]:
        return [job for _, job in self._jobs if not job.done()]
