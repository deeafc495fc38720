"""Generate: token by token, between other work, and over as soon as the client leaves."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from service_fakes import WAIT, FakeEngine, Gate, Running, a_probe, refused, told, wait_until

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc
from lapwing_server.limits import Limits


def request(**more: Any) -> detector_pb2.GenerateRequest:
    return detector_pb2.GenerateRequest(prompt={"text": "hello"}, **more)


@contextmanager
def stub_of(server: Running) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield detector_pb2_grpc.DetectorStub(channel)


class After:
    """Lets so many forwards pass, of which the first reads the prompt, and then waits at the gate."""

    def __init__(self, free: int) -> None:
        self.gate = Gate()
        self._free = free
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._free -= 1
            passes = self._free >= 0
        if not passes:
            self.gate()


def test_every_token_comes_with_its_score_and_the_last_event_is_the_whole() -> None:
    with Running() as server, stub_of(server) as stub:
        events = list(stub.Generate(request(max_new_tokens=3)))
        assert [event.WhichOneof("event") for event in events] == ["token", "token", "token", "generation"]
        assert [event.token.index for event in events[:3]] == [0, 1, 2]
        assert "".join(event.token.text for event in events[:3]) == events[-1].generation.text == "ABC"
        generation = events[-1].generation
        assert list(generation.prompt_token_ids) == list(b"hello")
        assert list(generation.token_ids) == list(b"ABC")
        assert generation.finish_reason == detector_pb2.FINISH_REASON_LENGTH
        assert generation.detection.state == detection_pb2.DETECTION_STATE_SCORED
        assert events[2].token.probability == generation.detection.probability


def test_the_ids_of_a_generation_score_the_same_again() -> None:
    with Running() as server, stub_of(server) as stub:
        generation = list(stub.Generate(request(max_new_tokens=5)))[-1].generation
        again = stub.Score(
            detector_pb2.ScoreRequest(
                prompt={"token_ids": generation.prompt_token_ids}, response={"token_ids": generation.token_ids}
            )
        ).detection
    assert again.logit == generation.detection.logit


def test_a_score_that_is_too_early_is_absent_not_zero() -> None:
    with Running() as server, stub_of(server) as stub:
        first, second, *_ = stub.Generate(detector_pb2.GenerateRequest(prompt={"token_ids": [1]}, max_new_tokens=3))
    assert not first.token.HasField("probability")
    assert not first.token.HasField("logit")
    assert second.token.HasField("probability")


def test_without_a_number_64_tokens_are_written() -> None:
    with Running() as server, stub_of(server) as stub:
        assert len(list(stub.Generate(request()))) == 65


WRONG = [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": 1025}, "max_new_tokens"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"false_positive_rate": math.nan}, "false_positive_rate"),
    ({"stop_strings": ["a", ""]}, "stop_strings[1]"),
    ({"stop_strings": ["a", "b", "x" * 257]}, "stop_strings[2]"),
    ({"stop_strings": ["a"] * 17}, "stop_strings"),
    ({"stop_when_probability_above": 1.0}, "stop_when_probability_above"),
    ({"stop_when_probability_above": -0.1}, "stop_when_probability_above"),
    ({"stop_when_probability_above": math.nan}, "stop_when_probability_above"),
    ({"minimum_tokens": 0}, "minimum_tokens"),
    ({"minimum_tokens": -5}, "minimum_tokens"),
    ({"score_every": 0}, "score_every"),
    ({"prompt": {"token_ids": [1, 2, 256]}}, "prompt.token_ids[2]"),
    ({"prompt": {"text": ""}}, "prompt.text"),
    ({"prompt": {}}, "prompt"),
]


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    with Running() as server, stub_of(server) as stub:
        yield stub


@pytest.mark.parametrize(("fields", "field"), WRONG, ids=[f"{i}-{field}" for i, (_, field) in enumerate(WRONG)])
def test_wrong_input_names_its_field(stub: Any, fields: dict[str, Any], field: str) -> None:
    message = detector_pb2.GenerateRequest(**{"prompt": {"text": "hello"}} | fields)
    error = refused(stub.Generate, message)
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT", field)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 1},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_p": 1.0},
        {"stop_strings": ["x" * 256] * 16},
        {"stop_when_probability_above": 0.0},
        {"minimum_tokens": 1},
        {"score_every": 1},
    ],
)
def test_the_ends_of_the_ranges_are_inside(stub: Any, fields: dict[str, Any]) -> None:
    assert list(stub.Generate(request(**{"max_new_tokens": 2} | fields)))


def ending(stub: Any, **fields: Any) -> tuple[Any, str, list[Any]]:
    """The generation, its finish reason and its tokens."""
    *tokens, last = stub.Generate(request(**fields))
    generation = last.generation
    return generation, detector_pb2.FinishReason.Name(generation.finish_reason), [event.token for event in tokens]


def test_a_stop_string_ends_the_response_and_is_left_out(stub: Any) -> None:
    generation, reason, tokens = ending(stub, stop_strings=["XYZ", "EF"])
    assert (generation.text, reason, len(tokens)) == ("ABCD", "FINISH_REASON_STOP_STRING", 6)
    assert list(generation.token_ids) == list(b"ABCDEF")


def test_a_probability_ends_the_response_but_not_before_the_least_number_of_tokens(stub: Any) -> None:
    probability = ending(stub)[2][4].probability
    _, reason, tokens = ending(stub, stop_when_probability_above=0.0, minimum_tokens=7)
    assert (reason, len(tokens)) == ("FINISH_REASON_FLAGGED", 7)
    _, reason, tokens = ending(stub, stop_when_probability_above=probability - 1e-9)
    assert (reason, len(tokens)) == ("FINISH_REASON_FLAGGED", 1)
    _, reason, tokens = ending(stub, stop_when_probability_above=0.999)
    assert (reason, len(tokens)) == ("FINISH_REASON_LENGTH", 64), "control: it never rises above this"


def test_only_every_nth_token_is_scored_and_the_last(stub: Any) -> None:
    _, _, tokens = ending(stub, max_new_tokens=8, score_every=3)
    assert [token.HasField("probability") for token in tokens] == [i in (2, 5, 7) for i in range(8)]


@pytest.mark.parametrize("wanted", [True, False])
def test_contributions_come_when_asked_for(stub: Any, wanted: bool) -> None:
    _, _, tokens = ending(stub, max_new_tokens=4, score_every=2, contributions=wanted)
    assert [token.HasField("token_contributions") for token in tokens] == [i in (1, 3) and wanted for i in range(4)]
    if wanted:
        shares = tokens[1].token_contributions
        assert list(shares.shape) == [7], "of the prompt, too"
        total = np.frombuffer(shares.data, "<f4").sum() + a_probe().bias
        assert total == pytest.approx(tokens[1].logit, abs=1e-6)  # float32 sums of seven numbers


def test_timing_names_the_stages(stub: Any) -> None:
    generation, _, _ = ending(stub, max_new_tokens=2)
    assert set(generation.detection.stage_seconds) == {"queue", "tokenise", "first_token", "forward", "probe"}


def test_leaving_stops_the_model_within_a_token() -> None:
    engine = FakeEngine(before=After(1 + 3))
    with Running(engine) as server, stub_of(server) as stub:
        call = stub.Generate(request(max_new_tokens=200))
        for _ in range(3):
            next(call)
        assert engine.before.gate.reached.wait(WAIT), "the fourth token is being computed"
        call.cancel()
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        engine.before.gate.open()
        server.settle()
        assert engine.steps == 4, "the one that was being computed is finished, and no other begun"
        assert engine.closed == 1, "the generator was closed, so the cache is freed"


def test_control_a_client_that_stays_gets_all_tokens() -> None:
    engine = FakeEngine(before=After(1 + 3))
    with Running(engine) as server, stub_of(server) as stub:
        call = stub.Generate(request(max_new_tokens=200))
        assert engine.before.gate.reached.wait(WAIT)
        engine.before.gate.open()
        assert len(list(call)) == 201
        server.settle()
        assert engine.steps == 200
        assert engine.closed == 1


def test_a_client_that_goes_away_without_a_word_stops_the_model() -> None:
    engine = FakeEngine(before=After(1 + 1))
    with Running(engine) as server:
        channel = grpc.insecure_channel(server.target)
        call = detector_pb2_grpc.DetectorStub(channel).Generate(request(max_new_tokens=200))
        next(call)
        assert engine.before.gate.reached.wait(WAIT)
        channel.close()
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        engine.before.gate.open()
        server.settle()
        assert engine.steps == 2


def test_a_deadline_stops_the_model() -> None:
    engine = FakeEngine(before=After(1 + 1))
    with Running(engine) as server, stub_of(server) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request(max_new_tokens=200), timeout=0.2))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        engine.before.gate.open()
        server.settle()
        assert engine.steps <= 2


def test_work_that_was_cancelled_in_the_queue_is_never_done() -> None:
    engine = FakeEngine(before=After(0))
    message = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    with Running(engine) as server, stub_of(server) as stub:
        first, second = stub.Score.future(message), None
        assert engine.before.gate.reached.wait(WAIT)
        second = stub.Score.future(message)
        server.queued(1)
        second.cancel()
        wait_until(lambda: server.server.guard.in_flight == 1)
        engine.before.gate.open()
        assert first.result(WAIT)
        server.settle()
    assert engine.forwards == 1


def test_scores_come_between_the_tokens() -> None:
    engine = FakeEngine(before=After(1 + 2))
    message = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    with Running(engine) as server, stub_of(server) as stub:
        call = stub.Generate(request(max_new_tokens=20))
        assert engine.before.gate.reached.wait(WAIT)
        score = stub.Score.future(message)
        server.queued(1)
        engine.before.gate.open()
        assert score.result(WAIT)
        assert len(list(call)) == 21
    assert engine.calls.index("score") == 1 + 3, "after the token that was being computed, before the other 17"


def test_two_streams_take_turns() -> None:
    engine = FakeEngine(before=After(1 + 2))
    with Running(engine) as server, stub_of(server) as stub:
        first = stub.Generate(request(max_new_tokens=10))
        assert engine.before.gate.reached.wait(WAIT)
        second = stub.Generate(request(max_new_tokens=10))
        wait_until(lambda: server.server.scheduler.in_flight == 2)
        engine.before.gate.open()
        texts = [list(call)[-1].generation.text for call in (first, second)]
    assert texts == ["ABCDEFGHIJ"] * 2
    assert engine.steps == 20


def test_the_number_of_streams_is_bounded_and_a_place_becomes_free_again() -> None:
    engine = FakeEngine(before=After(0))
    with Running(engine, limits=Limits(generate_streams=1)) as server, stub_of(server) as stub:
        first = stub.Generate(request(max_new_tokens=2))
        assert engine.before.gate.reached.wait(WAIT)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Generate(request(max_new_tokens=2)))
        error = told(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        engine.before.gate.open()
        assert len(list(first)) == 3
        server.settle()
        assert len(list(stub.Generate(request(max_new_tokens=2)))) == 3


def test_a_refused_stream_takes_no_place() -> None:
    with Running(limits=Limits(generate_streams=1)) as server, stub_of(server) as stub:
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                next(stub.Generate(request(temperature=-1)))
        assert len(list(stub.Generate(request(max_new_tokens=2)))) == 3


def test_a_stream_has_a_wall_clock() -> None:
    engine = FakeEngine(before=After(1 + 3))
    with Running(engine, limits=Limits(stream_seconds=0.3)) as server, stub_of(server) as stub:
        error = refused(stub.Generate, request(max_new_tokens=200))
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "STREAM_TOO_LONG")
        engine.before.gate.open()
        server.settle()
        assert engine.steps == 4, "the one that was being computed is finished, and no other begun"
        assert engine.closed == 1


def test_the_event_loop_answers_while_the_worker_computes() -> None:
    engine = FakeEngine(before=After(0))
    with Running(engine) as server, stub_of(server) as stub:
        call = stub.Generate(request(max_new_tokens=2))
        assert engine.before.gate.reached.wait(WAIT)
        info = stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT)
        assert info.state == detector_pb2.SERVER_STATE_SERVING
        assert not engine.before.gate._open.is_set(), "it answered while the model was held"
        engine.before.gate.open()
        assert len(list(call)) == 3
