"""Streams of a real, tiny model behind the server: one whose forward fails ends alone, and the others as ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch
from service_fakes import WAIT, Gate, Running, told, wait_until
from test_server_real import detector as detector

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detector import Detector
from lapwing_detector.groups import failed
from lapwing_detector.streams import Streams
from lapwing_server.engine import Loaded
from lapwing_server.shelf import Shelf, Shelved

TOKENS = 8
SEEDS = (1, 2, 3, 4)
VICTIM = 1
SAME = 1e-5
"""float32."""


@contextmanager
def watched(model: torch.nn.Module, poison: int | None) -> Iterator[list[int]]:
    """How many rows every forward has; those fail that feed the poison as the only token of a row."""
    rows: list[int] = []

    def before(_: Any, __: Any, kwargs: dict[str, torch.Tensor]) -> None:
        ids = kwargs["input_ids"]
        rows.append(len(ids))
        if ids.shape[1] == 1 and poison in ids.flatten().tolist():
            raise MemoryError("none left")

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


@pytest.fixture
def server(detector: Detector) -> Iterator[Running]:
    shelf = Shelf((Shelved(detector.probe.name, detector.probe, ""),), detector.probe)
    with Running(detector, load=lambda: Loaded(detector, shelf)) as server:  # type: ignore[arg-type]
        yield server


def written(server: Running, seeds: Sequence[int]) -> list[list[Any]]:
    """The events of generations that begin together, and the error where one ended with it."""
    busy = Gate()
    server.server.worker.post(busy)
    with grpc.insecure_channel(server.target) as channel, ThreadPoolExecutor(len(seeds)) as pool:
        stub = detector_pb2_grpc.DetectorStub(channel)

        def write(seed: int) -> list[Any]:
            prompt = {"text": f"Once upon a time, {seed}"}
            options = {"max_new_tokens": TOKENS, "temperature": 1.0, "seed": seed}
            events: list[Any] = []
            try:
                events.extend(stub.Generate(detector_pb2.GenerateRequest(prompt=prompt, **options), timeout=WAIT))
            except grpc.RpcError as error:
                events.append(error)
            return events

        answers = [pool.submit(write, seed) for seed in seeds]
        wait_until(lambda: server.server.scheduler.in_flight == len(seeds))
        busy.open()
        return [answer.result(WAIT) for answer in answers]


def all_at_once(streams: Streams, group: Any, error: Exception) -> Iterator[Any]:
    """What does not look whose fault it was."""
    streams._groups.remove(group)
    yield from (failed(stream, error) for stream in group.streams)


@pytest.mark.parametrize("looks", [True, False])
def test_a_running_stream_that_fails_is_nobody_elses_fault(
    server: Running, detector: Detector, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody looks whose fault it was, which is the control, all others end, too."""
    undisturbed = written(server, SEEDS)
    ids = [list(events[-1].generation.token_ids) for events in undisturbed]
    assert all(len(one) == TOKENS for one in ids)
    others = {token for place, one in enumerate(ids) if place != VICTIM for token in one}
    poison = next(token for token in ids[VICTIM][2:] if token not in others | set(ids[VICTIM][:2]))
    if not looks:
        monkeypatch.setattr(Streams, "_advance_apart", all_at_once)
    with watched(detector.model, poison) as rows:
        disturbed = written(server, SEEDS)
    assert max(rows) == len(SEEDS), "they share forwards"
    for place, (events, before) in enumerate(zip(disturbed, undisturbed, strict=True)):
        if place == VICTIM or not looks:
            refusal = told(events[-1])
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert refusal.error_id
            before = before[: len(events) - 1]
            assert 0 < len(before) < TOKENS
            events = events[:-1]
        assert len(events) == len(before)
        for one, other in zip(events, before, strict=True):
            assert (one.token.token_id, one.token.text) == (other.token.token_id, other.token.text)
            assert one.token.logit == pytest.approx(other.token.logit, abs=SAME)
            assert one.generation.detection.logit == pytest.approx(other.generation.detection.logit, abs=SAME)
    server.settle()
    assert server.server.scheduler.in_flight == 0
