"""What fails inside of a call that ends well, and what waits, shows on the page of the metrics at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from attention_fakes import a_header, a_shadow, a_summary, requests, some_maps
from engine_fakes import PoisonError
from metrics_pages import BATCH, SCORE, page, registry_page, score
from service_fakes import WAIT, FakeEngine, Gate, Running, a_probe, a_shelf, refused, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.errors import CaptureError
from lapwing_server.forwards import Forwards
from lapwing_server.guard import Guard
from lapwing_server.metrics import ITEM_ERRORS, Metrics
from lapwing_server.parsing import Parser
from lapwing_server.refusal import TRANSLATION
from lapwing_server.shelf import Shelf, Shelved

SECRET = "what somebody wrote"


def item(prompt: str = "hello", response: str = "world") -> Any:
    return detector_pb2.ScoreItem(prompt={"text": prompt}, response={"text": response})


def test_items_that_fail_in_a_call_that_ends_well_are_counted_by_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lapwing.server")
    items = [item(), item(response=""), item("x" * 500), item("!"), item("!"), item()]
    with Running(FakeEngine(poison=ord("!")), metrics_port=0) as server:
        with grpc.insecure_channel(server.target) as channel:
            request = detector_pb2.ScoreBatchRequest(items=items)
            results = detector_pb2_grpc.DetectorStub(channel).ScoreBatch(request, timeout=WAIT).results
        server.settle()
        wait_until(lambda: page(server)("calls_total", method=BATCH, code="OK") == 1)
        seen = page(server)
    assert [one.HasField("error") for one in results] == [False, True, True, True, True, False]
    counted = {labels["reason"]: value for labels, value in seen.named("item_errors_total") if value}
    assert counted == {"INVALID_INPUT": 1, "TOO_LONG": 1, "INTERNAL": 2}
    [line] = [record for record in caplog.records if record.getMessage().endswith("ScoreBatch OK")]
    assert (vars(line)["items"], vars(line)["failed"]) == (6, 4)


def test_the_reasons_are_a_fixed_set() -> None:
    assert set(ITEM_ERRORS) == {"INTERNAL", *(reason for _, reason in TRANSLATION.values())}
    metrics = Metrics()
    before = registry_page(metrics).samples.keys()
    for reason in ITEM_ERRORS:
        metrics.item_failed(reason)
    assert registry_page(metrics).samples.keys() == before
    metrics.item_failed(SECRET)
    metrics.item_failed("another")
    assert registry_page(metrics)("item_errors_total", reason="other") == 2


def shadowed(shadows: int = 1) -> Shelf:
    """An active probe, and others beside it."""
    active = a_probe()
    others = tuple(replace(a_probe(f"quiet-{number}"), bias=-9.0) for number in range(shadows))
    entries = [Shelved(probe.name, probe) for probe in (active, *others)]
    return Shelf(tuple(sorted(entries, key=lambda entry: entry.name)), active, others)


class Shadowless(FakeEngine):
    """Writes, and fails when what was written is scored."""

    def score_ids(self, jobs: Any) -> Any:
        raise PoisonError(SECRET)


def test_a_shadow_that_fails_after_a_generation_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lapwing.server")
    request = detector_pb2.GenerateRequest(prompt={"text": "hello"}, max_new_tokens=3)
    with Running(Shadowless(), shelf=shadowed(2), metrics_port=0) as server:
        with grpc.insecure_channel(server.target) as channel:
            assert len(list(detector_pb2_grpc.DetectorStub(channel).Generate(request, timeout=WAIT))) == 4
        server.settle()
        seen = page(server)
    assert seen("shadow_skips_total", reason="failed") == 2
    assert seen("detections_total", role="shadow") == 0
    lines = [record for record in caplog.records if record.getMessage().endswith("in a shadow")]
    assert [vars(line)["error"] for line in lines] == ["PoisonError"] * 2, "with the other one, and alone"
    assert SECRET not in str([vars(line) for line in lines])


class ShadowsFail(FakeEngine):
    """Reads nothing that a shadow needs, too; or reads it, and the shadow alone has no score."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def score_ids(self, jobs: Any) -> Any:
        if not self.alone and any(job.shadows for job in jobs):
            raise PoisonError(SECRET)
        scored = super().score_ids(jobs)
        return [replace(one, shadows=tuple(CaptureError(SECRET) for _ in one.shadows)) for one in scored]


def active_says(stub: Any) -> list[float]:
    """The logits of a call and of the items of a batch."""
    alone = stub.Score(score("hello", "world"), timeout=WAIT).detection
    batch = detector_pb2.ScoreBatchRequest(items=[item(), item("zz", "zzzzzz"), item()])
    together = [one.detection for one in stub.ScoreBatch(batch, timeout=WAIT).results]
    assert all(one.HasField("logit") for one in (alone, *together))
    return [one.logit for one in (alone, *together)]


@pytest.mark.parametrize("alone", [True, False])
def test_a_shadow_that_fails_beside_the_active_probe_costs_it_nothing(
    alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with Running() as server, grpc.insecure_channel(server.target) as channel:
        expected = active_says(detector_pb2_grpc.DetectorStub(channel))
    with Running(ShadowsFail(alone), shelf=shadowed(2), metrics_port=0) as server:
        with grpc.insecure_channel(server.target) as channel:
            assert active_says(detector_pb2_grpc.DetectorStub(channel)) == expected
        server.settle()
        seen = page(server)
    assert seen("shadow_skips_total", reason="failed") == 4 * 2
    assert seen("detections_total", role="shadow") == 0
    assert seen("detections_total", role="active") == 4
    assert SECRET not in str([vars(record) for record in caplog.records if record.levelno >= logging.INFO])


def test_control_without_a_forward_of_its_own_the_active_probe_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def blame(forwards: Any, batch: Any, error: Any) -> None:
        for entry in batch:
            forwards._settle(entry, error)

    monkeypatch.setattr(Forwards, "_blame", blame)
    with Running(ShadowsFail(alone=False), shelf=shadowed()) as server, grpc.insecure_channel(server.target) as channel:
        told = refused(detector_pb2_grpc.DetectorStub(channel).Score, score("hello", "world"))
    assert told.reason == "INTERNAL"


@pytest.mark.parametrize("sent", [True, False])
def test_a_shadow_whose_heads_are_not_sent_is_counted(sent: bool) -> None:
    maps, active, shadow = some_maps(8), a_probe(), a_shadow()
    assert not active.selected[0, 0]
    assert shadow.selected[0, 0]
    maps[0, 0] = maps[0, 0] if sent else np.nan
    shelf = Shelf((Shelved(active.name, active), Shelved(shadow.name, shadow)), active, (shadow,))
    with Running(shelf=shelf, metrics_port=0) as server:
        with grpc.insecure_channel(server.target) as channel:
            stream = detector_pb2_grpc.DetectorStub(channel).ScoreAttention(requests(a_header(), a_summary(maps)))
            assert len(list(stream)) == 1
        seen = page(server)
    assert seen("shadow_skips_total", reason="not_sent") == (0 if sent else 1)
    assert seen("detections_total", role="shadow") == (1 if sent else 0)


def test_the_queue_is_as_long_as_it_is_when_somebody_looks() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate), metrics_port=0) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [stub.Score.future(score("hello", "world"))]
        assert gate.reached.wait(WAIT)
        assert page(server)("queue_items") == 0, "it is being scored"
        calls += [stub.Score.future(score("hello", "world")) for _ in range(20)]
        server.queued(20)
        assert page(server)("queue_items") == 20
        for call in calls[1:8]:
            call.cancel()
        server.queued(13)
        assert page(server)("queue_items") == 13
        gate.open()
        for call in [calls[0], *calls[8:]]:
            call.result(WAIT)
        assert page(server)("queue_items") == 0


@contextmanager
def guarded(**handlers: Any) -> Iterator[tuple[grpc.Channel, Metrics]]:
    """Handlers of methods of ours, inside of the guard."""
    metrics, parser = Metrics(), Parser()

    async def start() -> tuple[Any, int]:
        server, guard = grpc.aio.server(), Guard(metrics, parser=parser)
        server.add_generic_rpc_handlers((guard,))
        guard.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("lapwing.v1.Detector", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    with Running() as running:  # for its loop
        server, port = running.call(start())
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel, metrics
        finally:
            running.call(server.stop(None))
            parser.close()


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK, None])
@pytest.mark.parametrize("stream", [False, True])
def test_the_code_that_a_handler_set_is_the_one_that_is_counted(code: grpc.StatusCode | None, stream: bool) -> None:
    async def one(request: Any, context: Any) -> bytes:
        if code is not None:
            context.set_code(code)
        return b""

    async def several(request: Any, context: Any) -> Any:
        yield b""
        await one(request, context)

    kind = grpc.unary_stream_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler
    with guarded(Score=kind(several if stream else one)) as (channel, metrics):
        call = (channel.unary_stream if stream else channel.unary_unary)(f"/{SCORE}")
        try:
            answer = call(b"", timeout=WAIT)
            list(answer)
            told = "OK"
        except grpc.RpcError as error:
            told = error.code().name  # type: ignore[attr-defined]
        wait_until(lambda: registry_page(metrics)("calls_total") == 1)
        [(labels, _)] = registry_page(metrics).named("calls_total")
    assert labels["code"] == told == (code.name if code else "OK")


def test_there_is_no_moment_without_an_active_probe() -> None:
    """Whoever reads between any two changes of the metric sees one."""
    metrics = Metrics()
    seen: list[int] = []

    def looking(function: Any) -> Any:
        def change(*arguments: Any) -> Any:
            seen.append(len(list(registry_page(metrics).named("probe_info", role="active"))))
            done = function(*arguments)
            seen.append(len(list(registry_page(metrics).named("probe_info", role="active"))))
            return done

        return change

    metrics.probes(a_shelf("one"))
    for name in ("labels", "remove", "clear"):
        setattr(metrics._info, name, looking(getattr(metrics._info, name)))
    for shelf in (a_shelf("one"), a_shelf("two"), shadowed()):
        metrics.probes(shelf)
    assert len(seen) > 6
    assert min(seen) == 1
    active = {labels["name"] for labels, _ in registry_page(metrics).named("probe_info", role="active")}
    assert active == {"fake-probe"}
