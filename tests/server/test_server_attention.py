"""ScoreAttention over the wire: the score, the running score, and what is refused with which code and field."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from attention_fakes import (
    Maps,
    Request,
    a_header,
    a_shadow,
    a_summary,
    local_score,
    requests,
    score_now,
    some_maps,
    some_rows,
    summary_of,
)
from engine_fakes import FakeEngine, a_probe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_fakes import WAIT, Gate, Running, Told, a_shelf, refused, told, wait_until

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc
from lapwing_detector.calibration import StageCalibration
from lapwing_server import attention_assembly
from lapwing_server.limits import Limits
from lapwing_server.shelf import Shelf, Shelved

TOKENS = 13
METHOD = "/lapwing.v1.Detector/ScoreAttention"


@contextmanager
def stub_of(server: Running) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield detector_pb2_grpc.DetectorStub(channel)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: Running) -> Iterator[Any]:
    with stub_of(server) as stub:
        yield stub


def answers(stub: Any, *parts: Any) -> list[detector_pb2.ScoreAttentionResponse]:
    return list(stub.ScoreAttention(requests(*parts), timeout=WAIT))


def prefix(maps: Maps, tokens: int) -> Maps:
    return maps[:, :, :tokens, :tokens]


# Scores.


def test_the_score_is_that_of_the_library(stub: Any) -> None:
    maps = some_maps(TOKENS)
    [answer] = answers(stub, a_header(), a_summary(maps))
    detection, (logit, share) = answer.detection, a_probe().score(summary_of(maps))
    assert not answer.running
    assert detection.state == detection_pb2.DETECTION_STATE_SCORED
    assert detection.logit == pytest.approx(logit, abs=1e-5)  # float32
    assert detection.probability == pytest.approx(a_probe().calibration.probability(logit), abs=1e-5)
    assert (detection.prompt_tokens, detection.response_tokens) == (2, TOKENS - 2)
    assert list(detection.token_ids) == [], "they were not sent"
    assert list(detection.token_contributions.shape) == [TOKENS]
    assert sum(head.contribution for head in detection.strongest_heads) + detection.bias == pytest.approx(
        detection.logit, abs=1e-5
    )
    assert detection.heads_contribution == pytest.approx(share.heads.sum(), abs=1e-5)
    assert set(detection.stage_seconds) == {"read", "probe"}


def test_running_scores_are_those_of_what_was_sent(stub: Any) -> None:
    maps = some_maps(TOKENS)
    parts = [part for row in range(TOKENS) for part in (some_rows(maps, row, row + 1), score_now())]
    *running, last = answers(stub, a_header(), *parts)
    assert [answer.running for answer in (*running, last)] == [True] * TOKENS + [False]
    for tokens, answer in enumerate(running, 1):
        scored = answer.detection.state == detection_pb2.DETECTION_STATE_SCORED
        assert scored == (tokens > 2), "the prompt alone, of 2 tokens, has no score; the probe needs 3"
        if scored:
            assert answer.detection.logit == pytest.approx(local_score(prefix(maps, tokens)), abs=1e-4)
            assert answer.detection.response_tokens == tokens - 2
    assert last.detection.logit == running[-1].detection.logit


def test_nothing_yet_is_unscored_and_not_an_error(stub: Any) -> None:
    first, last = answers(stub, a_header(), score_now(), a_summary(some_maps(TOKENS)))
    assert (first.running, last.running) == (True, False)
    assert first.detection.reason == detection_pb2.UNSCORED_REASON_TOO_SHORT
    assert not first.detection.HasField("probability")


def test_a_response_without_tokens_is_unscored(stub: Any) -> None:
    [answer] = answers(stub, a_header(TOKENS), a_summary(some_maps(TOKENS)))
    assert answer.detection.reason == detection_pb2.UNSCORED_REASON_TOO_SHORT


def test_a_running_probability_is_calibrated_for_its_stage() -> None:
    maps, probe = some_maps(TOKENS), a_probe(stages=(StageCalibration(0.5, 4.0, 2.0, -1.0),))
    shelf = Shelf((Shelved(probe.name, probe, ""),), probe)
    with Running(shelf=shelf) as server, stub_of(server) as stub:
        running, last = answers(stub, a_header(), a_summary(maps, 0, 6), score_now(), a_summary(maps, 6))
    logit = local_score(prefix(maps, 6))
    assert running.detection.probability == pytest.approx(probe.running_probability(logit, 4), abs=1e-5)
    assert running.detection.probability != pytest.approx(probe.calibration.probability(logit), abs=1e-2), "control"
    assert last.detection.probability == pytest.approx(probe.calibration.probability(local_score(maps)), abs=1e-5)


def test_a_named_probe_scores_at_the_rate_that_is_asked_for() -> None:
    maps = some_maps(TOKENS)
    with Running(shelf=a_shelf("a", "b", rejected=("broken",))) as server, stub_of(server) as stub:
        [answer] = answers(stub, a_header(probe="b", false_positive_rate=0.1), a_summary(maps))
        assert (answer.detection.probe_name, answer.detection.false_positive_rate) == ("b", 0.1)
        error = attention_refused(stub, a_header(probe="c"))
        assert (error.code, error.field) == (grpc.StatusCode.NOT_FOUND, "header.probe")
        assert attention_refused(stub, a_header(probe="broken")).code is grpc.StatusCode.FAILED_PRECONDITION


def sample(server: Running, name: str, **labels: str) -> float:
    return server.server.metrics.registry.get_sample_value(name, labels) or 0.0


def test_metrics_count_the_whole_once_and_the_shadows_beside_it() -> None:
    maps, probe, shadow = some_maps(TOKENS), a_probe(), a_shadow()
    entries = tuple(Shelved(one.name, one, "") for one in (probe, shadow))
    parts = (a_header(), a_summary(maps, 0, 6), score_now(), score_now(), a_summary(maps, 6))
    with Running(shelf=Shelf(entries, probe, (shadow,))) as server, stub_of(server) as stub:
        server.server.metrics.probes(server.server.readiness.loaded.shelf)
        answers(stub, *parts)
        answers(stub, a_header(probe=shadow.name), a_summary(maps))
        for role, name in (("active", probe.name), ("shadow", shadow.name), ("named", shadow.name)):
            assert sample(server, "lapwing_score_probability_count", role=role, probe=name) == 1.0


def test_a_shadow_that_reads_log_probabilities_is_left_out_and_harms_nobody() -> None:
    maps, probe, shadow = some_maps(TOKENS), a_probe(), a_shadow(statistic_weights={"mean_log_probability.v1": 1.0})
    entries = tuple(Shelved(one.name, one, "") for one in (probe, shadow))
    with Running(shelf=Shelf(entries, probe, (shadow,))) as server, stub_of(server) as stub:
        server.server.metrics.probes(server.server.readiness.loaded.shelf)
        [answer] = answers(stub, a_header(), a_summary(maps))
        assert answer.detection.logit == pytest.approx(local_score(maps), abs=1e-5)
        assert sample(server, "lapwing_shadow_skips_total", reason="not_sent") == 1.0
        named = attention_refused(stub, a_header(probe=shadow.name), a_summary(maps))
        assert (named.reason, named.field) == ("NEEDS_LOG_PROBABILITIES", "header.probe")


def test_a_stream_keeps_the_probe_that_it_began_with() -> None:
    maps, outgoing = some_maps(TOKENS), SimpleQueue[Any]()
    with Running(shelf=a_shelf("a", "b")) as server, stub_of(server) as stub:
        call = stub.ScoreAttention(iter(outgoing.get, None), timeout=WAIT)
        for part in requests(a_header(), a_summary(maps, 0, 6), score_now()):
            outgoing.put(part)
        assert next(call).detection.probe_name == "a"
        readiness = server.server.readiness
        other = readiness.loaded.shelf.find("b")
        assert other is not None
        assert other.probe is not None
        changed = Shelf(readiness.loaded.shelf.entries, other.probe)
        server.loop.call_soon_threadsafe(readiness.swap, changed)
        wait_until(lambda: readiness.loaded.shelf is changed)
        for part in requests(a_summary(maps, 6)):
            outgoing.put(part)
        outgoing.put(None)
        assert next(call).detection.probe_name == "a"
        assert answers(stub, a_header(), a_summary(maps))[0].detection.probe_name == "b"


# Refusals.


def attention_refused(stub: Any, *parts: Any) -> Told:
    return refused(stub.ScoreAttention, requests(*parts))


MAPS = some_maps(TOKENS)
WRONG: list[tuple[str, list[Any], str, str]] = [
    ("nothing at all", [], "header", "EMPTY_STREAM"),
    ("no header", [a_summary(MAPS)], "header", "OUT_OF_ORDER"),
    ("a question first", [score_now()], "header", "OUT_OF_ORDER"),
    ("two headers", [a_header(), a_header()], "header", "OUT_OF_ORDER"),
    ("a header later", [a_header(), a_summary(MAPS, 0, 5), a_header()], "header", "OUT_OF_ORDER"),
    ("only a header", [a_header()], "part", "EMPTY_STREAM"),
    ("a wrong header", [a_header(layers=[1, 9])], "header.layers[1]", "INVALID_INPUT"),
    ("a wrong rate", [a_header(false_positive_rate=2.0)], "header.false_positive_rate", "INVALID_INPUT"),
    ("too many tokens", [a_header(prompt_tokens=10**6)], "header.prompt_tokens", "TOO_LONG"),
    ("a gap", [a_header(), a_summary(MAPS, 0, 5), a_summary(MAPS, 6)], "summary.first_token", "OUT_OF_ORDER"),
    ("both kinds", [a_header(), a_summary(MAPS, 0, 5), some_rows(MAPS, 5)], "rows", "OUT_OF_ORDER"),
    ("a part only", [a_header(response_tokens=TOKENS), a_summary(MAPS)], "header.response_tokens", "INCOMPLETE"),
    ("some heads only", [a_header(), a_summary(MAPS, layers=slice(0, 1))], "summary", "INCOMPLETE"),
    (
        "a question in between",
        [a_header(), a_summary(MAPS, layers=slice(0, 1)), score_now()],
        "score_now",
        "INCOMPLETE",
    ),
    ("more than one", [a_header(), some_rows(2 * MAPS)], "rows.weights", "NOT_ATTENTION"),
    ("sums below one", [a_header(), a_summary(MAPS / 2)], "summary.received", "NOT_ATTENTION"),
]


@pytest.mark.parametrize(("parts", "field", "reason"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_with_a_stream_is_named(stub: Any, parts: list[Any], field: str, reason: str) -> None:
    error = attention_refused(stub, *parts)
    assert (error.code, error.field, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, field, reason)


def test_a_message_without_a_part_is_refused(stub: Any) -> None:
    error = refused(stub.ScoreAttention, iter([Request()]))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "part")
    error = refused(stub.ScoreAttention, iter([*requests(a_header()), Request()]))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "part")


@pytest.mark.parametrize("before", [0, 1, 2])
def test_bytes_that_are_no_message_are_malformed(server: Running, before: int) -> None:
    sent = [part.SerializeToString() for part in requests(a_header(), a_summary(MAPS, 0, 5))][:before]
    with grpc.insecure_channel(server.target) as channel:
        error = refused(channel.stream_stream(METHOD), iter([*sent, b"\xff\xff"]))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED")


def test_another_model_is_told_both_values(stub: Any) -> None:
    header = a_header()
    header.model.tokenizer = "cd" * 32
    error = attention_refused(stub, header)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_MISMATCH")
    assert error.field == "header.model.tokenizer"
    assert "abababab" in error.message
    assert "cdcdcdcd" in error.message


def test_before_the_model_is_loaded_nothing_is_read() -> None:
    gate = Gate()

    def load() -> Any:
        gate()
        raise RuntimeError("never mind")

    with Running(load=load, ready=False) as server, stub_of(server) as stub:
        error = attention_refused(stub, a_header(), a_summary(MAPS))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_LOADING")
        gate.open()


# Limits.


def test_memory_is_bounded_by_what_is_declared_and_by_what_comes() -> None:
    most = 5 * 12 * TOKENS
    with Running(limits=Limits(attention_bytes=most)) as server, stub_of(server) as stub:
        assert answers(stub, a_header(), a_summary(MAPS))
        error = attention_refused(stub, a_header(response_tokens=TOKENS))
        assert (error.field, error.reason) == ("header.response_tokens", "TOO_LARGE")
        error = attention_refused(stub, a_header(), a_summary(some_maps(TOKENS + 1)))
        assert (error.field, error.reason) == ("summary.received", "TOO_LARGE")


class Held:
    """A stream that is begun and stays open."""

    def __init__(self, stub: Any, *parts: Any) -> None:
        self.outgoing = SimpleQueue[Any]()
        self.send(*parts)
        self.call = stub.ScoreAttention(iter(self.outgoing.get, None), timeout=WAIT)

    def send(self, *parts: Any) -> None:
        for part in requests(*parts):
            self.outgoing.put(part)

    def finish(self) -> Any:
        self.outgoing.put(None)
        return list(self.call)[-1]


@pytest.mark.parametrize("limits", [Limits(attention_streams=2), Limits(streams_per_client=2)])
def test_streams_are_counted(limits: Limits) -> None:
    with Running(limits=limits) as server, stub_of(server) as stub:
        held = [Held(stub, a_header(), score_now()) for _ in range(2)]
        for one in held:
            next(one.call)
        error = attention_refused(stub, a_header())
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        held[0].send(a_summary(MAPS))
        assert held[0].finish().detection.logit
        wait_until(lambda: server.server.scheduler.places.taken == 1)
        assert answers(stub, a_header(), a_summary(MAPS)), "control: a place that is free again is given"
        held[1].call.cancel()
        server.settle()
        assert server.server.scheduler.places.taken == 0


def test_a_stream_may_take_only_so_long() -> None:
    with Running(limits=Limits(stream_seconds=0.2)) as server, stub_of(server) as stub:
        held = Held(stub, a_header())
        with pytest.raises(grpc.RpcError) as caught:
            next(held.call)
        error = told(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "STREAM_TOO_LONG")
        held.outgoing.put(None)


def test_a_client_that_leaves_gives_its_place_back(server: Running, stub: Any) -> None:
    held = Held(stub, a_header(), a_summary(MAPS, 0, 5), score_now())
    next(held.call)
    assert server.server.scheduler.places.taken == 1
    held.call.cancel()
    held.outgoing.put(None)
    server.settle()
    assert server.server.scheduler.places.taken == 0


# Threads.


def test_numbers_are_read_by_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is busy a stream is read; while a stream is read the event loop and the model are free."""
    gate, model, threads = Gate(), Gate(), set[str]()
    read_tensor = attention_assembly.read_tensor

    def watched(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return read_tensor(*args)

    monkeypatch.setattr(attention_assembly, "read_tensor", watched)
    score = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    with Running(FakeEngine(before=model)) as server, stub_of(server) as stub:
        busy = stub.Score.future(score)
        assert model.reached.wait(WAIT)
        assert answers(stub, a_header(), a_summary(MAPS), score_now()), "the model is busy meanwhile"
        model.open()
        assert busy.result(WAIT)
        server.begin(server.server._reader.run(gate))
        assert gate.reached.wait(WAIT)
        held = Held(stub, a_header(), a_summary(MAPS))
        assert stub.Score(score, timeout=WAIT), "the reader is busy meanwhile"
        gate.open()
        assert held.finish()
    assert threads == {"lapwing-reader"}


def test_a_sender_is_never_far_ahead_of_the_reader() -> None:
    """gRPC takes more only as the server reads: what a client has handed over is bounded, however much there is."""
    gate, taken = Gate(), []
    block = some_rows(some_maps(200))  # 960 kB
    assert len(block.weights.data) > 900_000

    def outgoing() -> Iterator[Request]:
        for part in requests(a_header(), *[block] * 100):
            taken.append(part)
            yield part

    with Running() as server, stub_of(server) as stub:
        server.begin(server.server._reader.run(gate))
        assert gate.reached.wait(WAIT)
        call = stub.ScoreAttention(outgoing(), timeout=WAIT)
        counts = []

        def settled() -> bool:
            counts.append(len(taken))
            return len(counts) > 40 and len(set(counts[-40:])) == 1

        wait_until(settled)
        assert 1 < len(taken) < 20, "100 are there to be sent"
        gate.open()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert told(caught.value).field == "rows.first_token", "the second block is not the next one"


# Whatever is sent.


def test_nothing_that_is_sent_is_an_internal_error(server: Running, stub: Any) -> None:
    pool = [*requests(a_header(), a_summary(MAPS), a_summary(MAPS, 0, 5), some_rows(MAPS, 5), score_now()), Request()]
    sent = [one.SerializeToString() for one in pool]
    fine = {"OK": 0, "INVALID_ARGUMENT": 0, "FAILED_PRECONDITION": 0}

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(sent), st.integers(0, 10**6), st.integers(-1, 255)), max_size=5))
    def check(messages: list[tuple[bytes, int, int]]) -> None:
        changed = []
        for data, place, value in messages:
            at = place % max(1, len(data))
            changed.append(data if value < 0 or not data else data[:at] + bytes([value]) + data[at + 1 :])
        with grpc.insecure_channel(server.target) as channel:
            call = channel.stream_stream(METHOD)(iter(changed), timeout=WAIT)
            try:
                list(call)
            except grpc.RpcError as error:
                found = told(error)
                fine[found.code.name] += 1  # KeyError for any other
                assert found.field or found.reason in ("MALFORMED", "PROBE_MISMATCH")
            else:
                fine["OK"] += 1

    check()
    server.settle()
    assert fine["INVALID_ARGUMENT"] > 20
