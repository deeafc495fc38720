"""The worker alone, without gRPC."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator

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


def test_nothing_of_a_request_is_kept(worker: Worker) -> None:
    class Request:
        pass

    request = Request()
    alive = weakref.ref(request)
    worker.post(lambda request=request: None).result(WAIT)  # type: ignore[misc]
    del request
    wait_until(lambda: alive() is None)
