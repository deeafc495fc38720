"""Streams of attention: messages of bounded size, and never far ahead of the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from attention_fakes import FLOAT16, local_score, some_maps
from attention_sending import KNOWN, MAPS, coarse_chunk, rows_chunk, send_again_and_again, summary_chunk
from service_fakes import WAIT, Gate, Running, wait_until

from lapwing_client import Client, InvalidRequest, attention_messages
from lapwing_client.attention_messages import PIECE_BYTES, slice_requests


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
