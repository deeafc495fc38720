"""The worker alone, without gRPC."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
from service_fakes import WAIT, Gate, wait_until

from lapwing_server.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test-worker")
    yield worker
    worker.close()


def test_results_and_errors_come_back(worker: Worker) -> None:
    async def main() -> None:
        assert await worker.run(lambda: 3) == 3
        with pytest.raises(KeyError, match="x"):
            await worker.run(lambda: {}["x"])  # type: ignore[misc]
        assert await worker.run(lambda: threading.current_thread().name) == "test-worker"

    asyncio.run(main())


def test_order_is_kept(worker: Worker) -> None:
    done: list[int] = []
    futures = [worker.post(lambda i=i: done.append(i)) for i in range(50)]  # type: ignore[misc]
    futures[-1].result(WAIT)
    assert done == list(range(50))


def test_what_is_cancelled_before_its_turn_never_runs(worker: Worker) -> None:
    gate, ran = Gate(), []

    async def main() -> None:
        first = asyncio.create_task(worker.run(gate))
        second = asyncio.create_task(worker.run(lambda: ran.append(2)))
        third = asyncio.create_task(worker.run(lambda: ran.append(3)))
        await asyncio.to_thread(gate.reached.wait, WAIT)
        assert worker.waiting == 2
        second.cancel()
        await asyncio.sleep(0)
        gate.open()
        await first
        await third

    asyncio.run(main())
    assert ran == [3]


def test_the_worker_survives_a_cancel_of_what_it_runs(worker: Worker) -> None:
    gate = Gate()

    async def main() -> int:
        task = asyncio.create_task(worker.run(gate))
        await asyncio.to_thread(gate.reached.wait, WAIT)
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await worker.run(lambda: 7)

    assert asyncio.run(main()) == 7


class Request:
    """What a function that is run keeps alive, and is freed with it."""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_task_that_is_cancelled_leaves_nothing(
    worker: Worker, when: str, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what it was given nor what it made nor an error that nobody took."""
    gate, ran = Gate(), []
    kept: list[weakref.ref[Request]] = []

    def held() -> None:
        gate() if when == "waiting" else None

    def compute(request: Request) -> Request:
        ran.append(when)
        gate() if when == "running" else None
        made = Request()
        kept.append(weakref.ref(made))
        if fails:
            raise RuntimeError(made)
        return made

    async def main() -> None:
        loop, complaints = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        first, request = asyncio.create_task(worker.run(held)), Request()
        kept.append(weakref.ref(request))
        task = asyncio.create_task(worker.run(partial(compute, request)))
        del request
        assert await asyncio.to_thread(gate.reached.wait, WAIT)
        assert worker.waiting == (when == "waiting")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gate.open()
        await first
        assert await worker.run(lambda: 7) == 7, "whoever comes next is served"
        gc.collect()
        await asyncio.sleep(0)
        assert complaints == []

    asyncio.run(main())
    assert ran == ([] if when == "waiting" else ["running"])
    assert len(kept) == 1 + len(ran)
    wait_until(lambda: not any(one() for one in kept))
    assert worker.waiting == 0
    assert caplog.records == []


def test_nothing_of_a_request_is_kept(worker: Worker) -> None:
    request = Request()
    alive = weakref.ref(request)
    worker.post(lambda request=request: None).result(WAIT)  # type: ignore[misc]
    del request
    wait_until(lambda: alive() is None)
