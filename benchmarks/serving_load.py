"""Load on a server: closed loops (so many clients that each wait) and open loops (arrivals by the clock).

Latency in an open loop counts from the moment at which a request was due, not from when it was sent: a driver that
falls behind can't hide what its requests waited for.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np

Call = Callable[[int], Awaitable[object]]
"""One request, told its number; raises grpc.RpcError."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    code: str
    seconds: float
    """From when it was due until it was answered."""

    late: float = 0.0
    """Seconds after its time at which it was sent."""


@dataclass
class Load:
    """All outcomes of one run."""

    seconds: float
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def codes(self) -> dict[str, int]:
        """How many ended with each code."""
        return dict(Counter(one.code for one in self.outcomes).most_common())

    @property
    def goodput(self) -> float:
        """Requests answered well, per second."""
        return self.codes.get("OK", 0) / self.seconds

    def percentile_ms(self, percent: float, *, ok: bool = True) -> float:
        """Of the requests that were answered well, or of those that were not; NaN where there were none."""
        return percentile([one.seconds for one in self.outcomes if (one.code == "OK") is ok], percent) * 1000

    @property
    def latest_ms(self) -> float:
        """How late the driver sent, 99th percentile."""
        return percentile([one.late for one in self.outcomes], 99) * 1000


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, -(-len(values) * int(percent * 10) // 1000) - 1)]


async def closed_loop(call: Call, clients: int, seconds: float) -> Load:
    """So many clients, each of which sends its next request when the last one is answered."""
    outcomes: list[Outcome] = []
    begun = time.perf_counter()

    async def client(number: int) -> None:
        while (sent := time.perf_counter()) < begun + seconds:
            code = await code_of(call, number)
            outcomes.append(Outcome(code, time.perf_counter() - sent))
            number += clients
            if code != "OK":
                await asyncio.sleep(0.01)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return Load(time.perf_counter() - begun, outcomes)


async def open_loop(call: Call, rate: float, seconds: float, seed: int = 0) -> Load:
    """Requests at random times (Poisson), so many a second, whether or not earlier ones are answered."""
    dice, due, times = np.random.default_rng(seed), 0.0, []
    while (due := due + dice.exponential(1 / rate)) < seconds:
        times.append(due)
    outcomes: list[Outcome] = []

    async def request(number: int, at: float) -> None:
        late = time.perf_counter() - at
        code = await code_of(call, number)
        outcomes.append(Outcome(code, time.perf_counter() - at, late))

    with nothing_old_collected():
        begun = time.perf_counter() + 0.05
        async with asyncio.TaskGroup() as tasks:
            for number, after in enumerate(times):
                if (wait := begun + after - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.create_task(request(number, begun + after))
    return Load(seconds, outcomes)


@contextmanager
def nothing_old_collected() -> Iterator[None]:
    """The collector leaves alone what there was before: to look through a model stops the driver for 150 ms."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def code_of(call: Call, number: int) -> str:
    """How the request ended."""
    try:
        await call(number)
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"
