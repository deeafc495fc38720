"""What the tests of attention streams send, and how."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from attention_fakes import HEADS, LAYERS, Maps, some_maps, summary_of
from engine_fakes import an_identity
from service_fakes import WAIT, Running

from lapwing_client import AsyncClient
from lapwing_client.attention_stream import AsyncAttentionStream, AttentionStream
from lapwing_detector.chunks import AttentionChunk, AttentionChunks

TOKENS = 13
MAPS = some_maps(TOKENS)
KNOWN: dict[str, Any] = {"model": an_identity(), "layers": LAYERS, "heads": HEADS, "prompt_tokens": 2}


def summary_chunk(maps: Maps = MAPS, first: int = 0, last: int | None = None) -> AttentionChunk:
    last = maps.shape[2] if last is None else last
    rows = maps[:, :, first:last, :last]
    return AttentionChunk(0, 0, first, np.ascontiguousarray(np.diagonal(rows, first, 2, 3)), rows.sum(axis=2))


def rows_chunk(maps: Maps = MAPS, first: int = 0, last: int | None = None, **changes: Any) -> dict[str, Any]:
    last = maps.shape[2] if last is None else last
    chunk = {"first_layer": 0, "first_head": 0, "first_token": first, "weights": maps[:, :, first:last, :last]}
    return chunk | changes


def some_chunks(max_bytes: int = 2**20) -> AttentionChunks:
    """As a capture gives them out."""
    summary = summary_of(MAPS)
    return AttentionChunks(LAYERS, HEADS, 0, TOKENS, False, summary.diagonal, summary.received, max_bytes)


def coarse_chunk() -> dict[str, Any]:
    """Rows in float16, with the diagonal in float32."""
    return rows_chunk(MAPS.astype(np.float16), diagonal=summary_chunk().diagonal)


def send_again_and_again(stream: AttentionStream, chunk: Any, sent: list[Any] | None = None) -> None:
    """Until it is refused; the second time already it is not the next one, but that takes time to be told."""
    for _ in range(10**6):
        stream.send(chunk)
        if sent is not None:
            sent.append(chunk)


async def send_again_and_again_async(stream: AsyncAttentionStream, chunk: Any, sent: list[Any] | None = None) -> None:
    for _ in range(10**6):
        await stream.send(chunk)
        if sent is not None:
            sent.append(chunk)


def places_taken(server: Running) -> int:
    server.settle()
    return server.server.scheduler.places.taken


def awaited(work: Callable[[AsyncClient], Any], target: str) -> Any:
    async def main() -> Any:
        async with AsyncClient(target, timeout=WAIT) as client:
            return await work(client)

    return asyncio.run(main())
