"""Many responses at once for a client that blocks: one thread for each that may be asked for at the same time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import Any

import grpc

from lapwing_client.errors import Cancelled
from lapwing_client.many import Item, Outcome, Window
from lapwing_client.plans import Pause, Plan, Step, follow
from lapwing_client.progress import Progress


class Hands:
    """The calls of several threads, which all end when the work is left."""

    def __init__(self) -> None:
        self._left = Event()
        self._lock = Lock()
        self._running: set[grpc.Future[Any]] = set()

    def pause(self, step: Pause) -> None:
        """Waits, but no longer than until the work is left."""
        self._left.wait(step.seconds)

    def around(self, method: Any) -> Callable[..., Any]:
        """The method of a stub as one whose calls can be ended from another thread."""

        def call(request: Any, **options: Any) -> Any:
            with self._lock:
                if self._left.is_set():
                    raise left()
                running = method.future(request, **options)
                self._running.add(running)
            try:
                return running.result()
            except grpc.FutureCancelledError:
                raise left() from None
            finally:
                with self._lock:
                    self._running.discard(running)

        return call

    def leave(self) -> None:
        """Ends all calls and begins no more."""
        with self._lock:
            self._left.set()
            running = list(self._running)
        for call in running:
            call.cancel()


def left() -> Cancelled:
    """The error of a call whose answer nobody waits for any more."""
    return Cancelled("the work was left", code="CANCELLED")


def score_by_threads(
    items: Iterable[Item],
    plan: Callable[[Item], Plan[Outcome]],
    perform: Callable[[Step, Hands], Any],
    concurrency: int,
    progress: bool,
) -> Generator[tuple[Item, Outcome], None, None]:
    """Items and what became of them; the items are read in the caller's own thread."""
    window: Window[Item, Future[Outcome]] = Window(concurrency)
    source, bar, hands = iter(items), Progress(items, progress), Hands()

    def work(item: Item) -> Outcome:
        return follow(plan(item), lambda step: perform(step, hands))

    pool = ThreadPoolExecutor(concurrency, "lapwing-score")
    try:
        while window.wants_more or window:
            if window.wants_more:
                try:
                    item = next(source)
                except StopIteration:
                    window.end(None)
                except Exception as error:
                    window.end(error)
                else:
                    window.add(item, pool.submit(work, item))
            elif unfinished := window.awaited:
                wait(unfinished, return_when=FIRST_COMPLETED)
            else:
                item, job = window.pop()
                bar.advance()
                yield item, job.result()
        window.check()
    finally:
        hands.leave()
        pool.shutdown(cancel_futures=True)
        bar.close()
