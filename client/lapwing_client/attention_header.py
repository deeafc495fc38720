"""From what a sender knows of its model and its attention to the first message of a stream."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from lapwing.v1 import detector_pb2, model_pb2, tensor_pb2
from lapwing_client.attention_messages import Request, found, little_endian, whole_number
from lapwing_client.requests import fitting, real, text, unusable


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
            layers=layer_indices(layers),
            heads=whole_number(heads, "heads"),
            prompt_tokens=whole_number(prompt_tokens, "prompt_tokens"),
            response_tokens=fitting(response_tokens, 32, "response_tokens"),
            false_positive_rate=real(false_positive_rate, "false_positive_rate"),
            probe=text(probe, "probe"),
            attention_sinks=bool(attention_sinks),
            weight_sample=sample_tensor(model),
        )
    )


def layer_indices(layers: Any) -> list[int]:
    """The index in the model of each layer."""
    if not isinstance(layers, Iterable):
        raise unusable("layers", f"is {layers!r:.40}; give the index of each layer that is sent")
    return [whole_number(layer, f"layers[{i}]") for i, layer in enumerate(layers)]


def known_of(chunks: Any, prompt_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says of chunks that know it themselves, as those of `captured.chunks()` do.

    Args:
        chunks: may have the attributes `layers`, `heads`, `first_token`, `tokens` and `attention_sinks`.
        prompt_tokens: of these.
        given: `layers`, `heads`, `response_tokens` and `attention_sinks`; None where the chunks shall say.

    Raises:
        InvalidRequest: neither says it, or the chunks are none or not the beginning.
    """
    if first := getattr(chunks, "first_token", 0):
        message = f"begin at row {first}, those before were taken earlier; give captured.chunks(from_start=True)"
        raise unusable("chunks", message)
    if not isinstance(chunks, Iterable):
        raise unusable("chunks", f"is a {type(chunks).__name__}, which holds no slices; give captured.chunks()")
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
    data = little_endian(memoryview(sample.tobytes()), sample.itemsize)
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[len(sample)], data=data) if sample else None


def identity_message(model: Any) -> model_pb2.ModelIdentity:
    """Which model the attention is of."""
    message = model_pb2.ModelIdentity()
    for field in model_pb2.ModelIdentity.DESCRIPTOR.fields:
        value, path = found(model, field.name, "model"), f"model.{field.name}"
        is_text = field.type == field.TYPE_STRING
        setattr(message, field.name, text(value, path) if is_text else whole_number(value, path))
    return message
