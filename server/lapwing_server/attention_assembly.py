"""The sums of one sequence, put together from the slices of a stream. Knows no gRPC and no event loop.

Only heads that some probe reads are held and looked at; of all others the slices' shapes and order count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapwing.v1 import detector_pb2, tensor_pb2
from lapwing_detector.probe import Probe
from lapwing_detector.summary import AttentionSummary
from lapwing_server.attention_header import Header
from lapwing_server.attention_slices import (
    Doubt,
    Numbers,
    Sums,
    read_tensor,
    rows_doubts,
    rows_sums,
    summary_doubts,
    summary_sums,
)
from lapwing_server.attention_sums import TOKEN_BYTES, HeldSums
from lapwing_server.refusal import invalid

FLOAT32 = (tensor_pb2.DATA_TYPE_FLOAT32,)
FLOATS = (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16)

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


class Assembly:
    """What has come of one sequence. Not for several threads.

    Args:
        header: of the stream.
        probe: whose heads must come whole.
        shadows: further probes; where the heads of one do not come or are not sound, it alone has no score.
        most_bytes: that the sums may take.

    Raises:
        Refusal: the tokens that the header declares would take more.
    """

    def __init__(self, header: Header, probe: Probe, shadows: Iterable[Probe] = (), *, most_bytes: int) -> None:
        self._header = header
        needed, held = self._mask([probe]), self._mask([probe, *shadows])
        self._needed = needed[held]
        """(held heads,): those of the probe itself."""

        self._places = np.full(held.shape, -1)
        self._places[held] = np.arange(held.sum())
        """(layers, heads): place among the held ones; -1 for heads that nobody reads."""

        self._came = np.zeros(held.shape, np.int64)
        """(layers, heads): tokens whose rows came."""

        self._part = ""
        """How rows come: `summary` or `rows`; empty before the first ones."""

        self._sums = HeldSums(len(self._needed), header.most_tokens, most_bytes, header.declared)
        if header.declared is None:
            self._require_room(header.prompt_tokens, "header.prompt_tokens")
        else:
            self._require_room(header.declared, "header.response_tokens")

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._sums.nbytes

    def add_summary(self, message: detector_pb2.AttentionSummarySlice) -> None:
        """Adds sums over rows.

        Raises:
            Refusal: they are not the next ones, or can't be of an attention map; nothing of them was added.
        """
        diagonal = read_tensor(message.diagonal, 3, FLOAT32, "summary.diagonal")
        received = read_tensor(message.received, 3, FLOAT32, "summary.received")
        place = self._place(message, "summary", received, "received")
        expected = (*received.shape[:2], place.tokens - place.first_token)
        if diagonal.shape != expected:
            raise invalid(
                "summary.diagonal.shape",
                f"is {list(diagonal.shape)}; by first_token and received it must be {list(expected)}",
            )
        sums = summary_sums(*(self._picked(array, place) for array in (diagonal, received)))
        self._add(place, sums, summary_doubts(sums, place.first_token, self._header.rules))

    def add_rows(self, message: detector_pb2.AttentionRowsSlice) -> None:
        """Adds whole rows; raises like `add_summary`."""
        weights = read_tensor(message.weights, 4, FLOATS, "rows.weights")
        place = self._place(message, "rows", weights, "weights")
        if weights.shape[2] != place.tokens - place.first_token:
            raise invalid(
                "rows.weights.shape",
                f"is {list(weights.shape)}; {place.first_token} and {weights.shape[2]} rows make "
                f"{place.first_token + weights.shape[2]} columns",
            )
        kept = self._picked(weights, place)
        doubts = rows_doubts(kept, place.first_token, self._header.rules)
        self._add(place, rows_sums(kept, place.first_token), doubts)

    def tokens(self, field: str) -> int:
        """How far all heads of the probe have come.

        Raises:
            Refusal: not equally far; `field` is to blame.
        """
        came = self._came[self._places >= 0][self._needed]
        if len(came) == 0:  # a probe that reads no head
            return int(self._came.max(initial=0))
        if came.min() != came.max():
            name = self._name(int(np.flatnonzero(self._needed)[came.argmin()]))
            raise invalid(
                field,
                f"{name} has come up to token {came.min()}, another one of the probe up to {came.max()}; "
                "send the rest before",
                "INCOMPLETE",
            )
        return int(came[0])

    def require_whole(self) -> int:
        """All tokens that were declared must have come; returns how many.

        Raises:
            Refusal: something is missing. A part of a response has no score that may be taken for that of the whole.
        """
        if not self._part:
            raise invalid("part", "no attention came; send summary or rows after the header", "EMPTY_STREAM")
        tokens, header = self.tokens(self._part), self._header
        field = "header.prompt_tokens" if header.declared is None else "header.response_tokens"
        declared = header.prompt_tokens if header.declared is None else header.declared
        if tokens < declared:
            message = f"{declared} tokens were to come, {tokens} came before the stream ended"
            raise invalid(field, message, "INCOMPLETE")
        return tokens

    def summary(self, probe: Probe, tokens: int) -> AttentionSummary | None:
        """What came of the heads that a probe reads, NaN in all others; None where not all of it came and is sound.

        Args:
            probe: one of those that the assembly was made for.
            tokens: how many.
        """
        layers = self._header.layers
        if not set(probe.heads) <= set(layers):
            return None
        rows = [layers.index(layer) for layer in probe.heads]
        selected = self._mask([probe])[rows]
        if (self._came[rows][selected] < tokens).any():
            return None
        shape = (*selected.shape, tokens)
        diagonal, received = (np.full(shape, np.nan, np.float32) for _ in range(2))
        diagonal[selected], received[selected] = self._sums.take(self._places[rows][selected], tokens)
        if np.isnan(received[selected]).any():
            return None
        return AttentionSummary(diagonal, received, tuple(probe.heads))

    def _mask(self, probes: Iterable[Probe]) -> NDArray[np.bool_]:
        """(layers, heads): which heads the probes read."""
        layers = self._header.layers
        mask = np.zeros((len(layers), self._header.heads), bool)
        for probe in probes:
            for layer, heads in probe.heads.items():
                if layer in layers:
                    mask[layers.index(layer), list(heads)] = True
        return mask

    def _place(self, message: Slice, part: str, array: Numbers, name: str) -> Place:
        """Where the rows belong, which must be where the last ones ended."""
        if self._part not in ("", part):
            raise invalid(part, f"comes after {self._part}; send one of the two in all of a stream", "OUT_OF_ORDER")
        layers, heads = (
            within(getattr(message, f"first_{axis}"), array.shape[i], self._came.shape[i], f"{part}.first_{axis}")
            for i, axis in enumerate(("layer", "head"))
        )
        place = Place(part, layers, heads, message.first_token, array.shape[-1])
        self._require_next(place)
        if place.tokens <= place.first_token:
            raise invalid(f"{part}.{name}.shape", f"has {place.tokens} columns, and rows of tokens after them")
        if place.tokens > self._header.most_tokens:
            message_ = f"reaches token {place.tokens}, there may be {self._header.most_tokens}"
            raise invalid(f"{part}.{name}", message_, "TOO_LONG")
        self._require_room(place.tokens, f"{part}.{name}")
        return place

    def _require_next(self, place: Place) -> None:
        came = self._came[place.layers, place.heads]
        wrong = np.argwhere(came != place.first_token)
        if len(wrong):
            layer, head = wrong[0]
            name = f"head {place.heads.start + head} of layer {self._header.layers[place.layers.start + layer]}"
            message = f"is {place.first_token}; of {name} row {came[layer, head]} is the next"
            raise invalid(f"{place.part}.first_token", message, "OUT_OF_ORDER")

    def _require_room(self, tokens: int, field: str) -> None:
        """Refuses what would take too much, before it is taken."""
        if tokens > self._sums.most_tokens:
            size = self._sums.heads * tokens * TOKEN_BYTES
            message = f"{self._sums.heads} heads of {tokens} tokens take {size} bytes here"
            room = f"there is room for {self._sums.most_tokens} tokens, score a shorter text"
            raise invalid(field, f"{message}; {room}", "TOO_LARGE")

    def _held(self, place: Place) -> NDArray[np.intp]:
        """(layers * heads of the slice,): their places among the held heads, -1 for those that nobody reads."""
        return self._places[place.layers, place.heads].ravel()

    def _picked(self, values: Numbers, place: Place) -> Numbers:
        """(held heads of the slice, ...) of (layers, heads, ...)."""
        return values.reshape(-1, *values.shape[2:])[self._held(place) >= 0]

    def _add(self, place: Place, sums: Sums, doubts: Iterable[Doubt]) -> None:
        held = self._held(place)
        heads = held[held >= 0]
        needed = self._needed[heads]
        unsound = np.zeros(len(heads), bool)
        with np.errstate(all="ignore"):
            for doubt in doubts:
                broken = doubt.broken.reshape(len(heads), -1).any(axis=1) if len(heads) else unsound
                if (broken & needed).any():
                    name = self._name(int(heads[broken & needed][0]))
                    raise invalid(doubt.field, f"{name}: {doubt.message}", doubt.reason)
                unsound |= broken
            self._sums.add(heads, place.first_token, sums, unsound)
        self._came[place.layers, place.heads] = place.tokens
        self._part = place.part

    def _name(self, held: int) -> str:
        """What a held head is called."""
        layer, head = np.argwhere(self._places == held)[0]
        return f"head {head} of layer {self._header.layers[layer]}"


def within(first: int, count: int, most: int, field: str) -> slice:
    """The stretch of an axis that a slice is of; refuses what is not within the axis."""
    if not 0 <= first <= most - count:
        raise invalid(field, f"is {first}, and {count} of them from there on are sent; the header has {most}, from 0")
    return slice(first, first + count)
