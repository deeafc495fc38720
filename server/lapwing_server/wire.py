"""What a message holds by its bytes alone, looked at before anything is built of them.

An empty item is two bytes on the wire, and about fifty once it is built. Knows field numbers, no values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

VARINT: Final = 0
SIZED: Final = 2
FIXED: Final = {1: 8, 5: 4}
"""Bytes of what follows a key of this kind. Groups, the other kinds that there are, are in none of our messages."""

Shape = Mapping[int, Descriptor]
"""Of a message: what its fields are messages of, by number."""


class Unreadable(ValueError):
    """The bytes are no message."""


def request_type(method: str) -> Descriptor | None:
    """The message that the method of this path takes; None where nothing is known of it."""
    try:
        found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return None
    kind: Descriptor = found.input_type
    return kind


def fields(data: bytes, message: Descriptor) -> Iterator[tuple[int, int]]:
    """(depth, number) of every field, those of the message itself first and at depth 0.

    Raises:
        Unreadable: as soon as that shows.
    """
    inside = [(message, 0, 0, len(data))]
    while inside:
        kind, depth, begin, end = inside.pop()
        shape = shape_of(kind)
        for number, first, last in spans(data, begin, end):
            yield depth, number
            if number in shape:
                inside.append((shape[number], depth + 1, first, last))


def spans(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of what every field of a message holds that lies between two places; empty for numbers."""
    while at < end:
        key, at = varint(data, at, end)
        kind = key & 7
        if kind == SIZED:
            size, begin = varint(data, at, end)
            at = begin + size
        elif kind == VARINT:
            begin = at = varint(data, at, end)[1]
        else:
            begin = at = at + FIXED.get(kind, end)
        if at > end or key < 8:
            raise Unreadable
        yield key >> 3, begin, at


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at the place, and where it ends."""
    if at < end and data[at] < 128:  # nearly always
        return data[at], at + 1
    value = 0
    for place in range(at, min(at + 10, end)):
        value |= (data[place] & 127) << 7 * (place - at)
        if data[place] < 128:
            return value, place + 1
    raise Unreadable


@cache
def shape_of(message: Descriptor) -> Shape:
    """Which of its fields hold messages."""
    return {field.number: field.message_type for field in message.fields if field.message_type is not None}
