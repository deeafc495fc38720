"""What a message holds by its bytes alone, beside what protobuf makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from canaries import METHODS, filled
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from lapwing.v1 import detection_pb2, detector_pb2
from lapwing_server.wire import Unreadable, fields, request_type, varint

BATCH = detector_pb2.ScoreBatchRequest


def test_the_request_of_every_method_is_known() -> None:
    for method in METHODS:
        assert request_type(f"/{method.containing_service.full_name}/{method.name}") is method.input_type
    assert request_type("/grpc.health.v1.Health/Check") is not None
    for path in ("/nobody.knows/Me", "", "nothing", "/lapwing.v1.Detector/Nope"):
        assert request_type(path) is None


def built(message: Any) -> int:
    """Fields of a message and of those inside it that are set: a list counts as many as it has, numbers as one."""
    count = 0
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        packed = field.is_repeated and field.is_packed
        count += 1 if packed else len(values)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            count += sum(built(one) for one in values)
    return count


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_field_is_counted_once(method: Any) -> None:
    message = filled(GetMessageClass(method.input_type)())
    data = message.SerializeToString()
    assert len(list(fields(data, method.input_type))) == built(GetMessageClass(method.input_type).FromString(data))


def test_what_is_outside_comes_before_what_is_inside() -> None:
    turn = detection_pb2.ChatMessage(role="user", content="hello")
    item = detector_pb2.ScoreItem(prompt={"messages": [turn]}, response={"token_ids": range(300)})
    message = BATCH(items=[item] * 3, false_positive_rate=0.1, probe="x")
    found = list(fields(message.SerializeToString(), BATCH.DESCRIPTOR))
    assert found[:5] == [(0, 1)] * 3 + [(0, 2), (0, 3)]
    assert sorted(depth for depth, _ in found) == [0] * 5 + [1] * 6 + [2] * 6 + [3] * 6


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_read_as_they_are_written(value: int) -> None:
    written, rest = [], value
    while rest > 127:
        written.append(rest & 127 | 128)
        rest >>= 7
    data = bytes([*written, rest])
    assert varint(data, 0, len(data)) == (value, len(data))
    with pytest.raises(Unreadable):
        varint(data, 0, len(data) - 1)


VALID = [filled(BATCH()).SerializeToString(), BATCH(items=[{"prompt": {"text": "a"}}] * 3).SerializeToString()]


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.binary(max_size=40), st.sampled_from(VALID)), st.integers(0, 200), st.binary(max_size=4))
def test_nothing_is_built_that_was_not_counted(data: bytes, place: int, change: bytes) -> None:
    """Whatever the bytes: protobuf builds no more parts of them than were seen, or they are refused before."""
    data = data[:place] + change + data[place + len(change) :]
    try:
        counted = len(list(fields(data, BATCH.DESCRIPTOR)))
    except Unreadable:
        return
    try:
        message = BATCH.FromString(data)
    except DecodeError:
        return
    assert built(message) <= counted


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.builds(dict, prompt=st.builds(dict, text=st.text(max_size=200)))), st.text(max_size=300))
def test_no_message_that_a_client_makes_is_unreadable(items: list[Any], probe: str) -> None:
    message = BATCH(items=items, probe=probe)
    assert len(list(fields(message.SerializeToString(), BATCH.DESCRIPTOR))) == built(message)
