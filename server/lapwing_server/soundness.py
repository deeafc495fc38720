"""Whether the model still computes: what failed in a row raises a doubt, and a try of the server's own settles it.

A computation that does not end needs no try: there is nothing that could be tried meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from lapwing_detector.detection import Detection, Reason
from lapwing_server.mishap import is_ours

FAILED_IN_A_ROW: Final = 5
"""Requests, after which the model itself is in doubt. Fewer may be the fault of what was asked."""

AGAIN: Final = 5.0
"""Seconds between two tries of a model that failed one."""

LOOK: Final = 1.0
"""Seconds between two looks at how long the model has been computing."""

FAILS: Final = f"the model fails on a plain text; it is tried every {AGAIN:g} s, and the log has the rest"
STUCK: Final = "the model does not come back from what it computes"


class Row:
    """Counts requests that failed in a row, for no fault of theirs. Every method is called in the worker."""

    def __init__(self, doubt: Callable[[], None]) -> None:
        self._doubt = doubt
        self._failed = 0

    def saw(self, outcome: object) -> None:
        """What came of a request: a score ends the row. Refusing what was asked says nothing, nor does a token yet."""
        detection = getattr(outcome, "detection", outcome)
        if isinstance(detection, Detection):
            self._count(detection.reason is Reason.NON_FINITE)
        elif isinstance(outcome, Exception) and is_ours(outcome):
            self._count(True)

    def _count(self, failed: bool) -> None:
        self._failed = self._failed + 1 if failed else 0
        if self._failed == FAILED_IN_A_ROW:
            self._failed = 0
            self._doubt()


class Checkup:
    """Tries the model once it is in doubt, and as long as it fails. Lives on the event loop.

    So the same request, sent again and again, takes no server out of service; and a server that nobody sends requests
    to any more, because it says that it does not serve, finds out by itself that it could.

    Args:
        works: tries the model.
        tell: told why it is out of service, `FAILS` or `STUCK`; and None when it works again.
        stuck: whether it has been computing for longer than anything can take.
    """

    def __init__(
        self,
        works: Callable[[], Awaitable[bool]],
        tell: Callable[[str | None], Awaitable[None]],
        stuck: Callable[[], bool] = lambda: False,
    ) -> None:
        self._works = works
        self._tell = tell
        self._stuck = stuck
        self._out = False
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    def begin(self) -> None:
        """Looks from now on whether it is stuck."""
        if not self._closed and self._watch is None:
            self._watch = asyncio.create_task(self._watch_over())

    def doubt(self) -> None:
        """Tries it, unless that is going on."""
        if not self._closed and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look())

    def close(self) -> None:
        """Gives up what is going on, and begins nothing more: what fails while a server ends is no news."""
        self._closed = True
        for task in (self._task, self._watch):
            if task is not None:
                task.cancel()

    async def _watch_over(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            if self._stuck() and not self._out:
                if self._task is not None:
                    self._task.cancel()  # its try waits behind what does not end
                self._task = asyncio.create_task(self._out_of_service(STUCK))

    async def _look(self) -> None:
        if not await self._works():
            await self._out_of_service(FAILS)

    async def _out_of_service(self, why: str) -> None:
        self._out = True
        await self._tell(why)
        await asyncio.sleep(AGAIN)
        while not await self._works():
            if why != FAILS:  # it came back, then
                why = FAILS
                await self._tell(why)
            await asyncio.sleep(AGAIN)
        self._out = False
        await self._tell(None)
