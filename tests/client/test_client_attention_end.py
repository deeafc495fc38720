"""Streams of attention: how they end, well or not."""

from __future__ import annotations

import threading

import pytest
from attention_fakes import some_maps
from attention_sending import (
    KNOWN,
    MAPS,
    awaited,
    places_taken,
    rows_chunk,
    send_again_and_again,
    send_again_and_again_async,
    some_chunks,
    summary_chunk,
)
from engine_fakes import an_identity
from service_fakes import WAIT, Gate, Running, wait_until

from lapwing_client import AsyncClient, Cancelled, Client, DeadlineExceeded, InvalidRequest, LapwingError


def test_after_the_end_nothing_more_is_sent(client: Client) -> None:
    with client.attention_stream(**KNOWN) as stream:
        stream.send(summary_chunk())
        first = stream.finish()
        assert stream.finish() is first
        with pytest.raises(InvalidRequest, match="after finish"):
            stream.send(summary_chunk())
        with pytest.raises(InvalidRequest, match="after finish"):
            stream.score_now()


@pytest.mark.parametrize("how", ["leave", "error", "drop"])
def test_a_stream_that_is_left_is_over_for_the_server(server: Running, client: Client, how: str) -> None:
    stream = client.attention_stream(**KNOWN)
    stream.send(summary_chunk(MAPS, 0, 6))
    stream.score_now()
    assert server.server.scheduler.places.taken == 1
    if how == "error":
        with pytest.raises(KeyError), stream:
            raise KeyError
    elif how == "leave":
        with stream:
            pass
    if how != "drop":
        with pytest.raises(Cancelled):
            stream.send(summary_chunk(MAPS, 6))
    before = threading.active_count()
    del stream
    assert places_taken(server) == 0
    wait_until(lambda: threading.active_count() <= before)


def test_a_finished_stream_is_one_that_went_well(server: Running, client: Client) -> None:
    def ended(code: str) -> float:
        labels = {"method": "lapwing.v1.Detector/ScoreAttention", "code": code}
        return server.server.metrics.registry.get_sample_value("lapwing_calls_total", labels) or 0.0

    server.settle()
    well, cancelled = ended("OK"), ended("CANCELLED")
    for _ in range(20):
        client.score_attention(some_chunks(), model=an_identity(), prompt_tokens=2)
    server.settle()
    assert (ended("OK") - well, ended("CANCELLED") - cancelled) == (20, 0)


def test_a_stream_that_is_left_is_never_taken_for_one_that_is_whole(server: Running, client: Client) -> None:
    """All rows have come, and leaving ends the messages, too; only `finish` says that they are all."""

    def scored() -> float:
        labels = {"role": "active", "probe": "fake-probe"}
        return server.server.metrics.registry.get_sample_value("lapwing_score_probability_count", labels) or 0.0

    server.settle()
    before = scored()
    for _ in range(30):
        with client.attention_stream(**KNOWN) as stream:
            stream.send(rows_chunk())
            stream.score_now()
        stream = client.attention_stream(**KNOWN)
        stream.send(rows_chunk())
        with pytest.raises(ZeroDivisionError), stream:
            raise ZeroDivisionError
    server.settle()
    assert scored() == before
    with client.attention_stream(**KNOWN) as stream:
        stream.send(rows_chunk())
        assert stream.finish().logit
    server.settle()
    assert scored() == before + 1, "control"


def test_a_stream_has_one_deadline(client: Client) -> None:
    with client.attention_stream(**KNOWN, timeout=0.2) as stream:
        stream.send(summary_chunk(MAPS, 0, 6))
        threading.Event().wait(0.3)
        with pytest.raises(DeadlineExceeded, match="must also hold the time in which the model writes; give timeout="):
            stream.score_now()


def send_until_the_deadline(client: Client) -> None:
    with client.attention_stream(**KNOWN, timeout=0.5) as stream:
        send_again_and_again(stream, rows_chunk(some_maps(200)))


def finish_until_the_deadline(client: Client) -> None:
    with client.attention_stream(**KNOWN, timeout=0.5) as stream:
        stream.send(summary_chunk())
        stream.finish()


async def await_the_deadline(client: AsyncClient) -> None:
    async with client.attention_stream(**KNOWN, timeout=0.5) as stream:
        await send_again_and_again_async(stream, rows_chunk(some_maps(200)))


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_the_deadline(server: Running, client: Client) -> None:
    """It took the call, and reads nothing: neither who sends nor who waits for the score hangs."""
    gate = Gate()
    server.begin(server.server._reader.run(gate))
    assert gate.reached.wait(WAIT)
    for wait in (send_until_the_deadline, finish_until_the_deadline):
        with pytest.raises(DeadlineExceeded, match="give timeout="):
            wait(client)
    with pytest.raises(DeadlineExceeded, match="give timeout="):
        awaited(await_the_deadline, server.target)
    gate.open()
    assert places_taken(server) == 0


def test_a_server_that_dies_is_noticed() -> None:
    with (
        Running() as server,
        Client(server.target, timeout=WAIT) as client,
        client.attention_stream(**KNOWN) as stream,
    ):
        stream.send(summary_chunk(MAPS, 0, 6))
        stream.score_now()
        server.begin(server.server._grpc.stop(None))
        with pytest.raises(LapwingError):
            send_again_and_again(stream, summary_chunk(MAPS, 6))
