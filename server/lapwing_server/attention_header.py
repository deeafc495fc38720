"""What a ScoreAttention stream says of itself at its start, checked field by field. Allocates nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from grpc import StatusCode

from lapwing.v1 import detector_pb2, model_pb2, tensor_pb2
from lapwing_detector.head_map import escaped
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_server.attention_slices import Rules
from lapwing_server.refusal import Refusal, invalid

SHOWN = 16
"""Characters of a digest in a message."""


@dataclass(frozen=True)
class Header:
    """What the slices are to be read by."""

    layers: tuple[int, ...]
    """Index in the model of each layer of the slices, no index twice."""

    heads: int
    prompt_tokens: int
    response_tokens: int | None
    """None where as many count as come."""

    most_tokens: int
    """Tokens that may come: those that were declared, else those that the model takes."""

    rules: Rules
    """What the attention of this model must keep to."""

    @property
    def declared(self) -> int | None:
        """Tokens of prompt and response; None where the header does not say."""
        return None if self.response_tokens is None else self.prompt_tokens + self.response_tokens


def read_header(message: detector_pb2.AttentionHeader, probe: Probe, running: ModelIdentity, max_tokens: int) -> Header:
    """The header of a stream.

    Args:
        message: as it came.
        probe: the one that is to score.
        running: the server's own model.
        max_tokens: most tokens that it takes.

    Raises:
        Refusal: a field can't be right, the attention is of another model than the probe's, or attention is not all
            that the probe reads.
    """
    if probe.reads_log_probabilities:
        raise Refusal(
            StatusCode.FAILED_PRECONDITION,
            "NEEDS_LOG_PROBABILITIES",
            f"probe {probe.name} also reads log-probabilities, which are not sent here; name one that reads attention "
            "only, or let the server's model score",
            field="probe",
        )
    require_model(message, probe, running)
    layers = read_layers(message.layers, probe)
    if message.heads != probe.selected.shape[1]:
        raise invalid("heads", f"is {message.heads}; the layers of this model have {probe.selected.shape[1]}")
    prompt = read_tokens(message.prompt_tokens, 0, max_tokens, "prompt_tokens")
    response = None
    if message.HasField("response_tokens"):
        response = read_tokens(message.response_tokens, 1, max_tokens - prompt, "response_tokens")
    return Header(
        layers=layers,
        heads=message.heads,
        prompt_tokens=prompt,
        response_tokens=response,
        most_tokens=max_tokens if response is None else prompt + response,
        rules=Rules(message.attention_sinks, message.model.dtype),
    )


def read_layers(layers: Sequence[int], probe: Probe) -> tuple[int, ...]:
    """The layers of the slices; refuses one that the model does not have or that is named twice, and missing ones."""
    of_model, seen = probe.identity.layers, set[int]()
    for place, layer in enumerate(layers):
        if not 0 <= layer < of_model:
            raise invalid(f"layers[{place}]", f"is {layer}; the model has {of_model} layers, from 0")
        if layer in seen:
            raise invalid(f"layers[{place}]", f"is {layer}, which stands there before; name each layer once")
        seen.add(layer)
    missing = sorted(set(probe.heads) - seen)
    if missing:
        raise invalid(
            "layers", f"lacks layer {missing[0]}, of which the probe {probe.name} reads heads {probe.heads[missing[0]]}"
        )
    return tuple(layers)


def read_tokens(count: int, least: int, most: int, field: str) -> int:
    """A number of tokens."""
    if count < least:
        raise invalid(field, f"is {count}; give {least} or more")
    if count > most:
        raise invalid(field, f"is {count}; the model leaves room for {most}", "TOO_LONG")
    return count


def require_model(message: detector_pb2.AttentionHeader, probe: Probe, running: ModelIdentity) -> None:
    """Refuses attention of a model that the probe was not fitted on, and names what differs.

    The client is told both values: one of them is its own, the other anybody can read who may read the probe.

    Raises:
        Refusal: PROBE_MISMATCH.
    """
    if not message.HasField("model"):
        raise invalid("model", "is missing; say which model the attention is of, as identity_of() does")
    theirs = identity_of(message, running)
    for name, mine, other in probe.identity.differences(theirs):
        unlike = name == "weights" and theirs.dtype != probe.identity.dtype and not theirs.sample
        hint = f" in {shown(theirs.dtype)}; weights of another type are compared by weight_sample, give it" * unlike
        raise Refusal(
            StatusCode.FAILED_PRECONDITION,
            "PROBE_MISMATCH",
            f"model.{name}: the probe {probe.name} was fitted on {shown(mine)}, the attention is of {shown(other)}"
            f"{hint}; fit a probe for this model (lapwing train) or name one that was in `probe`",
            field=f"model.{name}",
        )


def identity_of(message: detector_pb2.AttentionHeader, running: ModelIdentity) -> ModelIdentity:
    """The identity of the sender's model, with a sample of its weights where it is known here."""
    names = [field.name for field in model_pb2.ModelIdentity.DESCRIPTOR.fields]
    values = {name: getattr(message.model, name) for name in names}
    sample: tuple[float, ...] = ()
    if message.HasField("weight_sample"):
        sample = read_sample(message.weight_sample, message.model.weights)
    elif (message.model.weights, message.model.dtype) == (running.weights, running.dtype):
        sample = running.sample
    return ModelIdentity(**values, sample=sample)


def read_sample(sample: tensor_pb2.Tensor, digest: str) -> tuple[float, ...]:
    """The sample of the weights; refuses one that the digest of the weights was not made from."""
    if sample.dtype != tensor_pb2.DATA_TYPE_FLOAT32 or len(sample.data) % 4:
        raise invalid("weight_sample", "is no array of float32; give the sample of identity_of() as such")
    if hashlib.sha256(sample.data).hexdigest() != digest:
        raise invalid("weight_sample", "is not what the digest in model.weights was made from; give both of one model")
    return tuple(np.frombuffer(sample.data, "<f4").tolist())


def shown(value: str) -> str:
    """What a client wrote, or a digest, short and without control characters."""
    return escaped(value[: SHOWN + 1], SHOWN) or "nothing"
