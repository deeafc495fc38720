"""Streams of attention: anything with a buffer goes, in messages of bounded size, and never far ahead of the server."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attention_fakes import FLOAT16, HEADS, LAYERS, Maps, local_score, some_maps, summary_of
from engine_fakes import an_identity
from service_fakes import WAIT, Gate, Running, wait_until

from lapwing_client import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    Detection,
    InvalidRequest,
    LapwingError,
    PreconditionFailed,
    Unavailable,
    attention_messages,
)
from lapwing_client.attention_messages import PIECE_BYTES, slice_requests
from lapwing_client.attention_stream import AsyncAttentionStream, AttentionStream
from lapwing_detector.chunks import AttentionChunk, AttentionChunks

TOKENS = 13
MAPS = some_maps(TOKENS)
KNOWN: dict[str, Any] = {"model": an_identity(), "layers": LAYERS, "heads": HEADS, "prompt_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    with Client(server.target, timeout=WAIT) as client:
        yield client


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


# What goes.


def in_a_buffer(values: Any) -> memoryview:
    """The same without numpy, as an array of another library would have it."""
    return memoryview(array("f", values.ravel().tolist())).cast("B").cast("f", values.shape)


SENT: dict[str, Callable[[], list[Any]]] = {
    "a frozen value": lambda: [summary_chunk()],
    "a mapping": lambda: [vars(summary_chunk())],
    "rows": lambda: [rows_chunk()],
    "an object with rows": lambda: [SimpleNamespace(**rows_chunk())],
    "blocks of both ends": lambda: [summary_chunk(MAPS, 0, 6), summary_chunk(MAPS, 6)],
    "rows and their diagonal": lambda: [rows_chunk(diagonal=summary_chunk().diagonal)],
    "row by row": lambda: [rows_chunk(MAPS, row, row + 1) for row in range(TOKENS)],
    "another library's": lambda: [rows_chunk(weights=in_a_buffer(MAPS))],
    "columns first": lambda: [rows_chunk(weights=np.asfortranarray(MAPS))],
    "numpy's numbers": lambda: [rows_chunk(first_token=np.int64(0), first_head=np.int32(0))],
    "a capture's": lambda: list(some_chunks(1000)),
}


@pytest.mark.parametrize("chunks", SENT.values(), ids=SENT.keys())
def test_anything_with_a_buffer_is_scored_as_by_the_library(client: Client, chunks: Callable[[], list[Any]]) -> None:
    with client.attention_stream(**KNOWN) as stream:
        for chunk in chunks():
            stream.send(chunk)
        detection = stream.finish()
    assert detection.logit == pytest.approx(local_score(MAPS), abs=1e-5)  # float32
    assert (detection.prompt_tokens, detection.response_tokens) == (2, TOKENS - 2)


def test_float16_rows_are_near(client: Client) -> None:
    detection = client.score_attention([rows_chunk(MAPS.astype(np.float16))], **KNOWN)
    assert detection.logit == pytest.approx(local_score(MAPS), abs=FLOAT16)
    assert detection.logit != local_score(MAPS)


def test_what_chunks_know_need_not_be_said(client: Client) -> None:
    detection = client.score_attention(some_chunks(), model=an_identity(), prompt_tokens=2)
    assert detection.logit == pytest.approx(local_score(MAPS), abs=1e-5)
    with pytest.raises(InvalidRequest) as caught:
        client.score_attention(list(some_chunks()), model=an_identity(), prompt_tokens=2)
    assert caught.value.field == "layers"
    with pytest.raises(InvalidRequest, match=r"begin at row 6.*captured\.chunks\(from_start=True\)"):
        client.score_attention(SimpleNamespace(first_token=6), **KNOWN)  # type: ignore[arg-type]


def test_a_part_of_what_the_chunks_say_is_not_scored(client: Client) -> None:
    class Cut(SimpleNamespace):
        def __iter__(self) -> Iterator[Any]:
            return iter([summary_chunk(MAPS, 0, 6)])

    with pytest.raises(InvalidRequest) as caught:
        client.score_attention(Cut(tokens=TOKENS), **KNOWN)  # type: ignore[arg-type]
    assert caught.value.reason == "INCOMPLETE"


def test_the_servers_own_identity_will_do(client: Client) -> None:
    identity = client.server_info().model
    assert identity is not None
    for model in (identity, identity.to_dict(), an_identity().to_dict()):
        assert client.score_attention(some_chunks(), model=model, prompt_tokens=2).logit


def test_running_scores(client: Client) -> None:
    with client.attention_stream(**KNOWN) as stream:
        assert stream.score_now().reason == "TOO_SHORT"
        for row in range(TOKENS):
            stream.send(rows_chunk(MAPS, row, row + 1))
            running = stream.score_now()
            if row >= 2:
                prefix = MAPS[:, :, : row + 1, : row + 1]
                assert running.logit == pytest.approx(local_score(prefix), abs=1e-4)
        assert stream.finish().logit == running.logit


# What does not go.

WRONG: list[tuple[Any, str]] = [
    ({}, "chunk.first_layer"),
    (SimpleNamespace(first_layer=0, first_head=0, first_token=0), "chunk.diagonal"),
    (rows_chunk(first_token=None), "first_token"),
    (rows_chunk(first_token=0.5), "first_token"),
    (rows_chunk(first_layer=2**31), "first_layer"),
    (rows_chunk(weights=MAPS.astype(np.float64)), "rows.weights"),
    (rows_chunk(weights=MAPS.astype(">f4")), "rows.weights"),
    (rows_chunk(weights=MAPS.tolist()), "rows.weights"),
    (rows_chunk(weights=MAPS[0]), "rows.weights"),
    (rows_chunk(diagonal=MAPS[..., 0].astype(np.float16)), "rows.diagonal"),
    (rows_chunk(diagonal=MAPS[..., 1:, 0]), "rows.diagonal"),
    (vars(summary_chunk()) | {"diagonal": summary_chunk().diagonal.astype(np.float16)}, "summary.diagonal"),
    (vars(summary_chunk()) | {"diagonal": summary_chunk().diagonal[:1]}, "summary.diagonal"),
    (vars(summary_chunk()) | {"received": b"1234"}, "summary.received"),
]


@pytest.mark.parametrize(("chunk", "field"), WRONG)
def test_what_can_not_be_sent_is_named_and_the_stream_goes_on(client: Client, chunk: Any, field: str) -> None:
    with client.attention_stream(**KNOWN) as stream:
        with pytest.raises(InvalidRequest) as caught:
            stream.send(chunk)
        assert caught.value.field == field
        stream.send(summary_chunk())
        assert stream.finish().logit == pytest.approx(local_score(MAPS), abs=1e-5)


def test_a_tensor_is_told_how_to_become_an_array(client: Client) -> None:
    torch = pytest.importorskip("torch")
    with client.attention_stream(**KNOWN) as stream:
        with pytest.raises(InvalidRequest, match=r"of torch.float32.*x\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"):
            stream.send(rows_chunk(weights=torch.tensor(MAPS)))
        with pytest.raises(InvalidRequest, match=r"format 'd'; give float32 or float16"):
            stream.send(rows_chunk(weights=MAPS.astype(np.float64)))


def test_numbers_that_no_buffer_knows_are_named(client: Client) -> None:
    """Numpy says ValueError then, as for those of bfloat16 that other packages add to it."""
    weights = np.zeros(MAPS.shape, "datetime64[s]")
    with client.attention_stream(**KNOWN) as stream:
        with pytest.raises(InvalidRequest, match=r"of datetime64\[s\], which gives no buffer; .*float32") as caught:
            stream.send(rows_chunk(weights=weights))
        assert caught.value.field == "rows.weights"


def test_several_slices_at_once_are_sent_one_by_one(client: Client) -> None:
    with client.attention_stream(**KNOWN) as stream:
        for several in (some_chunks(), [summary_chunk()]):
            with pytest.raises(InvalidRequest, match=r"chunk\.first_layer: is missing .* give them one by one"):
                stream.send(several)
    with pytest.raises(InvalidRequest, match=r"chunks: is a SimpleNamespace.*give captured\.chunks\(\)"):
        client.score_attention(SimpleNamespace(), **KNOWN)  # type: ignore[arg-type]


WRONG_HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model.name"),
    ({"model": {"name": "a model"}}, "model.commit"),
    ({"model": an_identity().to_dict() | {"heads": "three"}}, "model.heads"),
    ({"model": an_identity().to_dict() | {"tokenizer": 3}}, "model.tokenizer"),
    ({"model": an_identity().to_dict() | {"sample": ["x"]}}, "model.sample"),
    ({"layers": [1, None]}, "layers[1]"),
    ({"layers": None}, "layers"),
    ({"layers": 2}, "layers"),
    ({"heads": None}, "heads"),
    ({"prompt_tokens": "2"}, "prompt_tokens"),
    ({"probe": 3}, "probe"),
    ({"false_positive_rate": "often"}, "false_positive_rate"),
]


@pytest.mark.parametrize(("fields", "field"), WRONG_HEADERS)
def test_a_header_that_can_not_be_sent_is_named(client: Client, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.attention_stream(**KNOWN | fields)
    assert caught.value.field == field


# What the server refuses.


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


def test_a_refusal_of_the_server_is_raised_where_the_sender_is(client: Client) -> None:
    with client.attention_stream(**KNOWN) as stream:
        stream.send(summary_chunk(2 * MAPS))
        with pytest.raises(InvalidRequest) as caught:
            send_again_and_again(stream, summary_chunk(MAPS))
        assert caught.value.field == "summary.diagonal"
        with pytest.raises(InvalidRequest):
            stream.score_now()
        with pytest.raises(InvalidRequest):
            stream.finish()


def test_another_model_is_a_precondition(client: Client) -> None:
    model = an_identity().to_dict() | {"tokenizer": "cd" * 32}
    with pytest.raises(PreconditionFailed) as caught:
        client.score_attention(some_chunks(), model=model, prompt_tokens=2)
    assert (caught.value.reason, caught.value.field) == ("PROBE_MISMATCH", "header.model.tokenizer")


def test_nobody_there() -> None:
    with Client("127.0.0.1:1", timeout=WAIT) as client, pytest.raises(Unavailable):
        client.score_attention(some_chunks(), model=an_identity(), prompt_tokens=2)


def test_a_client_that_is_closed_says_so(server: Running) -> None:
    client = Client(server.target)
    client.close()
    with pytest.raises(Cancelled):
        client.attention_stream(**KNOWN)


# The end.


def test_after_the_end_nothing_more_is_sent(client: Client) -> None:
    with client.attention_stream(**KNOWN) as stream:
        stream.send(summary_chunk())
        first = stream.finish()
        assert stream.finish() is first
        with pytest.raises(InvalidRequest, match="after finish"):
            stream.send(summary_chunk())
        with pytest.raises(InvalidRequest, match="after finish"):
            stream.score_now()


def places_taken(server: Running) -> int:
    server.settle()
    return server.server.scheduler.places.taken


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


# Size and speed.


@dataclass
class Messages:
    """What went over the wire."""

    sizes: list[int]
    parts: list[tuple[int, ...]]


def messages_of(chunk: Any) -> Messages:
    found = list(slice_requests(chunk))
    tensors = [one.rows.weights if one.HasField("rows") else one.summary.received for one in found]
    return Messages([one.ByteSize() for one in found], [tuple(tensor.shape) for tensor in tensors])


@pytest.mark.parametrize("most", [150, 500, 10**6])
@pytest.mark.parametrize("make", [summary_chunk, rows_chunk, coarse_chunk])
def test_large_slices_go_in_several_messages(
    client: Client, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], most: int
) -> None:
    """150 bytes hold one head's sums or two of its rows, 500 those of a layer or more rows, the last all."""
    monkeypatch.setattr(attention_messages, "PIECE_BYTES", most)
    found = messages_of(make())
    assert max(found.sizes) <= most + 60, "and what says where they belong"
    assert (len(found.sizes) == 1) == (most == 10**6)
    near = FLOAT16 if make is coarse_chunk else 1e-5
    assert client.score_attention([make()], **KNOWN).logit == pytest.approx(local_score(MAPS), abs=near)


def test_rows_are_cut_where_their_own_tokens_are() -> None:
    tokens = 800
    maps = some_maps(tokens)[:1, :1]
    assert maps.nbytes > 2 * PIECE_BYTES
    parts = messages_of(rows_chunk(maps)).parts
    assert [shape[3] for shape in parts] == list(np.cumsum([shape[2] for shape in parts]))
    assert len(parts) > 2
    maps[0, 0, 3, 700] = 1e-3
    with pytest.raises(InvalidRequest, match="row 3 must be 0 after its own token"):
        messages_of(rows_chunk(maps))


def test_sending_waits_for_the_server(server: Running, client: Client) -> None:
    """A sender that is faster than the server is held back, so that what is under way is bounded."""
    maps, gate, sent = some_maps(200), Gate(), []
    chunk = rows_chunk(maps)

    def send_all() -> None:
        with client.attention_stream(**KNOWN) as stream, pytest.raises(InvalidRequest):
            send_again_and_again(stream, chunk, sent)

    server.begin(server.server._reader.run(gate))
    assert gate.reached.wait(WAIT)
    thread = threading.Thread(target=send_all)
    thread.start()
    counts: list[int] = []

    def settled() -> bool:
        counts.append(len(sent))
        return len(counts) > 40 and len(set(counts[-40:])) == 1

    wait_until(settled)
    assert len(sent) < 20, "a million are there to be sent"
    gate.open()
    thread.join(WAIT)
    assert not thread.is_alive(), "the second block is refused, which ends it"


# For programs that await.


def awaited(work: Callable[[AsyncClient], Any], target: str) -> Any:
    async def main() -> Any:
        async with AsyncClient(target, timeout=WAIT) as client:
            return await work(client)

    return asyncio.run(main())


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
