"""From attention that somebody else computed to the messages that carry it. Knows the buffer protocol, no arrays."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lapwing.v1 import detector_pb2, model_pb2, tensor_pb2
from lapwing_client.requests import fitting, real, text, unusable

PIECE_BYTES = 2**20
"""Numbers of one message; a slice with more of them is cut where that can be done."""

DTYPES = {"f": tensor_pb2.DATA_TYPE_FLOAT32, "e": tensor_pb2.DATA_TYPE_FLOAT16}
"""By the format of the buffer protocol."""

SUMMARY, ROWS = ("diagonal", "received"), ("weights",)

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

    def message(self, shape: Iterable[int], data: memoryview | bytes) -> tensor_pb2.Tensor:
        """A tensor of the same type, little-endian as on the wire."""
        if sys.byteorder == "big":
            swapped = array("H" if self.item_bytes == 2 else "I", bytes(data))
            swapped.byteswap()
            data = swapped.tobytes()
        return tensor_pb2.Tensor(dtype=self.dtype, shape=shape, data=bytes(data))  # type: ignore[arg-type]


def header_request(
    model: Any,
    layers: Iterable[int],
    heads: int,
    prompt_tokens: int,
    *,
    response_tokens: int | None = None,
    probe: str = "",
    false_positive_rate: float | None = None,
    attention_sinks: bool | None = False,
) -> Request:
    """The first message of a stream; see `Client.attention_stream`.

    Raises:
        InvalidRequest: an argument can't be sent; the server knows whether it can be right.
    """
    return Request(
        header=detector_pb2.AttentionHeader(
            model=identity_message(model),
            layers=[whole_number(layer, f"layers[{i}]") for i, layer in enumerate(layers)],
            heads=whole_number(heads, "heads"),
            prompt_tokens=whole_number(prompt_tokens, "prompt_tokens"),
            response_tokens=fitting(response_tokens, 32, "response_tokens"),
            false_positive_rate=real(false_positive_rate, "false_positive_rate"),
            probe=text(probe, "probe"),
            attention_sinks=bool(attention_sinks),
            weight_sample=sample_tensor(model),
        )
    )


def known_of(chunks: Any, prompt_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says of chunks that know it themselves, as those of `captured.chunks()` do.

    Args:
        chunks: may have the attributes `layers`, `heads`, `first_token`, `tokens` and `attention_sinks`.
        prompt_tokens: of these.
        given: `layers`, `heads`, `response_tokens` and `attention_sinks`; None where the chunks shall say.

    Raises:
        InvalidRequest: neither says it, or the chunks are not the beginning.
    """
    if first := getattr(chunks, "first_token", 0):
        message = f"begin at row {first}, those before were taken earlier; give captured.chunks(from_start=True)"
        raise unusable("chunks", message)
    known = {name: getattr(chunks, name, None) if value is None else value for name, value in given.items()}
    if known["response_tokens"] is None and (tokens := getattr(chunks, "tokens", 0)) > prompt_tokens:
        known["response_tokens"] = tokens - prompt_tokens
    for name in ("layers", "heads"):
        if known[name] is None:
            raise unusable(name, "is not given, and the chunks have no attribute of that name; give it")
    return known


def sample_tensor(model: Any) -> tensor_pb2.Tensor | None:
    """The sample of the weights, where the identity has it."""
    try:
        sample = array("f", found(model, "sample", "model", ()))
    except (TypeError, OverflowError):
        raise unusable("model.sample", "is not numbers; give what identity_of() returns") from None
    whole = Numbers("model.sample", tensor_pb2.DATA_TYPE_FLOAT32, (1, 1, len(sample)), memoryview(sample.tobytes()))
    return whole.message((len(sample),), whole.data) if sample else None


def identity_message(model: Any) -> model_pb2.ModelIdentity:
    """Which model the attention is of."""
    message = model_pb2.ModelIdentity()
    for field in model_pb2.ModelIdentity.DESCRIPTOR.fields:
        value, path = found(model, field.name, "model"), f"model.{field.name}"
        is_text = field.type == field.TYPE_STRING
        setattr(message, field.name, text(value, path) if is_text else whole_number(value, path))
    return message


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
    weights = found(chunk, "weights", "chunk", None)
    if weights is None:
        arrays = [numbers(found(chunk, name, "chunk"), f"summary.{name}", 3, "f") for name in SUMMARY]
        return summary_requests(place, *arrays)
    return rows_requests(place, numbers(weights, "rows.weights", 4, "fe"))


def summary_requests(place: Place, diagonal: Numbers, received: Numbers) -> Iterator[Request]:
    """Sums over rows, cut over layers and heads."""
    if diagonal.shape[:2] != received.shape[:2]:
        message = (
            f"has {diagonal.shape[:2]} layers and heads, summary.received {received.shape[:2]}; give both the same"
        )
        raise unusable("summary.diagonal", message)
    for layers, heads in cuts(diagonal.shape, diagonal.head_bytes + received.head_bytes):
        part = detector_pb2.AttentionSummarySlice(
            first_layer=place.layer + layers.start,
            first_head=place.head + heads.start,
            first_token=place.token,
            diagonal=diagonal.tensor(layers, heads),
            received=received.tensor(layers, heads),
        )
        yield Request(summary=part)


def rows_requests(place: Place, weights: Numbers) -> Iterator[Request]:
    """Rows, cut over layers and heads and, where one head is too large, over rows."""
    for layers, heads in cuts(weights.shape, weights.head_bytes):
        whole = weights.tensor(layers, heads)
        for token, tensor in row_cuts(place.token, weights, whole):
            part = detector_pb2.AttentionRowsSlice(
                first_layer=place.layer + layers.start,
                first_head=place.head + heads.start,
                first_token=token,
                weights=tensor,
            )
            yield Request(rows=part)


def row_cuts(first: int, weights: Numbers, tensor: tensor_pb2.Tensor) -> Iterator[tuple[int, tensor_pb2.Tensor]]:
    """First token and rows of each part of a tensor: all of it, or stretches of rows that end at their own columns."""
    _, _, rows, columns = tensor.shape
    if len(tensor.data) <= PIECE_BYTES or columns != first + rows:
        yield first, tensor
        return
    row_bytes, data = columns * weights.item_bytes, tensor.data
    at_once = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        seen = (first + stop) * weights.item_bytes
        kept = []
        for row in range(start, stop):
            begin = row * row_bytes
            if data[begin + seen : begin + row_bytes].strip(b"\0"):
                raise unusable(weights.field, f"row {row} must be 0 after its own token, which comes before the others")
            kept.append(data[begin : begin + seen])
        yield (
            first + start,
            tensor_pb2.Tensor(dtype=tensor.dtype, shape=(1, 1, stop - start, first + stop), data=b"".join(kept)),
        )


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
    except TypeError:
        message = (
            f"is a {type(value).__name__}, which has no buffer; give a numpy array (of torch: x.float().cpu().numpy())"
        )
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
        raise unusable(f"{what}.{name}", f"is missing from a {type(holder).__name__}; it must be an attribute or a key")
    return value
