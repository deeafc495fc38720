"""Streams with one thing wrong in them, wherever it is: refused with the path of a field, and never scored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest
from attention_fakes import FLOAT16, LAYERS, MAKE, a_header, changed, local_score, places, put, requests, some_maps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_fakes import WAIT, Running, told

from lapwing.v1 import detector_pb2, detector_pb2_grpc

EXAMPLES = 100 if os.environ.get("LAPWING_SOAK") == "1" else 15
TOKENS, PROMPT = 13, 2
MAPS = some_maps(TOKENS)

Draw = Callable[[st.SearchStrategy[Any]], Any]
Parts = list[Any]


def arrays_of(part: Any) -> list[str]:
    """The arrays that it has."""
    names = (
        ("diagonal", "received") if isinstance(part, detector_pb2.AttentionSummarySlice) else ("weights", "diagonal")
    )
    return [name for name in names if part.HasField(name)]


def of_a_read_head(parts: Parts, draw: Draw) -> tuple[Any, str, tuple[int, ...], tuple[int, ...]]:
    """One number: its slice and array, the array's shape, and a place in it that the probe reads."""
    part = draw(st.sampled_from([one for one in parts if (one.first_layer, one.first_head) != (0, 0) or whole(one)]))
    name = draw(st.sampled_from(arrays_of(part)))
    shape = tuple(getattr(part, name).shape)
    place = tuple(draw(st.integers(0, length - 1)) for length in shape)
    if (part.first_layer + place[0], part.first_head + place[1]) == (0, 0):
        place = (*(length - 1 for length in shape[:2]), *place[2:])
    return part, name, shape, place


def whole(part: Any) -> bool:
    """Whether it is of all heads, and not of one alone."""
    return list(getattr(part, arrays_of(part)[0]).shape[:2]) == [2, 3]


def swapped(parts: Parts, draw: Draw) -> None:
    """Two slices of the same heads change places."""
    one = draw(st.integers(0, len(parts) - 1))
    later = [i for i, part in enumerate(parts) if alike(part, parts[one]) and i != one]
    if not later:
        return dropped(parts, draw)  # of one block only there is nothing to change places with
    other = draw(st.sampled_from(later))
    parts[one], parts[other] = parts[other], parts[one]
    return None


def alike(one: Any, other: Any) -> bool:
    """Of the same heads."""
    return (one.first_layer, one.first_head) == (other.first_layer, other.first_head)


def dropped(parts: Parts, draw: Draw) -> None:
    """One does not come; of a head that the probe reads, for others need not."""
    read = [i for i, part in enumerate(parts) if (part.first_layer, part.first_head) != (0, 0) or whole(part)]
    del parts[draw(st.sampled_from(read))]


def twice(parts: Parts, draw: Draw) -> None:
    """One comes again, at once or later."""
    place = draw(st.integers(0, len(parts) - 1))
    parts.insert(draw(st.integers(place + 1, len(parts))), parts[place])


def a_number(*values: float) -> Callable[[Parts, Draw], None]:
    def change(parts: Parts, draw: Draw) -> None:
        part, name, _, place = of_a_read_head(parts, draw)
        changed(part, name, put(*place, value=draw(st.sampled_from(values))))

    return change


def a_length(parts: Parts, draw: Draw) -> None:
    """A shape that is off by one, with the numbers of the right one."""
    part, name, shape, _ = of_a_read_head(parts, draw)
    axis, by = draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from([-1, 1]))
    getattr(part, name).shape[axis] += by


def an_array(parts: Parts, draw: Draw) -> None:
    """An array that ends one early or late, with its numbers."""
    part, name, shape, _ = of_a_read_head(parts, draw)
    axis = draw(st.integers(0, len(shape) - 1))
    repeats = np.ones(shape[axis], int)
    repeats[-1] = draw(st.sampled_from([0, 2]))
    changed(part, name, lambda array: np.repeat(array, repeats, axis))


def a_type(parts: Parts, draw: Draw) -> None:
    """Numbers of half or twice the size that the type says."""
    part, name, _, _ = of_a_read_head(parts, draw)
    tensor = getattr(part, name)
    values = np.frombuffer(tensor.data, np.float32 if tensor.dtype == 1 else np.float16)
    wrong = [np.float64, np.float16 if values.dtype == np.float32 else np.float32]
    tensor.data = values.astype(draw(st.sampled_from(wrong))).tobytes()


def a_place(parts: Parts, draw: Draw) -> None:
    """It says of itself that it is of other rows."""
    part = draw(st.sampled_from(parts))
    part.first_token += draw(st.sampled_from([-1, 1]))


WRONG: dict[str, Callable[[Parts, Draw], None]] = {
    one.__name__: one for one in (swapped, dropped, twice, a_length, an_array, a_type, a_place)
} | {
    "not a number": a_number(float("nan"), float("inf"), -float("inf")),
    "negative": a_number(-1e-3, -1.0, -6e4),
    "more than a token can have": a_number(TOKENS + 1.0, 6e4),
}


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    with Running() as server, grpc.insecure_channel(server.target) as channel:
        yield detector_pb2_grpc.DetectorStub(channel)


def answers(stub: Any, parts: Parts) -> list[Any]:
    header = a_header(PROMPT, response_tokens=TOKENS - PROMPT)
    return list(stub.ScoreAttention(requests(header, *parts), timeout=WAIT))


@pytest.mark.parametrize("wrong", WRONG)
def test_one_thing_that_is_wrong_is_refused_and_without_it_the_stream_is_scored(stub: Any, wrong: str) -> None:
    expected = local_score(MAPS)
    everything = [(slice(0, len(LAYERS)), slice(0, 3))]

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(list(MAKE)),
        st.sets(st.integers(1, TOKENS - 1), max_size=3),
        st.booleans(),
        st.data(),
    )
    def check(kind: str, inner: set[int], apart: bool, data: st.DataObject) -> None:
        cuts, heads = list(pairwise([0, *sorted(inner), TOKENS])), list(places()) if apart else everything
        parts = [MAKE[kind](MAPS, *cut, *place) for cut in cuts for place in heads]
        [answer] = answers(stub, parts)
        near = FLOAT16 if kind == "coarse" else 1e-5
        assert answer.detection.logit == pytest.approx(expected, abs=near), "control: the stream as it was"
        WRONG[wrong](parts, data.draw)
        with pytest.raises(grpc.RpcError) as caught:
            answers(stub, parts)
        error = told(caught.value)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.field.split(".")[0] in ("summary", "rows", "header", "part")

    check()
