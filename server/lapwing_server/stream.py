"""One generation on its way from the worker to a client: what was asked, and the events that nobody read so far."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_server.engine import Prompt

if TYPE_CHECKING:
    from lapwing_detector import GeneratedToken, Generation

    Event = GeneratedToken | Generation

ROOM: Final = 64
"""Events that are kept for a client that does not read; then its stream pauses, until half of them are read."""


class Stream:
    """The events of one generation, to be iterated once on the event loop, while the worker writes them."""

    def __init__(
        self,
        prompt: Prompt,
        probe: Probe,
        options: GenerationOptions,
        *,
        begun: float,
        deadline: float | None,
        wake: Callable[[], None],
        shadows: tuple[Probe, ...] = (),
        role: str = "active",
        client: str = "",
    ) -> None:
        self.prompt = prompt
        self.probe = probe
        self.options = options
        self.begun = begun
        self.deadline = deadline
        """Both by the scheduler's clock."""
        self.shadows = shadows
        self.role = role
        self.client = client
        self.seconds: dict[str, float] = {}
        """By stage, as far as the detector does not know them."""
        self.stopped = False
        """Nobody reads any more, so that no further token is to be written."""
        self.paused = False
        self.outbox: deque[Event | Exception | None] = deque()
        """What was not read so far; None at the end."""
        self._news = asyncio.Event()
        self._wake = wake

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            StopAsyncIteration: the generation is at its end, or was closed.
            Exception: what ended the generation.
        """
        while not (self.outbox or self.stopped):
            self._news.clear()
            await self._news.wait()
        event = None if self.stopped else self.outbox.popleft()
        if self.paused and self.drained:
            self._wake()
        if event is None or isinstance(event, Exception):
            self.stopped = True
            raise event or StopAsyncIteration
        return event

    def close(self) -> None:
        """No further token is begun; as often as one likes."""
        if not self.stopped:
            self.stopped = True
            self._news.set()
            self._wake()

    def announce(self) -> None:
        """Somebody put events into the outbox; called on the event loop."""
        self._news.set()

    @property
    def full(self) -> bool:
        """Whether its client is far behind."""
        return len(self.outbox) >= ROOM

    @property
    def drained(self) -> bool:
        """Whether its client has caught up enough for more."""
        return len(self.outbox) <= ROOM // 2
