"""The embedded model behind the server: a score does not depend on how it was asked for, nor on who else asks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from service_fakes import WAIT, Running, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detector import Detector
from lapwing_server.engine import Loaded
from lapwing_server.limits import Limits
from lapwing_server.shelf import Shelf, Shelved

TOLERANCE = 1e-5
"""Of the logit: float32, and the same forward but for its padding."""

RUNNING_TOLERANCE = 1e-4
"""Of the logit: token by token against one forward, in float32."""

CLIENTS = 8

HOT = 100.0
"""A temperature at which it seldom ends an answer by itself: at 1 it says a few tokens."""


@pytest.fixture(scope="module")
def detector() -> Iterator[Detector]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other are slow where other tests have the cores
    yield Detector.from_pretrained()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server(detector: Detector) -> Iterator[Running]:
    shelf = Shelf((Shelved(detector.probe.name, detector.probe, ""),), detector.probe)
    limits = Limits(generate_streams=CLIENTS, streams_per_client=CLIENTS, batch_tokens=1024)
    with Running(detector, load=lambda: Loaded(detector, shelf), limits=limits) as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture(scope="module")
def stub(server: Running) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield detector_pb2_grpc.DetectorStub(channel)


def sequences(detector: Detector, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of random ids and many lengths."""
    generator = random.Random(11)
    size = detector.language_model.vocabulary

    def ids(length: int) -> list[int]:
        return [generator.randrange(3, size) for _ in range(length)]

    return [(ids(generator.randrange(2, 40)), ids(generator.choice([1, 3, 10, 60, 150]))) for _ in range(count)]


def item(prompt: list[int], response: list[int]) -> detector_pb2.ScoreItem:
    return detector_pb2.ScoreItem(prompt={"token_ids": prompt}, response={"token_ids": response})


def logit(stub: Any, prompt: Any, response: Any) -> float:
    message = detector_pb2.ScoreRequest(prompt={"token_ids": prompt}, response={"token_ids": response})
    detection = stub.Score(message, timeout=WAIT).detection
    assert list(detection.token_ids) == [*prompt, *response]
    return float(detection.logit)


def test_alone_in_a_batch_and_among_others_a_score_is_that_of_the_library(detector: Detector, stub: Any) -> None:
    asked = sequences(detector, 24)
    expected = [detector.score(prompt, response).logit for prompt, response in asked]
    alone = [logit(stub, *one) for one in asked]
    together = stub.ScoreBatch(detector_pb2.ScoreBatchRequest(items=[item(*one) for one in asked]), timeout=WAIT)
    with ThreadPoolExecutor(16) as pool:
        concurrent = list(pool.map(lambda one: logit(stub, *one), asked))
    assert alone == pytest.approx(expected, abs=TOLERANCE)
    assert [one.detection.logit for one in together.results] == pytest.approx(expected, abs=TOLERANCE)
    assert concurrent == pytest.approx(expected, abs=TOLERANCE)


def test_control_the_scores_are_not_all_alike(detector: Detector) -> None:
    logits = [detector.score(prompt, response).logit for prompt, response in sequences(detector, 8)]
    assert np.ptp(np.array(logits)) > 100 * RUNNING_TOLERANCE


def test_shares_add_up_to_the_logit(detector: Detector, stub: Any) -> None:
    for prompt, response in sequences(detector, 4):
        message = detector_pb2.ScoreRequest(prompt={"token_ids": prompt}, response={"token_ids": response})
        found = stub.Score(message).detection
        tokens = np.frombuffer(found.token_contributions.data, "<f4").sum()
        assert tokens + found.bias == pytest.approx(found.logit, abs=1e-5)
        heads = found.heads_contribution + sum(found.statistic_contributions.values())
        assert heads + found.bias == pytest.approx(found.logit, abs=1e-5)


def events(stub: Any, seed: int, **options: Any) -> list[Any]:
    request = detector_pb2.GenerateRequest(
        prompt={"text": f"Where is number {seed} at home?"}, temperature=HOT, seed=seed, contributions=True, **options
    )
    return list(stub.Generate(request, timeout=WAIT))


def test_a_running_score_is_the_score_of_its_prefix_while_others_come_and_go(stub: Any) -> None:
    lengths = [3, 40, 11, 25, 7, 60, 18, 33, 5, 50, 22, 14]
    with ThreadPoolExecutor(CLIENTS) as pool:
        streams = list(pool.map(lambda i: events(stub, i, max_new_tokens=lengths[i]), range(len(lengths))))
    tokens_written = sum(len(one[-1].generation.token_ids) for one in streams)
    assert tokens_written > sum(lengths) / 2, "control: they were at it together for long"
    compared = 0
    for *tokens, last in streams:
        generation = last.generation
        prompt, written = list(generation.prompt_token_ids), list(generation.token_ids)
        for event in tokens[:: max(1, len(tokens) // 4)]:
            token = event.token
            if token.HasField("logit"):
                prefix = written[: token.index + 1]
                assert token.logit == pytest.approx(logit(stub, prompt, prefix), abs=RUNNING_TOLERANCE)
                shares = np.frombuffer(token.token_contributions.data, "<f4")
                assert len(shares) == len(prompt) + len(prefix)
                assert shares.sum() + generation.detection.bias == pytest.approx(token.logit, abs=1e-4)
                compared += 1
        if written:
            assert generation.detection.logit == pytest.approx(logit(stub, prompt, written), abs=RUNNING_TOLERANCE)
    assert compared > len(lengths)


def test_a_stream_writes_the_same_alone_as_among_others(stub: Any) -> None:
    alone = [events(stub, seed, max_new_tokens=20)[-1].generation for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = [
            one[-1].generation for one in pool.map(lambda seed: events(stub, seed, max_new_tokens=20), range(4))
        ]
    assert [list(one.token_ids) for one in together] == [list(one.token_ids) for one in alone]
    logits = [one.detection.logit for one in alone]
    assert [one.detection.logit for one in together] == pytest.approx(logits, abs=RUNNING_TOLERANCE)


def test_a_client_that_leaves_ends_its_stream_alone(server: Running, stub: Any) -> None:
    request = detector_pb2.GenerateRequest(prompt={"text": "Where is it?"}, temperature=HOT, seed=5, max_new_tokens=60)
    expected = list(stub.Generate(request, timeout=WAIT))[-1].generation
    staying, leaving = stub.Generate(request, timeout=WAIT), stub.Generate(request, timeout=WAIT)
    next(leaving)
    leaving.cancel()
    found = list(staying)[-1].generation
    assert list(found.token_ids) == list(expected.token_ids)
    assert found.detection.logit == pytest.approx(expected.detection.logit, abs=RUNNING_TOLERANCE)
    wait_until(lambda: server.server.scheduler.in_flight == 0)
