"""A server's life, in a random order that a seed repeats: no unexpected code, and at the end nothing is left of it."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from lives import OFTEN, RARE, Life, named
from service_fakes import FakeEngine, Running, wait_until

from lapwing_detector.registry import Registry
from lapwing_server.engine import Loaded
from lapwing_server.shelving import shelve
from tests.detector.registries import write_probe

SOAK = os.environ.get("LAPWING_SOAK") == "1"
SECONDS = 900.0 if SOAK else 6.0
THREADS = 4
GROWTH, PER_REQUESTS = 16 * 2**20, 100_000
"""Bytes that the process may grow by in so many requests. It grows a little: of every operation that is cancelled while
it goes on, as here in many calls, gRPC for Python keeps some bytes (github.com/grpc/grpc/issues/43360)."""

REQUESTS = PER_REQUESTS if SOAK else 3_000

TIMERS = 150
"""Objects that may be left: asyncio keeps up to 100 cancelled timers, with the context of the calls that set them."""

LEAK = 64 * 2**10
"""Bytes that the control keeps of each forward."""


class Forgetful(FakeEngine):
    """Keeps no record of what it was asked, which would grow with every request."""

    def forward(self, what: str, sequences: Sequence[tuple[int, ...]]) -> None:
        super().forward(what, sequences)
        for record in (self.calls, self.batches, self.scored):
            record.clear()


@pytest.fixture
def life(tmp_path: Path) -> Iterator[tuple[Life, Running]]:
    engine, registry = Forgetful(), Registry(tmp_path / "registry")
    for name in ("beta", "alpha"):
        registry.publish(write_probe(tmp_path / name, named(name)), activate=True)

    def load() -> Loaded:
        return Loaded(engine, shelve(registry.root, require=engine.require))

    # pytest keeps every line of the log of a test, with the frames of its exceptions.
    logging.disable(logging.CRITICAL)
    try:
        with Running(engine, load=load, keepalive=1.0, keepalive_timeout=1.0) as server:
            found = Life(server.target, engine, registry, tmp_path)
            yield found, server
            found.close()
    finally:
        logging.disable(logging.NOTSET)


def live(life: Life, go_on: Callable[[], bool], *, rare: bool, seed: int) -> None:
    """Several threads, in each of which one thing happens after another."""

    def run(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        while go_on():
            life.happen(draw, rare)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def ours() -> Counter[str]:
    """How many objects of our own classes there are, by class."""
    gc.collect()
    return Counter(
        f"{type(one).__module__}.{type(one).__qualname__}"
        for one in gc.get_objects()
        if str(type(one).__module__).startswith(("lapwing_server", "lapwing_detector"))
    )


def until(ends: float) -> Callable[[], bool]:
    return lambda: time.monotonic() < ends


@pytest.mark.timeout(3600)
def test_a_mixed_life_has_no_unexpected_end_and_leaves_nothing(life: tuple[Life, Running]) -> None:
    one, server = life
    live(one, until(time.monotonic() + min(30.0, SECONDS / 3)), rare=True, seed=1)
    server.settle()
    before, size, warm = ours(), resident(), sum(one.codes.values())
    live(one, until(time.monotonic() + SECONDS), rare=True, seed=2)
    assert one.unexpected == []
    assert {name for name, _ in one.codes} >= set(OFTEN)
    assert not SOAK or {name for name, _ in one.codes} >= set(RARE)
    wait_until(lambda: server.server.guard.in_flight == 0)
    server.settle()
    after = ours()
    more = {name: count - before[name] for name, count in after.items() if count > before[name] + TIMERS}
    assert more == {}
    assert resident() - size <= GROWTH * max(1.0, (sum(one.codes.values()) - warm) / PER_REQUESTS)


def grown(server: Running, one: Life) -> int:
    """Bytes that many mixed requests made the process grow by, once what the first ones need is there."""
    numbers: Any = iter(range(REQUESTS // 4))
    live(one, lambda: next(numbers, None) is not None, rare=False, seed=3)
    server.settle()
    before = resident()
    numbers = iter(range(REQUESTS))
    live(one, lambda: next(numbers, None) is not None, rare=False, seed=4)
    server.settle()
    return resident() - before


@pytest.mark.timeout(3600)
def test_many_mixed_requests_do_not_make_it_grow(life: tuple[Life, Running]) -> None:
    one, server = life
    assert grown(server, one) <= GROWTH
    assert one.unexpected == []


def test_control_a_server_that_keeps_what_it_computed_grows(life: tuple[Life, Running]) -> None:
    one, _ = life
    kept: list[bytearray] = []
    one.engine.before = lambda: kept.append(bytearray(os.urandom(64) * (LEAK // 64)))
    numbers: Any = iter(range(3_000))
    before = resident()
    live(one, lambda: next(numbers, None) is not None, rare=False, seed=5)
    assert resident() - before > GROWTH
