"""What a server does to Python itself, undone after each test: tests share one process."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterator

import grpc
import pytest
from service_fakes import WAIT, Running

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_server.interpreter import TURN, for_good, new_event_loop, run, take_short_turns


class Ring:
    """Only the collector gets rid of it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    gc.unfreeze()


def test_threads_take_shorter_turns_than_by_default() -> None:
    sys.setswitchinterval(0.005)
    take_short_turns()
    assert sys.getswitchinterval() == pytest.approx(TURN)
    assert TURN < 0.005, "control: what Python does by itself"


def test_the_collector_looks_at_nothing_that_was_loaded() -> None:
    def load() -> Ring:
        kept.append(Ring())
        return kept[0]

    kept: list[Ring] = []
    assert gc.get_freeze_count() == 0
    assert for_good(load)() is kept[0]
    assert gc.get_freeze_count() > 10_000, "nor at the libraries"
    assert not any(one is kept[0] for one in gc.get_objects()), "what it looks at"
    gc.unfreeze()
    assert any(one is kept[0] for one in gc.get_objects()), "control"


def test_what_comes_later_is_collected_as_ever() -> None:
    for_good(lambda: None)()
    ring = Ring()
    alive = weakref.ref(ring)
    del ring
    assert alive() is not None
    gc.collect()
    assert alive() is None


def test_what_was_left_over_by_the_loading_is_not_kept() -> None:
    alive: list[weakref.ref[Ring]] = []
    for_good(lambda: alive.append(weakref.ref(Ring())))()
    assert alive[0]() is None


def test_what_can_not_be_loaded_freezes_nothing() -> None:
    def load() -> None:
        raise KeyError("probe")

    with pytest.raises(KeyError, match="probe"):
        for_good(load)()
    assert gc.get_freeze_count() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no uvloop for Windows")
def test_a_server_runs_on_the_quicker_event_loop() -> None:
    async def kind() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(kind()).startswith("uvloop")
    assert asyncio.run(kind()).startswith("asyncio"), "control"


def test_a_server_runs_on_the_plain_event_loop_too() -> None:
    """As it does on Windows; in all other tests it has the quicker one."""
    for new_loop, kind in ((asyncio.new_event_loop, "asyncio"), (new_event_loop, "uvloop")):
        with Running(new_loop=new_loop) as server, grpc.insecure_channel(server.target) as channel:
            assert type(server.loop).__module__.startswith(kind)
            stub = detector_pb2_grpc.DetectorStub(channel)
            request = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
            assert stub.Score(request, timeout=WAIT).detection.logit
            assert len(list(stub.Generate(detector_pb2.GenerateRequest(prompt={"text": "a"}), timeout=WAIT))) > 1
