"""Errors of whatever kind, wherever they come up: somebody is told, and whoever comes next is served."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from engine_fakes import FakeEngine
from scheduler_fakes import Desk, a_desk, run
from service_fakes import WAIT, Running

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_detector.scoring import Scored
from lapwing_server.mishap import Panic, as_exception


class PanicException(BaseException):
    """As pyo3 defines what a panic in Rust becomes."""


class PanickingEngine(FakeEngine):
    """Panics where it tokenises a certain text, or reads it."""

    def tokens(self, prompt: Any, response: Any = None) -> Any:
        if prompt == "panic":
            raise PanicException
        return super().tokens(prompt, response)

    def forward(self, what: str, sequences: Any) -> None:
        super().forward(what, sequences)
        if any(bytes(ids).startswith(b"bomb") for ids in sequences):
            raise PanicException


class ForgetfulEngine(FakeEngine):
    """Gives one score too few, as no engine may, of all but a certain text."""

    def score_ids(self, jobs: Any) -> list[Scored]:
        forgets = any(bytes(job.ids.all) != b"hello" for job in jobs)
        return super().score_ids(jobs)[forgets:]


async def still_serves(desk: Desk) -> bool:
    [outcome] = await asyncio.wait_for(desk.score("hello"), WAIT)
    await desk.settle()
    return isinstance(outcome, Detection) and desk.scheduler.in_flight == desk.scheduler.waiting == 0


@pytest.mark.parametrize("text", ["panic!", "bomb!"])
def test_a_panic_is_the_items_own(text: str) -> None:
    async def main() -> None:
        async with a_desk(PanickingEngine()) as desk:
            first, poor, last = await asyncio.wait_for(desk.score("first", text, "last!"), WAIT)
            assert isinstance(poor, Panic)
            assert isinstance(first, Detection)
            assert isinstance(last, Detection)
            assert await still_serves(desk)

    run(main())


@pytest.mark.parametrize("prompt", ["panic", "bomb"])
def test_a_panic_ends_a_stream(prompt: str) -> None:
    async def main() -> None:
        async with a_desk(PanickingEngine()) as desk:
            with pytest.raises(Panic):
                [event async for event in desk.generate(prompt, max_new_tokens=3)]
            assert len([event async for event in desk.generate(max_new_tokens=3)]) == 4
            assert await still_serves(desk)

    run(main())


def test_what_ends_a_process_is_no_panic() -> None:
    with pytest.raises(KeyboardInterrupt):
        as_exception(KeyboardInterrupt())
    with pytest.raises(SystemExit):
        as_exception(SystemExit(1))


@pytest.mark.parametrize("error", [RuntimeError, PanicException, SystemExit])
def test_a_round_that_fails_as_a_whole_leaves_nobody_waiting(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with a_desk() as desk:

            def measure(_: Any) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(desk.scheduler._forwards, "_measure", measure)
                outcomes = await asyncio.wait_for(desk.score("one", "two"), WAIT)
            assert all(isinstance(outcome, Exception) for outcome in outcomes)
            assert desk.scheduler.in_flight == 0
            assert await still_serves(desk)

    run(main())


def test_an_engine_that_gives_too_few_scores_gives_nobody_anothers() -> None:
    async def main() -> None:
        async with a_desk(ForgetfulEngine()) as desk:
            one, good, two = await asyncio.wait_for(desk.score("one", "hello", "two"), WAIT)
            assert [type(one), type(two)] == [ValueError] * 2
            assert isinstance(good, Detection)
            assert bytes(good.token_ids) == b"hello"
            assert await still_serves(desk)

    run(main())


@pytest.mark.parametrize("error", [RuntimeError, PanicException])
def test_loading_that_fails_is_told(error: type[BaseException]) -> None:
    def load() -> Any:
        raise error

    with Running(load=load) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        info = stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT)
        assert (info.state, error.__name__ in info.message) == (detector_pb2.SERVER_STATE_FAILED, True)
