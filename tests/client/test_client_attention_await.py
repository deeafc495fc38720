"""Streams of attention, for programs that await."""

from __future__ import annotations

import asyncio

import pytest
from attention_fakes import local_score, some_maps
from attention_sending import (
    KNOWN,
    MAPS,
    awaited,
    places_taken,
    rows_chunk,
    send_again_and_again_async,
    some_chunks,
    summary_chunk,
)
from engine_fakes import an_identity
from service_fakes import WAIT, Gate, Running

from lapwing_client import AsyncClient, Cancelled, Detection, InvalidRequest, LapwingError, Unavailable
from lapwing_client.attention_stream import AsyncAttentionStream


def test_the_same_for_programs_that_await(server: Running) -> None:
    async def work(client: AsyncClient) -> list[Detection]:
        found = [await client.score_attention(some_chunks(), model=an_identity(), prompt_tokens=2)]
        async with client.attention_stream(**KNOWN) as stream:
            assert (await stream.score_now()).reason == "TOO_SHORT"
            await stream.send(summary_chunk(MAPS, 0, 6))
            running = await stream.score_now()
            assert running.logit == pytest.approx(local_score(MAPS[:, :, :6, :6]), abs=1e-4)
            await stream.send(summary_chunk(MAPS, 6))
            found.append(await stream.finish())
            assert await stream.finish() is found[-1]
            with pytest.raises(InvalidRequest, match="after finish"):
                await stream.send(summary_chunk())
        return found

    for detection in awaited(work, server.target):
        assert detection.logit == pytest.approx(local_score(MAPS), abs=1e-5)


def test_awaiting_the_same_errors(server: Running) -> None:
    async def refused(client: AsyncClient) -> LapwingError:
        async with client.attention_stream(**KNOWN) as stream:
            with pytest.raises(LapwingError) as caught:
                await send_again_and_again_async(stream, summary_chunk(2 * MAPS))
            with pytest.raises(InvalidRequest):
                await stream.finish()
            return caught.value

    error = awaited(refused, server.target)
    assert (type(error), error.field) == (InvalidRequest, "summary.diagonal")

    async def left(client: AsyncClient) -> None:
        async with client.attention_stream(**KNOWN) as stream:
            await stream.send(summary_chunk(MAPS, 0, 6))
            await stream.score_now()
        with pytest.raises(Cancelled):
            await stream.send(summary_chunk(MAPS, 6))
        with pytest.raises(InvalidRequest):
            client.attention_stream(**KNOWN | {"heads": None})

    awaited(left, server.target)
    assert places_taken(server) == 0

    async def failed(client: AsyncClient) -> AsyncAttentionStream:
        stream = client.attention_stream(**KNOWN)
        await stream.send(summary_chunk(MAPS, 0, 6))
        with pytest.raises(ZeroDivisionError):
            async with stream:
                raise ZeroDivisionError
        with pytest.raises(Cancelled):
            await stream.send(summary_chunk(MAPS, 6))
        return stream

    awaited(failed, server.target)
    assert places_taken(server) == 0


def test_awaiting_nobody() -> None:
    async def work(client: AsyncClient) -> None:
        with pytest.raises(Unavailable):
            await client.score_attention(some_chunks(), model=an_identity(), prompt_tokens=2)

    awaited(work, "127.0.0.1:1")


def test_awaiting_senders_wait_for_the_server(server: Running) -> None:
    chunk, gate, sent = rows_chunk(some_maps(200)), Gate(), []

    async def work(client: AsyncClient) -> None:
        async def send_all() -> None:
            async with client.attention_stream(**KNOWN) as stream:
                with pytest.raises(InvalidRequest):
                    await send_again_and_again_async(stream, chunk, sent)

        task = asyncio.create_task(send_all())
        counts: list[int] = []
        while len(counts) < 40 or len(set(counts[-40:])) > 1:
            counts.append(len(sent))
            await asyncio.sleep(0.005)
        assert len(sent) < 20, "a million are there to be sent"
        gate.open()
        await asyncio.wait_for(task, WAIT)

    server.begin(server.server._reader.run(gate))
    assert gate.reached.wait(WAIT)
    awaited(work, server.target)
