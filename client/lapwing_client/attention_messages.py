"""From attention that somebody else computed to the messages that carry it. Knows the buffer protocol, no arrays."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lapwing.v1 import detector_pb2, tensor_pb2
from lapwing_client.requests import fitting, unusable

PIECE_BYTES = 2**20
"""Numbers of one message; a slice with more of them is cut where that can be done."""

DTYPES = {"f": tensor_pb2.DATA_TYPE_FLOAT32, "e": tensor_pb2.DATA_TYPE_FLOAT16}
"""By the format of the buffer protocol."""

OF_TORCH = "x.detach().float().cpu().numpy()"
"""How a tensor becomes an array, whatever it is of and wherever."""

Request = detector_pb2.ScoreAttentionRequest


class Place(NamedTuple):
    """Where a slice begins."""

    layer: int
    head: int
    token: int


@dataclass(frozen=True)
class Numbers:
    """An array whose first two axes are layers and heads."""

    field: str
    dtype: int
    shape: tuple[int, ...]
    data: memoryview
    """Bytes, row-major."""

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one layer."""
        return len(self.data) // max(1, self.shape[0] * self.shape[1])

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return 2 if self.dtype == tensor_pb2.DATA_TYPE_FLOAT16 else 4

    def tensor(self, layers: slice, heads: slice) -> tensor_pb2.Tensor:
        """A part of it: some layers with all their heads, or some heads of one layer."""
        first = (layers.start * self.shape[1] + heads.start) * self.head_bytes
        shape = (layers.stop - layers.start, heads.stop - heads.start, *self.shape[2:])
        return self.message(shape, self.data[first : first + shape[0] * shape[1] * self.head_bytes])

    def message(self, shape: Iterable[int], data: memoryview) -> tensor_pb2.Tensor:
        """A tensor of the same type."""
        return tensor_pb2.Tensor(dtype=self.dtype, shape=shape, data=little_endian(data, self.item_bytes))  # type: ignore[arg-type]


def little_endian(data: memoryview, item_bytes: int) -> bytes:
    """The numbers of this machine as they go on the wire."""
    if sys.byteorder == "little":
        return bytes(data)
    swapped = array("H" if item_bytes == 2 else "I", bytes(data))
    swapped.byteswap()
    return swapped.tobytes()


def score_now_request() -> Request:
    """Asks for the score of what was sent so far."""
    return Request(score_now=detector_pb2.AttentionScoreNow())


def slice_requests(chunk: Any) -> Iterator[Request]:
    """A slice as messages of about `PIECE_BYTES`, in order.

    Args:
        chunk: see `AttentionStream.send`.

    Raises:
        InvalidRequest: something is missing or can't be sent.
    """
    place = Place(*(whole_number(found(chunk, f"first_{axis}", "chunk"), f"first_{axis}") for axis in Place._fields))
    weights, diagonal = (found(chunk, name, "chunk", None) for name in ("weights", "diagonal"))
    if weights is None:
        arrays = [numbers(found(chunk, name, "chunk"), f"summary.{name}", 3, "f") for name in ("diagonal", "received")]
        return summary_requests(place, *arrays)
    beside = None if diagonal is None else numbers(diagonal, "rows.diagonal", 3, "f")
    return rows_requests(place, numbers(weights, "rows.weights", 4, "fe"), beside)


def summary_requests(place: Place, diagonal: Numbers, received: Numbers) -> Iterator[Request]:
    """Sums over rows, cut over layers and heads."""
    require_alike(diagonal, received, 2)
    for layers, heads in cuts(diagonal.shape, diagonal.head_bytes + received.head_bytes):
        part = detector_pb2.AttentionSummarySlice(
            first_layer=place.layer + layers.start,
            first_head=place.head + heads.start,
            first_token=place.token,
            diagonal=diagonal.tensor(layers, heads),
            received=received.tensor(layers, heads),
        )
        yield Request(summary=part)


def rows_requests(place: Place, weights: Numbers, diagonal: Numbers | None) -> Iterator[Request]:
    """Rows, cut over layers and heads and, where one head is too large, over rows."""
    if diagonal is not None:
        require_alike(diagonal, weights, 3)
    for layers, heads in cuts(weights.shape, weights.head_bytes):
        whole = detector_pb2.AttentionRowsSlice(
            first_layer=place.layer + layers.start,
            first_head=place.head + heads.start,
            first_token=place.token,
            weights=weights.tensor(layers, heads),
            diagonal=diagonal.tensor(layers, heads) if diagonal is not None else None,
        )
        for part in row_cuts(whole, weights.item_bytes):
            yield Request(rows=part)


def require_alike(one: Numbers, other: Numbers, axes: int) -> None:
    """Refuses two arrays that are of different heads or rows, which could not be cut together."""
    if one.shape[:axes] != other.shape[:axes]:
        message = f"has {one.shape[:axes]}, {other.field} {other.shape[:axes]}; the first {axes} axes must be the same"
        raise unusable(one.field, message)


def row_cuts(whole: detector_pb2.AttentionRowsSlice, item_bytes: int) -> Iterator[detector_pb2.AttentionRowsSlice]:
    """The parts of a slice: all of it, or, of one head that is too large, some rows each, up to their last token."""
    data, first = whole.weights.data, whole.first_token
    rows, columns = whole.weights.shape[2:]
    if len(data) <= PIECE_BYTES or columns != first + rows:
        yield whole
        return
    row_bytes = columns * item_bytes
    at_once = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        seen = (first + stop) * item_bytes
        kept = []
        for row in range(start, stop):
            begin = row * row_bytes
            if data[begin + seen : begin + row_bytes].strip(b"\0"):
                raise unusable(
                    "rows.weights", f"row {row} must be 0 after its own token, which comes before the others"
                )
            kept.append(data[begin : begin + seen])
        part = detector_pb2.AttentionRowsSlice(
            first_layer=whole.first_layer, first_head=whole.first_head, first_token=first + start
        )
        shape = (1, 1, stop - start)
        part.weights.MergeFrom(
            tensor_pb2.Tensor(dtype=whole.weights.dtype, shape=(*shape, first + stop), data=b"".join(kept))
        )
        if whole.HasField("diagonal"):
            some = whole.diagonal.data[4 * start : 4 * stop]
            part.diagonal.MergeFrom(tensor_pb2.Tensor(dtype=whole.diagonal.dtype, shape=shape, data=some))
        yield part


def cuts(shape: tuple[int, ...], head_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Layers and heads of each message: whole layers where one fits in, else some of its heads."""
    layers, heads = shape[:2]
    at_once = max(1, PIECE_BYTES // max(1, head_bytes))
    some_layers, some_heads = max(1, at_once // max(1, heads)), max(1, min(at_once, heads))
    for layer in range(0, max(1, layers), some_layers):
        for head in range(0, max(1, heads), some_heads):
            yield (
                slice(layer, min(layer + some_layers, layers)),
                slice(head, min(head + some_heads, heads)),
            )


def numbers(value: Any, field: str, axes: int, formats: str) -> Numbers:
    """The numbers of anything with the buffer protocol.

    Raises:
        InvalidRequest: it has none, or holds numbers of another type or in another shape.
    """
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):  # no buffer, or one of numbers that no buffer knows, as bfloat16
        kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'no type')}"
        message = f"is a {kind}, which gives no buffer; give a numpy array in float32 (of torch: {OF_TORCH})"
        raise unusable(field, message) from None
    format = view.format.lstrip("@=" + ("<" if sys.byteorder == "little" else ">"))
    if format not in tuple(formats):
        known = " or ".join({"f": "float32", "e": "float16"}[one] for one in formats)
        raise unusable(
            field, f"holds numbers of the format {view.format!r}; give {known}, as by x.astype(numpy.float32)"
        )
    if view.ndim != axes:
        raise unusable(field, f"has {view.ndim} axes; give {axes}, of which the first two are layers and heads")
    data = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
    return Numbers(field, DTYPES[format], tuple(view.shape or ()), data)


def whole_number(value: Any, field: str) -> int:
    """A whole number of 32 bits."""
    number = fitting(value, 32, field)
    if number is None:
        raise unusable(field, "is not given; give a whole number")
    return number


MISSING: Any = object()


def found(holder: Any, name: str, what: str, otherwise: Any = MISSING) -> Any:
    """An attribute or, of a mapping, a key."""
    value = holder.get(name, MISSING) if isinstance(holder, Mapping) else getattr(holder, name, MISSING)
    value = otherwise if value is MISSING else value
    if value is MISSING:
        several = "; it holds several, give them one by one" * (what == "chunk" and isinstance(holder, Collection))
        message = f"is missing from a {type(holder).__name__}; it must be an attribute or a key"
        raise unusable(f"{what}.{name}", message + several * (not isinstance(holder, Mapping)))
    return value
