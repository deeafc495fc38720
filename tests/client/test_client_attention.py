"""Streams of attention: anything with a buffer goes, and what can't is named."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attention_fakes import FLOAT16, local_score
from attention_sending import KNOWN, MAPS, TOKENS, rows_chunk, send_again_and_again, some_chunks, summary_chunk
from engine_fakes import an_identity
from service_fakes import WAIT, Running

from lapwing_client import Cancelled, Client, InvalidRequest, PreconditionFailed, Unavailable

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
