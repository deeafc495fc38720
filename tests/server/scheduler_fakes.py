"""A scheduler without gRPC: a tiny engine, a clock that a test sets, and a worker of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from engine_fakes import FakeEngine, a_probe
from service_fakes import WAIT

from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.scheduler import Scheduler
from lapwing_server.stream import Stream
from lapwing_server.waiting import Item, Outcome
from lapwing_server.worker import Worker

PROBE = a_probe()


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """What a test asks of a scheduler."""

    def __init__(self, engine: Any, limits: Limits, clock: Clock) -> None:
        self.engine, self.clock, self.metrics = engine, clock, Metrics()
        self.worker = Worker("test-worker")
        self.scheduler = Scheduler(self.worker, limits, self.metrics, clock)
        self.scheduler.begin(engine)

    def score(self, *texts: str, deadline: float | None = None, **more: Any) -> asyncio.Task[list[Outcome]]:
        """Scores each text, as one call."""
        items = [an_item(text, **more) for text in texts]
        return asyncio.create_task(self.scheduler.score(items, deadline=deadline))

    def generate(self, prompt: str = "hello", *, deadline: float | None = None, **options: Any) -> Stream:
        return self.scheduler.generate(prompt, PROBE, GenerationOptions(**options), deadline=deadline)

    async def reached(self, gate: Any) -> None:
        """Waits until the worker stands at the gate."""
        assert await asyncio.to_thread(gate.reached.wait, WAIT)

    async def queued(self, items: int) -> None:
        await until(lambda: self.scheduler.waiting == items)

    async def settle(self) -> None:
        """Waits until the worker has nothing left to do, and everybody was told."""
        await until(lambda: self.scheduler.idle)
        await self.worker.run(lambda: None)
        await asyncio.sleep(0)

    def counted(self, name: str, **labels: str) -> float:
        """Value of a metric; 0 for one that was never touched."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def an_item(text: str, probe: Probe = PROBE, **more: Any) -> Item:
    """A text of which the last character is the response."""
    return Item(text[:-1], text[-1], probe, 0.05, **more)


async def until(condition: Callable[[], bool]) -> None:
    """Looks again and again until it holds."""
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def a_desk(engine: Any = None, **limits: Any) -> AsyncIterator[Desk]:
    desk = Desk(engine or FakeEngine(), Limits(**limits), Clock())
    try:
        yield desk
    finally:
        desk.worker.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test."""
    asyncio.run(asyncio.wait_for(main, 2 * WAIT))
