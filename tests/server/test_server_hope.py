"""What is refused before it is read, because nothing as small as it may be would be taken on."""

from __future__ import annotations

from contextlib import nullcontext

import grpc
import pytest
from engine_fakes import FakeEngine
from raw_calls import send_raw
from scheduler_fakes import a_desk, run
from service_fakes import WAIT, Gate, Running, told

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_server.admission import KNOWN, LATELY, MARGIN, Usual
from lapwing_server.limits import Limits
from lapwing_server.refusal import Refusal

NO_MESSAGE = b"\xff\xff\xff"
SCORE = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})


@pytest.mark.parametrize(("came", "hope"), [((100, 100), False), ((100, 5), True), ((), True)])
def test_there_is_hope_for_a_call_as_small_as_one_of_its_client_lately(came: tuple[int, ...], hope: bool) -> None:
    """One token takes a second; ten are being scored, nothing waits, and there is time for twenty more."""

    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate())) as desk:
            admission = desk.scheduler.admission
            admission.pace.saw(1.0, 1)
            first = desk.score("x" * 10)
            await desk.reached(desk.engine.before)
            for _ in range(LATELY):
                for tokens in came:
                    admission.usual.came("me", tokens)
            with nullcontext() if hope else pytest.raises(Refusal, match="deadline"):
                desk.scheduler.require_hope(deadline=1000.0 + MARGIN * 30.0, client="me")
            desk.scheduler.require_hope(deadline=1000.0 + MARGIN * 30.0, client="you")
            desk.engine.before.open()  # type: ignore[attr-defined]
            await first

    run(main())


def test_calls_are_as_small_as_the_smallest_lately() -> None:
    usual = Usual()
    assert usual.least("me") == 1, "as long as nothing is known"
    for tokens in (7, *[50] * (LATELY - 1)):
        usual.came("me", tokens)
    assert (usual.least("me"), usual.least("you")) == (7, 1)
    usual.came("me", 60)
    assert usual.least("me") == 50, "and not what came before"


def test_of_calls_that_are_refused_unread_one_is_read_now_and_then() -> None:
    """Or a client that sends small calls from now on would be refused for ever."""
    usual = Usual()
    usual.came("me", 50)
    for _ in range(LATELY):
        assert usual.least("me") == 50
        usual.unread("me")
    assert usual.least("me") == 1
    usual.came("me", 40)
    assert usual.least("me") == 40


def test_what_is_known_of_clients_is_bounded() -> None:
    usual = Usual()
    for number in range(KNOWN + 1):
        usual.came(f"client {number}", 9)
        usual.unread(f"client {number}")
        usual.unread("never read")
    assert [usual.least(f"client {number}") for number in (0, 1, KNOWN)] == [1, 9, 9]
    assert len(usual._sizes) == len(usual._unread) == KNOWN


@pytest.mark.parametrize("method", ["Score", "ScoreBatch"])
def test_what_has_no_hope_is_refused_unread(method: str) -> None:
    gate, path = Gate(), f"/lapwing.v1.Detector/{method}"
    limits = Limits(queue_items=1, batch_items=1)
    with Running(FakeEngine(before=gate), limits=limits) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [stub.Score.future(SCORE)]
        assert gate.reached.wait(WAIT)
        calls.append(stub.Score.future(SCORE))
        server.queued(1)
        assert told(send_raw(channel, path, NO_MESSAGE)).reason == "QUEUE_FULL"
        assert told(send_raw(channel, "/lapwing.v1.Detector/Generate", NO_MESSAGE, False, True)).reason == "MALFORMED"
        gate.open()
        assert all(call.result(WAIT).detection.logit for call in calls)
        assert told(send_raw(channel, path, NO_MESSAGE)).reason == "MALFORMED", "control"
