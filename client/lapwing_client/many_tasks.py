"""Many responses at once for a client that awaits: one task for each that is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from lapwing_client.many import Item, Outcome, Window
from lapwing_client.plans import Plan, Step, follow_async
from lapwing_client.progress import Progress


async def score_by_tasks(
    items: Iterable[Item] | AsyncIterable[Item],
    plan: Callable[[Item], Plan[Outcome]],
    perform: Callable[[Step], Awaitable[Any]],
    concurrency: int,
    progress: bool,
) -> AsyncGenerator[tuple[Item, Outcome], None]:
    """Items and what became of them."""
    window: Window[Item, asyncio.Task[Outcome]] = Window(concurrency)
    source, bar = iterated(items), Progress(items, progress)
    running: set[asyncio.Task[Outcome]] = set()
    try:
        while window.wants_more or window:
            if window.wants_more:
                try:
                    item = await anext(source)
                except StopAsyncIteration:
                    window.end(None)
                except Exception as error:
                    window.end(error)
                else:
                    task = asyncio.create_task(follow_async(plan(item), perform))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    window.add(item, task)
            elif unfinished := window.awaited:
                await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
            else:
                item, job = window.pop()
                bar.advance()
                yield item, job.result()
        window.check()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        bar.close()


async def iterated(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    """The items of an iterable of either kind."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
