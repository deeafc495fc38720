"""What the page of the metrics says after known calls, and that its size does not depend on what clients say."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from attention_fakes import a_header, a_summary, requests, some_maps
from engine_fakes import detect
from grpc_health.v1 import health_pb2, health_pb2_grpc
from metrics_pages import BATCH, GENERATE, INFO, SCORE, page, page_of, registry_page, score
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from service_fakes import WAIT, FakeEngine, Gate, Running, a_probe, a_shelf, wait_until

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_detector.tokens import TokenIds
from lapwing_server.metrics import CODES, METHODS, OTHER, STAGES, Metrics
from lapwing_server.shelf import Rejected, Shelf, Shelved


@pytest.fixture
def server() -> Iterator[Running]:
    shadow = replace(a_probe("quiet-probe"), bias=-9.0)
    active = a_probe()
    entries = (Shelved(active.name, active), Shelved(shadow.name, shadow), Shelved("torn", None, "its sha256 differs"))
    with Running(shelf=Shelf(entries, active, (shadow,)), metrics_port=0) as running:
        yield running


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def test_the_page_counts_what_happened(server: Running, channel: grpc.Channel) -> None:
    stub = detector_pb2_grpc.DetectorStub(channel)
    loud, soft = stub.Score(score("zz", "zzzzzz")).detection, stub.Score(score("AA", "AAAAAA")).detection
    assert (loud.flagged, soft.flagged) == (False, False)
    assert stub.Score(score("zz", "zzzzzz", false_positive_rate=0.1)).detection.flagged
    assert not stub.Score(score("zz", "zzzzzz", false_positive_rate=0.3)).detection.HasField("flagged")
    for probe in ("", "quiet-probe"):
        assert stub.Score(score("a", "b", probe=probe)).detection.state == detection_pb2.DETECTION_STATE_UNSCORED
    for probe in ("nope", "torn"):
        with pytest.raises(grpc.RpcError):
            stub.Score(score("a", "b", probe=probe))
    item = detector_pb2.ScoreItem(prompt={"text": "hello"}, response={"text": "world"})
    stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=[item] * 3))
    events = list(stub.Generate(detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=4)))
    assert len(events) == 5
    stub.GetServerInfo(detector_pb2.GetServerInfoRequest())
    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    with pytest.raises(grpc.RpcError):
        channel.unary_unary("/nobody.knows/Me")(b"")
    server.settle()
    wait_until(lambda: page(server)("calls_in_flight") == 0)
    seen = page(server)
    calls = {(labels["method"], labels["code"]): value for labels, value in seen.named("calls_total")}
    assert calls == {
        (SCORE, "OK"): 6,
        (SCORE, "NOT_FOUND"): 1,
        (SCORE, "FAILED_PRECONDITION"): 1,
        (BATCH, "OK"): 1,
        (GENERATE, "OK"): 1,
        (INFO, "OK"): 1,
        ("grpc.health.v1.Health/Check", "OK"): 1,
        (OTHER, "UNIMPLEMENTED"): 1,
    }
    for method in {method for method, _ in calls}:
        assert seen("call_seconds_count", method=method) == sum(n for (one, _), n in calls.items() if one == method)
    # Of the active probe: 5 by Score, 3 of the batch, 1 generated.
    verdicts = {labels["verdict"]: n for labels, n in seen.named("detections_total", role="active", probe="fake-probe")}
    assert verdicts == {"flagged": 1, "unflagged": 6, "undecided": 1, "unscored": 1}
    assert seen("score_probability_count", role="active", probe="fake-probe") == 8
    assert seen("detections_total", role="named", probe="quiet-probe", verdict="unscored") == 1
    assert {(labels["role"], labels["reason"]): n for labels, n in seen.named("unscored_total")} == {
        ("active", "TOO_SHORT"): 1,
        ("named", "TOO_SHORT"): 1,
        ("shadow", "TOO_SHORT"): 1,
    }
    assert seen("generated_tokens_total") == 4
    assert seen("forward_items_sum") == 10, "6 by Score, 3 of the batch, and for the shadow what was generated"
    assert seen("stage_seconds_count", stage="first_token") == 1
    assert seen("stage_seconds_count", stage="queue") == 11, "the same, and the stream"
    assert seen("queue_items") == 0
    assert seen("drift_responses") == 8
    assert seen("shed_total") == 0


def test_a_shadow_scores_unseen(server: Running, channel: grpc.Channel) -> None:
    stub = detector_pb2_grpc.DetectorStub(channel)
    for _ in range(3):
        assert stub.Score(score("zz", "zzzzzz")).detection.probe_name == "fake-probe"
    stub.Score(score("zz", "zzzzzz", probe="quiet-probe"))
    server.settle()
    seen = page(server)
    assert seen("detections_total", role="shadow", probe="quiet-probe") == 3, "not beside a probe that was named"
    assert seen("score_probability_count", role="shadow", probe="quiet-probe") == 3
    assert seen("score_probability_sum", role="shadow") < seen("score_probability_sum", role="active")
    assert seen("detections_total", role="named", probe="quiet-probe") == 1
    assert seen("probe_info", role="shadow", name="quiet-probe") == 1


def test_every_stage_is_timed(server: Running, channel: grpc.Channel) -> None:
    stub, maps = detector_pb2_grpc.DetectorStub(channel), some_maps(8)
    calls: dict[str, Callable[[], Any]] = {
        "score": lambda: stub.Score(score("hello", "world")),
        "write": lambda: list(stub.Generate(detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=2))),
        "attention": lambda: list(stub.ScoreAttention(requests(a_header(), a_summary(maps)))),
    }
    timed = {
        "score": {"queue", "tokenise", "forward", "probe"},
        "write": {"queue", "tokenise", "first_token", "forward", "probe"},  # of the shadow, once all is written
        "attention": {"read", "probe"},
    }
    assert set().union(*timed.values()) == set(STAGES)
    before = dict.fromkeys(STAGES, 0.0)
    assert {stage: page(server)("stage_seconds_count", stage=stage) for stage in STAGES} == before
    for name, call in calls.items():
        call()
        server.settle()
        seen = page(server)
        after = {stage: seen("stage_seconds_count", stage=stage) for stage in STAGES}
        assert {stage for stage in STAGES if after[stage] > before[stage]} == timed[name], name
        before = after
    assert seen("stage_seconds_count") == sum(after.values()), "and there is no other"


def test_a_call_counts_as_in_flight_until_it_ends() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate), metrics_port=0) as server, grpc.insecure_channel(server.target) as channel:
        call = detector_pb2_grpc.DetectorStub(channel).Score.future(score("hello", "world"))
        assert gate.reached.wait(WAIT)
        assert page(server)("calls_in_flight", method=SCORE) == 1
        assert page(server)("calls_total", method=SCORE) == 0
        gate.open()
        call.result(WAIT)
        wait_until(lambda: page(server)("calls_in_flight", method=SCORE) == 0)
        assert page(server)("calls_total", method=SCORE, code="OK") == 1


@pytest.mark.parametrize(("timeout", "code"), [(None, "CANCELLED"), (0.2, "DEADLINE_EXCEEDED")])
def test_a_call_that_its_client_left_is_told_apart(timeout: float | None, code: str) -> None:
    """gRPC's own context says nothing of it: its code is None, as after a good end."""
    gate = Gate()
    with Running(FakeEngine(before=gate), metrics_port=0) as server, grpc.insecure_channel(server.target) as channel:
        request = detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=4)
        call = detector_pb2_grpc.DetectorStub(channel).Generate(request, timeout=timeout)
        assert gate.reached.wait(WAIT)
        if timeout is None:
            call.cancel()
        wait_until(lambda: page(server)("calls_total", method=GENERATE) == 1)
        gate.open()
        server.settle()
        [(labels, _)] = page(server).named("calls_total", method=GENERATE)
    assert labels["code"] == code


def a_word(generator: random.Random) -> str:
    return "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=12))


def test_what_clients_say_makes_no_new_labels(server: Running, channel: grpc.Channel) -> None:
    """1,000 random names of methods, probes and services; the second half adds no sample."""
    generator = random.Random(3)
    stub, health = detector_pb2_grpc.DetectorStub(channel), health_pb2_grpc.HealthStub(channel)
    stub.Score(score("hello", "world"))

    def send(count: int) -> None:
        for _ in range(count):
            word = a_word(generator)
            calls = [
                (channel.unary_unary(f"/{word}.v1.{word}/{word}"), b""),
                (channel.unary_unary(f"/lapwing.v1.Detector/{word}"), b""),
                (stub.Score, score("hello", "world", probe=word)),
                (health.Check, health_pb2.HealthCheckRequest(service=word)),
            ]
            call, message = calls[generator.randrange(len(calls))]
            with pytest.raises(grpc.RpcError):
                call(message, timeout=WAIT, metadata=(("x-request-id", word), ("x-other", word)))

    send(100)
    wait_until(lambda: page(server)("calls_in_flight") == 0)
    before = page(server)
    send(900)
    wait_until(lambda: page(server)("calls_in_flight") == 0)
    after = page(server)
    assert before.samples.keys() == after.samples.keys()
    assert after("calls_total") == 1001, "control: they were counted"
    assert {labels["method"] for labels, _ in after.named("calls_total")} <= {*METHODS.values(), OTHER}


def test_no_caller_inside_makes_new_labels_either() -> None:
    metrics, generator = Metrics(), random.Random(4)
    metrics.probes(a_shelf())
    known = detect(a_probe(), TokenIds((1, 2), (3, 4)), 0.05)

    def call(word: str) -> None:
        metrics.call_ended(f"/{word}", word, 0.1)
        metrics.in_flight(f"/{word}", 1)
        metrics.stage(word, 0.1)
        metrics.shed(word)
        metrics.scored(replace(known, probe_name=word), word)

    call(a_word(generator))
    before = registry_page(metrics)
    for _ in range(1000):
        call(a_word(generator))
    after = registry_page(metrics)
    assert before.samples.keys() == after.samples.keys()
    assert after("calls_total", method=OTHER, code=OTHER) == 1001
    metrics.scored(known, "active")
    assert registry_page(metrics)("detections_total", role="active", probe="fake-probe") == 1, "control"
    assert "OK" in CODES


def scored_by(probe: Any) -> Detection:
    return detect(probe, TokenIds((1, 2, 3), (4, 5)), 0.05)


def test_the_active_revision_is_the_only_one_on_the_page() -> None:
    metrics = Metrics()
    one, two = a_probe("one"), a_probe("two")
    newer = replace(one, bias=0.5)
    assert newer.revision != one.revision

    def shelf(active: Any, *others: Any, shadows: tuple[Any, ...] = ()) -> Shelf:
        return Shelf(tuple(Shelved(probe.name, probe) for probe in (active, *others)), active, shadows)

    metrics.probes(shelf(one, two, shadows=(two,)))
    for probe, role in ((one, "active"), (two, "shadow"), (two, "named")):
        metrics.scored(scored_by(probe), role)
    seen = registry_page(metrics)
    info = [{"role": "active", "name": "one", "revision": one.revision}]
    info += [{"role": "shadow", "name": "two", "revision": two.revision}]
    assert [labels for labels, _ in seen.named("probe_info")] == info
    metrics.probes(shelf(newer))
    seen = registry_page(metrics)
    assert [labels for labels, _ in seen.named("probe_info")] == [info[0] | {"revision": newer.revision}]
    assert seen("detections_total", probe="one") == 1, "it is the same name"
    assert seen("detections_total", probe="two") == seen("score_probability_count", probe="two") == 0
    assert [*seen.named("detections_total", probe="two")] == []
    metrics.scored(scored_by(two), "named")
    assert registry_page(metrics)("detections_total", probe=OTHER) == 1, "a late answer of a probe that left"


def test_probes_may_leave_also_where_the_library_complains_of_labels_that_were_never_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As prometheus-client 0.21 does, with which this has to work."""
    there = MetricWrapperBase.remove

    def strict(metric: Any, *labels: str) -> None:
        if labels not in metric._metrics:
            raise KeyError(labels)
        there(metric, *labels)

    monkeypatch.setattr(MetricWrapperBase, "remove", strict)
    metrics = Metrics()
    metrics.probes(a_shelf("one", "fake-probe"))
    metrics.scored(scored_by(a_probe()), "active")
    with pytest.raises(KeyError):
        metrics._detections.remove("named", "fake-probe", "flagged")  # control
    metrics.probes(a_shelf("one"))
    assert [*registry_page(metrics).named("detections_total", probe="fake-probe")] == []
    metrics.probes(a_shelf("two"))
    assert registry_page(metrics)("probe_info", name="two") == 1


def test_each_rejected_revision_is_counted_once() -> None:
    metrics, active = Metrics(), a_probe("one")

    def load(*rejected: Rejected, torn: str = "") -> float:
        entries = [Shelved("one", active, "", (), rejected)]
        entries += [Shelved("torn", None, torn)] if torn else []
        metrics.probes(Shelf(tuple(entries), active))
        return registry_page(metrics)("probe_rejections_total")

    first, second = Rejected("aa", "its sha256 differs"), Rejected("bb", "its sha256 differs")
    assert load() == 0
    assert load(first) == 1
    assert load(first) == 1, "still the same"
    assert load(first, second, torn="no manifest") == 3
    assert registry_page(metrics)("probes", state="rejected") == 3
    assert load() == 3
    assert registry_page(metrics)("probes", state="rejected") == 0
    assert registry_page(metrics)("probes", state="sound") == 1
    assert load(first) == 4, "it came back"


def test_every_metric_is_named_and_explained(server: Running) -> None:
    families = list(text_string_to_metric_families(page_of(server.server.metrics_port)))
    assert len(families) > 15
    for family in families:
        assert family.name.startswith("lapwing_")
        assert len(family.documentation) > 15
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")


def test_two_servers_count_apart() -> None:
    with Running(metrics_port=0) as one, Running(metrics_port=0) as other:
        with grpc.insecure_channel(one.target) as channel:
            detector_pb2_grpc.DetectorStub(channel).Score(score("hello", "world"))
        one.settle()
        wait_until(lambda: page(one)("calls_total", method=SCORE) == 1)
        assert page(other)("calls_total", method=SCORE) == 0
