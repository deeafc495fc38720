"""The requests of the serving benchmark: through the stubs alone, so that what is measured is the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from serving_load import Call, percentile

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc

CITIES = ("Lyon", "Cairo", "Santa Cruz de la Sierra", "Ho Chi Minh City", "Medellin", "Kanpur", "Songjiang", "Durban")
PROMPTS = tuple(f"Question: which country is the city of {city} in? Answer:" for city in CITIES)
RESPONSE = " The city lies in the south of Peru, near the sea."
NEW_TOKENS = 64
HOT = 100.0
"""Temperature at which every token is about as likely as any other, so that responses are long."""

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]


def score_request(number: int) -> detector_pb2.ScoreRequest:
    """One of several answers to one of several questions, of different lengths."""
    return detector_pb2.ScoreRequest(
        prompt=detection_pb2.Prompt(text=PROMPTS[number % len(PROMPTS)]), response=detection_pb2.Response(text=RESPONSE)
    )


def generate_request(number: int) -> detector_pb2.GenerateRequest:
    """Random tokens after one of several questions."""
    prompt = detection_pb2.Prompt(text=PROMPTS[number % len(PROMPTS)])
    return detector_pb2.GenerateRequest(prompt=prompt, max_new_tokens=NEW_TOKENS, temperature=HOT, seed=number)


def scoring(channel: grpc.aio.Channel, timeout: float = 60.0) -> Call:
    """Score, with a deadline."""
    stub = detector_pb2_grpc.DetectorStub(channel)  # type: ignore[no-untyped-call]
    return lambda number: stub.Score(score_request(number), timeout=timeout)


def generating(channel: grpc.aio.Channel, tokens: list[int], first: list[float]) -> Call:
    """Generate, read to its end; counts its tokens and keeps the seconds to the first."""
    stub = detector_pb2_grpc.DetectorStub(channel)  # type: ignore[no-untyped-call]

    async def generate(number: int) -> None:
        sent, count = time.perf_counter(), 0
        async for event in stub.Generate(generate_request(number), timeout=120):
            if event.WhichOneof("event") == "token":
                if count == 0:
                    first.append(time.perf_counter() - sent)
                count += 1
        tokens.append(count)

    return generate


def empty_calls(target: str, threads: int, seconds: float) -> tuple[float, float]:
    """(calls per second, p50 milliseconds) of GetServerInfo by blocking clients in threads that share a channel."""
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(threads) as pool:
        stub = detector_pb2_grpc.DetectorStub(channel)  # type: ignore[no-untyped-call]
        request = detector_pb2.GetServerInfoRequest()
        stub.GetServerInfo(request)
        ends = time.perf_counter() + seconds

        def client(_: int) -> list[float]:
            spent = []
            while (sent := time.perf_counter()) < ends:
                stub.GetServerInfo(request)
                spent.append(time.perf_counter() - sent)
            return spent

        spent = [one for found in pool.map(client, range(threads)) for one in found]
        return len(spent) / seconds, percentile(spent, 50) * 1000


def heatmap_ms(target: str, times: int) -> float:
    """p50 milliseconds of a heatmap of 32 x 32 heads as PNG."""
    with grpc.insecure_channel(target) as channel:
        stub = probes_pb2_grpc.ProbesStub(channel)  # type: ignore[no-untyped-call]
        request = probes_pb2.GetHeatmapRequest(
            statistic=probes_pb2.STATISTIC_P_VALUE, image_format=probes_pb2.IMAGE_FORMAT_PNG
        )

        def once() -> float:
            sent = time.perf_counter()
            assert len(stub.GetHeatmap(request).image) > 1000
            return time.perf_counter() - sent

        once()
        return percentile([once() for _ in range(times)], 50) * 1000


async def watching(target: str, until: asyncio.Event) -> list[float]:
    """Seconds of one health check after another, a twentieth of a second apart."""
    spent = []
    async with grpc.aio.insecure_channel(target) as channel:
        check: Callable[..., Any] = channel.unary_unary("/grpc.health.v1.Health/Check")
        while not until.is_set():
            sent = time.perf_counter()
            await check(b"", timeout=10)
            spent.append(time.perf_counter() - sent)
            await asyncio.sleep(0.05)
    return spent
