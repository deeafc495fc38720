"""Which rows of which heads have come: in order, without a gap, none twice. Looks at no number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapwing.v1 import detector_pb2
from lapwing_server.attention_header import Header
from lapwing_server.attention_slices import Numbers
from lapwing_server.refusal import invalid

Slice = detector_pb2.AttentionSummarySlice | detector_pb2.AttentionRowsSlice


@dataclass(frozen=True)
class Place:
    """Which heads and tokens a slice is of."""

    part: str
    """`summary` or `rows`."""

    layers: slice
    heads: slice
    first_token: int
    tokens: int
    """Length of the sequence up to the last row."""


class Order:
    """How far each head of a stream has come."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._came = np.zeros((len(header.layers), header.heads), np.int64)
        """(layers, heads): tokens whose rows came."""

        self.part = ""
        """How rows come: `summary` or `rows`; empty before the first ones."""

    def place(self, message: Slice, part: str, array: Numbers, name: str) -> Place:
        """Where the rows of a slice belong, which must be where the last ones ended.

        Args:
            message: the slice.
            part: what it is in the stream's message.
            array: (layers, heads, ..., first_token + rows) of it.
            name: of the array.

        Raises:
            Refusal: it is not the next one.
        """
        if self.part not in ("", part):
            raise invalid(part, f"comes after {self.part}; send one of the two in all of a stream", "OUT_OF_ORDER")
        layers, heads = (
            within(getattr(message, f"first_{axis}"), array.shape[i], self._came.shape[i], f"{part}.first_{axis}")
            for i, axis in enumerate(("layer", "head"))
        )
        place = Place(part, layers, heads, message.first_token, array.shape[-1])
        self._require_next(place)
        if place.tokens <= place.first_token:
            raise invalid(f"{part}.{name}.shape", f"has {place.tokens} columns, and rows of tokens after them")
        if place.tokens > self._header.most_tokens:
            most = f"there may be {self._header.most_tokens}"
            raise invalid(f"{part}.{name}", f"reaches token {place.tokens}, {most}", "TOO_LONG")
        return place

    def advance(self, place: Place) -> None:
        """The rows were taken."""
        self._came[place.layers, place.heads] = place.tokens
        self.part = place.part

    def tokens(self, needed: NDArray[np.bool_], field: str) -> int:
        """How far all heads have come that are needed.

        Args:
            needed: (layers, heads).
            field: to blame when they have not come equally far.

        Raises:
            Refusal: they have not.
        """
        came = self._came[needed]
        if len(came) == 0:  # a probe that reads no head
            return int(self._came.max(initial=0))
        if came.min() != came.max():
            name = self.name(*np.argwhere(needed)[came.argmin()])
            message = f"{name} has come up to token {came.min()}, another one of the probe up to {came.max()}"
            raise invalid(field, f"{message}; send the rest before", "INCOMPLETE")
        return int(came[0])

    def reached(self, heads: NDArray[np.bool_], tokens: int) -> bool:
        """Whether all these heads, (layers, heads), have come so far."""
        return bool((self._came[heads] >= tokens).all())

    def name(self, layer: int, head: int) -> str:
        """What a head is called, by its place."""
        return f"head {head} of layer {self._header.layers[layer]}"

    def _require_next(self, place: Place) -> None:
        came = self._came[place.layers, place.heads]
        wrong = np.argwhere(came != place.first_token)
        if len(wrong):
            layer, head = wrong[0]
            name = self.name(place.layers.start + layer, place.heads.start + head)
            message = f"is {place.first_token}; of {name} row {came[layer, head]} is the next"
            raise invalid(f"{place.part}.first_token", message, "OUT_OF_ORDER")


def within(first: int, count: int, most: int, field: str) -> slice:
    """The stretch of an axis that a slice is of; refuses what is not within the axis."""
    if not 0 <= first <= most - count:
        raise invalid(field, f"is {first}, and {count} of them from there on are sent; the header has {most}, from 0")
    return slice(first, first + count)
