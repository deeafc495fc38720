"""What people write never reaches a log or an error: length and a short hash at most."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
from service_fakes import FakeEngine, Running

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_server.readings import fingerprint

CANARY = "canary-7f3a9c"


def every_way(stub: Any) -> str:
    """Sends the canary in every field and every way to fail; returns all that the errors say."""
    text = {"text": CANARY}
    chat = {"messages": [{"role": CANARY, "content": CANARY}]}
    item = detector_pb2.ScoreItem(prompt=text, response=text)
    said = []
    for call, message in (
        (stub.Score, detector_pb2.ScoreRequest(prompt=text, response=text)),
        (stub.Score, detector_pb2.ScoreRequest(prompt=chat, response=text)),
        (stub.Score, detector_pb2.ScoreRequest(prompt=text)),
        (stub.Score, detector_pb2.ScoreRequest(prompt={"text": CANARY * 100}, response=text)),
        (stub.ScoreBatch, detector_pb2.ScoreBatchRequest(items=[item, item])),
        (stub.Generate, detector_pb2.GenerateRequest(prompt=text, max_new_tokens=2)),
        (stub.Generate, detector_pb2.GenerateRequest(prompt=chat, temperature=-1)),
    ):
        try:
            answer = call(message)
            said.append("" if hasattr(answer, "SerializeToString") else str(len(list(answer))))
        except grpc.RpcError as error:
            said.append(str(error) + str(error.trailing_metadata()))
    return "\n".join(said)


@pytest.mark.parametrize("fails", [False, True])
def test_prompts_reach_no_log_and_no_error(caplog: pytest.LogCaptureFixture, fails: bool) -> None:
    class Quoting(FakeEngine):
        def _ids(self, content: Any, field: str) -> tuple[int, ...]:
            if fails:
                raise RuntimeError(f"can't tokenise {content!r}")
            return super()._ids(content, field)

    caplog.set_level(logging.INFO)
    with Running(Quoting()) as server, grpc.insecure_channel(server.target) as channel:
        said = every_way(detector_pb2_grpc.DetectorStub(channel))
    assert "Score" in caplog.text, "something is logged"
    assert CANARY not in caplog.text
    assert CANARY not in said


def test_the_fingerprint_tells_texts_apart_and_nothing_else() -> None:
    assert fingerprint(CANARY) == fingerprint(CANARY)
    assert fingerprint(CANARY) != fingerprint(CANARY + "!")
    assert fingerprint("hello") == "5:2cf24dba"
    assert fingerprint([1, 2, 3]).startswith("3:")
    assert CANARY not in fingerprint([{"role": "user", "content": CANARY}])
