"""The embedded model behind the server: who leaves stops it within a token, and what waited is never computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from service_fakes import WAIT, Gate, Running
from test_server_same_scores import HOT
from test_server_same_scores import detector as detector

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detector import Detector
from lapwing_server.engine import Loaded
from lapwing_server.shelf import Shelf, Shelved

PROMPT = "Question: which country is the city of Lyon in? Answer:"
WRITE = detector_pb2.GenerateRequest(prompt={"text": PROMPT}, max_new_tokens=12, temperature=HOT, seed=3)
SCORE = detector_pb2.ScoreRequest(prompt={"text": PROMPT}, response={"text": " Lyon is in France."})
FREE = 1 + 3
"""Forwards that pass: the prompt, and three tokens."""


class Held:
    """Counts the forwards of a model, and holds them from a certain one on."""

    def __init__(self, free: int) -> None:
        self.gate, self.begun = Gate(), 0
        self._free, self._lock = free, threading.Lock()

    def __call__(self, *_: Any) -> None:
        with self._lock:
            self.begun += 1
            passes = self.begun <= self._free
        if not passes:
            self.gate()


@contextmanager
def held(detector: Detector, free: int = FREE) -> Iterator[Held]:
    found = Held(free)
    hook = detector.model.register_forward_pre_hook(found)
    try:
        yield found
    finally:
        found.gate.open()
        hook.remove()


@pytest.fixture(scope="module")
def server(detector: Detector) -> Iterator[Running]:
    shelf = Shelf((Shelved(detector.probe.name, detector.probe, ""),), detector.probe)
    with Running(detector, load=lambda: Loaded(detector, shelf)) as running:  # type: ignore[arg-type]
        yield running


@pytest.mark.parametrize("leaves", [True, False])
def test_who_leaves_stops_the_model_within_a_token(server: Running, detector: Detector, leaves: bool) -> None:
    with held(detector) as model, grpc.insecure_channel(server.target) as channel:
        call = detector_pb2_grpc.DetectorStub(channel).Generate(WRITE, timeout=WAIT)
        assert model.gate.reached.wait(WAIT), "the fourth token is being computed"
        if leaves:  # else it is the control
            call.cancel()
            server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        model.gate.open()
        written = 4 if leaves else len(list(call)) - 1
        server.settle()
        assert model.begun == 1 + written, "one forward for the prompt, and one for each token"
        assert (written > 4) != leaves


@pytest.mark.parametrize("leaves", [True, False])
def test_what_waits_is_not_computed_once_its_client_left(server: Running, detector: Detector, leaves: bool) -> None:
    with held(detector, 0) as model, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        first = stub.Score.future(SCORE, timeout=WAIT)
        assert model.gate.reached.wait(WAIT)
        second = stub.Score.future(SCORE, timeout=WAIT)
        server.queued(1)
        if leaves:
            second.cancel()
            server.queued(0)
        model.gate.open()
        assert first.result(WAIT).detection.HasField("probability")
        server.settle()
        assert model.begun == (1 if leaves else 2)
