"""Score, ScoreBatch and GetServerInfo: the engine's answer comes through, and wrong input names its field."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from threading import current_thread
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from service_fakes import CONTEXT, WAIT, FakeEngine, Gate, Running, a_probe, refused, wait_until

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc, tensor_pb2
from lapwing_server import readings
from lapwing_server.detector_service import FEW_PARTS
from lapwing_server.limits import Limits
from lapwing_server.shelf import Shelf, Shelved

Prompt, Response = detection_pb2.Prompt, detection_pb2.Response


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: Running) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield detector_pb2_grpc.DetectorStub(channel)


def request(prompt: Any = None, response: Any = None, **more: Any) -> detector_pb2.ScoreRequest:
    return detector_pb2.ScoreRequest(
        prompt=prompt or Prompt(text="hello"), response=response or Response(text="world"), **more
    )


def test_score_is_the_score_of_the_engine(stub: Any) -> None:
    detection = stub.Score(request()).detection
    expected = FakeEngine().score("hello", "world", false_positive_rate=0.05)
    assert detection.state == detection_pb2.DETECTION_STATE_SCORED
    assert detection.probability == expected.probability
    assert detection.logit == expected.logit
    assert list(detection.token_ids) == list(expected.token_ids)
    assert (detection.prompt_tokens, detection.response_tokens) == (5, 5)
    assert (detection.probe_name, detection.probe_revision) == ("fake-probe", a_probe().revision)
    assert [(head.layer, head.head, head.contribution) for head in detection.strongest_heads] == [
        (2, 1, 0.5),
        (1, 2, -0.25),
    ]


def test_the_shares_of_the_tokens_add_up_to_the_logit(stub: Any) -> None:
    detection = stub.Score(request()).detection
    shares = detection.token_contributions
    assert shares.dtype == tensor_pb2.DATA_TYPE_FLOAT32
    assert list(shares.shape) == [10]
    total = np.frombuffer(shares.data, "<f4").sum() + detection.bias
    assert total == pytest.approx(detection.logit, abs=1e-6)  # float32 sums of ten numbers


def test_timing_names_the_stages(stub: Any) -> None:
    seconds = stub.Score(request()).detection.stage_seconds
    assert set(seconds) == {"queue", "tokenise", "forward", "probe"}
    assert all(value >= 0 for value in seconds.values())


@pytest.mark.parametrize(
    ("prompt", "response", "ids"),
    [
        (Prompt(text="ab"), Response(text="cd"), b"abcd"),
        (Prompt(token_ids=b"ab"), Response(token_ids=b"cd"), b"abcd"),
        (Prompt(text="ab"), Response(token_ids=b"cd"), b"abcd"),
        (Prompt(token_ids=b"ab"), Response(text="cd"), b"abcd"),
        (Prompt(messages=[{"role": "user", "content": "ab"}]), Response(text="cd"), b"<user>abcd"),
    ],
)
def test_every_form_of_input_reaches_the_engine(stub: Any, prompt: Any, response: Any, ids: bytes) -> None:
    assert bytes(stub.Score(request(prompt, response)).detection.token_ids) == ids


def test_too_short_for_the_probe_is_no_error_and_no_score(stub: Any) -> None:
    detection = stub.Score(request(Prompt(text="a"), Response(text="b"))).detection
    assert detection.state == detection_pb2.DETECTION_STATE_UNSCORED
    assert detection.reason == detection_pb2.UNSCORED_REASON_TOO_SHORT
    assert "2 tokens" in detection.message
    for field in ("probability", "logit", "flagged"):
        assert not detection.HasField(field), "an absent score must not read as 0 or false"


def test_flagged_goes_by_the_operating_point(stub: Any) -> None:
    message = request(Prompt(text="{{{{"), Response(text="zzzzzzzzzzzzzzzz"))
    logit = stub.Score(message).detection.logit
    assert 0.0 < logit < 0.5, "between two thresholds of the fake probe"
    flags = {}
    for rate in (0.05, 0.1):
        message.false_positive_rate = rate
        detection = stub.Score(message).detection
        assert detection.false_positive_rate == rate
        assert list(detection.flagged_at) == [0.1]
        flags[rate] = detection.flagged
    assert flags == {0.05: False, 0.1: True}


def test_a_rate_that_the_probe_does_not_store_leaves_flagged_open(stub: Any) -> None:
    detection = stub.Score(request(false_positive_rate=0.03)).detection
    assert detection.HasField("probability")
    assert not detection.HasField("flagged")


# Probes by name.


@pytest.fixture(scope="module")
def choice() -> Iterator[Any]:
    """A server with three probes, of which one was rejected."""
    probes = [a_probe("alpha"), a_probe("beta", bias=1.0)]
    entries = [*(Shelved(probe.name, probe) for probe in probes), Shelved("gamma", None, "its sha256 differs")]
    with (
        Running(shelf=Shelf(tuple(entries), probes[0])) as running,
        grpc.insecure_channel(running.target) as channel,
    ):
        yield detector_pb2_grpc.DetectorStub(channel)


def ask_all(stub: Any, probe: str) -> list[detection_pb2.Detection]:
    """The detections of the three ways to get one."""
    message, item = request(), detector_pb2.ScoreItem(prompt=Prompt(text="hello"), response=Response(text="world"))
    *_, last = stub.Generate(detector_pb2.GenerateRequest(prompt=message.prompt, max_new_tokens=1, probe=probe))
    return [
        stub.Score(request(probe=probe)).detection,
        stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=[item], probe=probe)).results[0].detection,
        last.generation.detection,
    ]


@pytest.mark.parametrize(("asked", "answers"), [("", "alpha"), ("alpha", "alpha"), ("beta", "beta")])
def test_a_request_may_name_a_probe(choice: Any, asked: str, answers: str) -> None:
    detections = ask_all(choice, asked)
    assert [one.probe_name for one in detections] == [answers] * 3
    assert [one.bias for one in detections] == [1.0 if answers == "beta" else -0.25] * 3


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("delta", grpc.StatusCode.NOT_FOUND, "UNKNOWN_PROBE"),
        ("../alpha", grpc.StatusCode.NOT_FOUND, "UNKNOWN_PROBE"),
        ("x" * 10_000, grpc.StatusCode.NOT_FOUND, "UNKNOWN_PROBE"),
        ("gamma", grpc.StatusCode.FAILED_PRECONDITION, "PROBE_REJECTED"),
    ],
)
def test_a_probe_that_can_not_score_is_refused(choice: Any, name: str, code: Any, reason: str) -> None:
    item = detector_pb2.ScoreItem(prompt=Prompt(text="hello"), response=Response(text="world"))
    for call, message in (
        (choice.Score, request(probe=name)),
        (choice.ScoreBatch, detector_pb2.ScoreBatchRequest(items=[item], probe=name)),
        (choice.Generate, detector_pb2.GenerateRequest(prompt=Prompt(text="hello"), probe=name)),
    ):
        error = refused(call, message)
        assert (error.code, error.reason) == (code, reason)
        assert error.field == ("probe" if code is grpc.StatusCode.NOT_FOUND else "")


def test_a_request_keeps_the_shelf_that_it_began_with() -> None:
    gate, probes = Gate(), [a_probe("old"), a_probe("new")]
    first, second = (Shelf((Shelved(probe.name, probe, ""),), probe) for probe in probes)
    with Running(FakeEngine(before=gate), shelf=first) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        before = [stub.Score.future(request()), stub.Generate(detector_pb2.GenerateRequest(prompt=request().prompt))]
        inner = server.server.scheduler
        wait_until(lambda: inner.places.taken == 1 and inner.in_flight + inner.waiting == 2)  # both have begun
        assert gate.reached.wait(WAIT)
        server.server.readiness.swap(second)
        after = stub.Score.future(request())
        wait_until(lambda: inner.in_flight + inner.waiting == 3)
        gate.open()
        assert before[0].result(WAIT).detection.probe_name == "old"
        assert list(before[1])[-1].generation.detection.probe_name == "old"
        assert after.result(WAIT).detection.probe_name == "new"


WRONG = [
    (detector_pb2.ScoreRequest(response=Response(text="x")), "prompt"),
    (detector_pb2.ScoreRequest(prompt=Prompt(text="x")), "response"),
    (detector_pb2.ScoreRequest(), "prompt"),
    (request(Prompt(text="")), "prompt.text"),
    (request(None, Response(text="")), "response.text"),
    (request(Prompt(text="a", token_ids=[1])), "prompt"),
    (request(Prompt(text="", token_ids=[1])), "prompt"),
    (request(Prompt(messages=[{"role": "user", "content": "x"}], token_ids=[1])), "prompt"),
    (request(None, Response(text="a", token_ids=[1])), "response"),
    (request(Prompt(messages=[{"role": "user"}, {"content": "x"}])), "prompt.messages[1].role"),
    (request(None, Response(token_ids=[1, 2, 3, 256])), "response.token_ids[3]"),
    (request(Prompt(token_ids=[1, -1]), Response(token_ids=[1])), "prompt.token_ids[1]"),
    (request(false_positive_rate=0.0), "false_positive_rate"),
    (request(false_positive_rate=1.0), "false_positive_rate"),
    (request(false_positive_rate=math.nan), "false_positive_rate"),
]


@pytest.mark.parametrize(("message", "field"), WRONG, ids=[f"{i}-{field}" for i, (_, field) in enumerate(WRONG)])
def test_wrong_input_names_its_field(stub: Any, message: Any, field: str) -> None:
    error = refused(stub.Score, message)
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT", field)


def test_too_long_for_the_model_says_how_long(stub: Any) -> None:
    message = request(None, Response(text="x" * 400))
    error = refused(stub.Score, message)
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "TOO_LONG", "response")
    assert "405 tokens, the model takes 400" in error.message


CHARACTERS = 64 * CONTEXT
LONG = [
    (request(Prompt(token_ids=[1] * (CONTEXT + 1))), "prompt.token_ids", "401 token ids, the server takes 400"),
    (request(None, Response(token_ids=[1] * (CONTEXT + 1))), "response.token_ids", "401 token ids"),
    (request(Prompt(text="x" * (CHARACTERS + 1))), "prompt.text", "25601 characters, the server takes 25600"),
    (request(None, Response(text="x" * (CHARACTERS + 1))), "response.text", "25601 characters"),
    (request(Prompt(messages=[{"role": "user"}] * 1001)), "prompt.messages", "1001 messages, the server takes 1000"),
    (request(Prompt(messages=[{"role": "u", "content": "x" * 20_000}] * 2)), "prompt.messages", "40002 characters"),
    (request(Prompt(messages=[{"role": "x" * 20_000, "content": "y"}] * 2)), "prompt.messages", "40002 characters"),
]


@pytest.mark.parametrize(("message", "field", "words"), LONG, ids=[field for _, field, _ in LONG])
def test_what_can_not_fit_is_refused_before_the_worker_sees_it(
    server: Running, stub: Any, message: detector_pb2.ScoreRequest, field: str, words: str
) -> None:
    before = server.engine.tokenised
    error = refused(stub.Score, message)
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "TOO_LONG", field)
    assert words in error.message
    item = detector_pb2.ScoreItem(prompt=message.prompt, response=message.response)
    [result] = stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=[item])).results
    assert f"{field}: has {words}" in result.error.message
    if message.response.text == "world":
        assert refused(stub.Generate, detector_pb2.GenerateRequest(prompt=message.prompt)).field == field
    assert server.engine.tokenised == before


def test_control_what_may_fit_is_left_to_the_tokenizer(server: Running, stub: Any) -> None:
    before = server.engine.tokenised
    for prompt in (Prompt(token_ids=[1] * CONTEXT), Prompt(text="x" * CHARACTERS)):
        error = refused(stub.Score, request(prompt))
        assert (error.reason, error.field) == ("TOO_LONG", "response"), "as the engine says it"
    assert server.engine.tokenised == before + 2


def test_the_event_loop_takes_no_fingerprint(
    stub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = []
    monkeypatch.setattr(
        "lapwing_server.forwards.fingerprint", lambda content: threads.append(current_thread().name) or "mark"
    )
    stub.Score(request())
    assert threads == [], "nor does anybody, unless the log wants it"
    caplog.set_level(logging.DEBUG, "lapwing.server")
    stub.Score(request())
    assert threads == ["lapwing-worker"] * 2
    assert "prompt mark response mark" in caplog.text


def test_nine_megabytes_are_refused_unread(server: Running, stub: Any) -> None:
    before = server.engine.forwards
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(request(Prompt(text="x" * 9_000_000)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.engine.forwards == before


def test_a_batch_answers_in_order_and_a_bad_item_fails_alone(stub: Any) -> None:
    items = [
        detector_pb2.ScoreItem(prompt=Prompt(text="hello"), response=Response(text="world")),
        detector_pb2.ScoreItem(response=Response(text="world")),
        detector_pb2.ScoreItem(prompt=Prompt(text="hello"), response=Response(token_ids=[1, 999])),
        detector_pb2.ScoreItem(prompt=Prompt(text="a"), response=Response(text="b")),
        detector_pb2.ScoreItem(prompt=Prompt(text="hallo"), response=Response(text="world")),
    ]
    results = stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=items)).results
    assert [result.WhichOneof("result") for result in results] == [
        "detection",
        "error",
        "error",
        "detection",
        "detection",
    ]
    assert results[0].detection.logit == stub.Score(request()).detection.logit
    assert results[3].detection.state == detection_pb2.DETECTION_STATE_UNSCORED
    assert results[4].detection.logit != results[0].detection.logit
    fields = []
    for result in results[1:3]:
        bad = error_details_pb2.BadRequest()
        assert result.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert result.error.details[1].Unpack(bad)
        fields.append(bad.field_violations[0].field)
    assert fields == ["items[1].prompt", "items[2].response.token_ids[1]"]


@pytest.mark.parametrize("count", [0, 65])
def test_the_number_of_items_is_bounded(stub: Any, count: int) -> None:
    item = detector_pb2.ScoreItem(prompt=Prompt(text="a"), response=Response(text="b"))
    message = detector_pb2.ScoreBatchRequest(items=[item] * count)
    error = refused(stub.ScoreBatch, message)
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "BATCH_SIZE", "items")


def batch_of(*sizes: int) -> detector_pb2.ScoreBatchRequest:
    items = [detector_pb2.ScoreItem(prompt=Prompt(text="x" * size), response=Response(text="y")) for size in sizes]
    return detector_pb2.ScoreBatchRequest(items=items)


def test_a_large_batch_is_cut_and_other_work_comes_in_between() -> None:
    gate = Gate()
    engine = FakeEngine(max_tokens=20_000, before=gate)
    with Running(engine) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        batch = stub.ScoreBatch.future(batch_of(*[9_000] * 3))
        assert gate.reached.wait(WAIT)
        score = stub.Score.future(request())
        wait_until(lambda: server.server.scheduler.waiting == 3)
        gate.open()
        found = [result.detection.prompt_tokens for result in batch.result(WAIT).results]
        assert score.result(WAIT)
    assert found == [9_000] * 3
    assert engine.batches == [[9_001], [9_001], [10], [9_001]], "the small one before the last of the batch"


def test_a_batch_that_is_left_is_not_finished() -> None:
    gate = Gate()
    engine = FakeEngine(max_tokens=20_000, before=gate)
    with Running(engine) as server, grpc.insecure_channel(server.target) as channel:
        batch = detector_pb2_grpc.DetectorStub(channel).ScoreBatch.future(batch_of(*[9_000] * 3))
        assert gate.reached.wait(WAIT)
        batch.cancel()
        wait_until(lambda: server.server.guard.in_flight == 0)
        gate.open()
        server.settle()
    assert engine.forwards == 1, "the portion that was being computed"


def test_a_batch_may_be_full(stub: Any) -> None:
    item = detector_pb2.ScoreItem(prompt=Prompt(text="hello"), response=Response(text="b"))
    assert len(stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=[item] * 64)).results) == 64


@pytest.mark.parametrize("form", ["messages", "token_ids"])
@pytest.mark.parametrize("count", [FEW_PARTS // 4, FEW_PARTS // 4 + 1])
def test_a_batch_of_many_parts_is_read_beside_the_event_loop(
    stub: Any, monkeypatch: pytest.MonkeyPatch, count: int, form: str
) -> None:
    threads = set[str]()
    prompt = {"messages": [{"role": "u"}] * count} if form == "messages" else {"token_ids": [65] * count}
    items = [detector_pb2.ScoreItem(prompt=prompt, response=Response(text="b"))] * 4

    def watched(*arguments: Any) -> Any:
        threads.add(current_thread().name)
        return readings.read_prompt(*arguments)

    monkeypatch.setattr("lapwing_server.asked.read_prompt", watched)
    results = stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=items), timeout=WAIT).results
    assert len(results) == 4
    assert (threads == {"test-event-loop"}) == (4 * count <= FEW_PARTS)
    assert len(threads) == 1


def test_server_info(stub: Any) -> None:
    info = stub.GetServerInfo(detector_pb2.GetServerInfoRequest())
    assert info.state == detector_pb2.SERVER_STATE_SERVING
    assert info.message == ""
    assert (info.model.identity.name, info.model.max_tokens) == ("fake-model", 400)
    assert (info.probe_name, info.probe_revision) == ("fake-probe", a_probe().revision)
    assert info.limits.max_request_bytes == 8 * 2**20
    assert info.limits.max_batch_items == Limits().batch_items == 64
    assert info.limits.max_heatmap_pixels == 4_000_000
    assert (info.limits.max_messages, info.limits.max_characters_per_token) == (1000, 64)
    assert info.library_versions["python"].startswith("3.")


def test_only_the_worker_computes(server: Running, stub: Any) -> None:
    stub.Score(request())
    assert server.engine.threads == {"lapwing-worker"}
