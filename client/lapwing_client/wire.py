"""From arguments to messages and from messages to results."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format, struct_pb2
from lapwing.v1 import detection_pb2, detector_pb2, model_pb2, probes_pb2, tensor_pb2

from lapwing_client import results
from lapwing_client.errors import InvalidRequest, LapwingError, error_of_status

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]
"""Text, chat messages such as {"role": "user", "content": "..."}, or token ids."""

Response = str | Sequence[int]
"""Text or token ids."""


def prompt_message(prompt: Prompt, field: str = "prompt") -> detection_pb2.Prompt:
    """A prompt in the form in which it is given.

    Raises:
        InvalidRequest: it is none of them.
    """
    if isinstance(prompt, str):
        return detection_pb2.Prompt(text=text(prompt, field))
    items = listed(prompt, field)
    if items and all(isinstance(item, Mapping) for item in items):
        turns = [chat_message(item, f"{field}.messages[{i}]") for i, item in enumerate(items)]
        return detection_pb2.Prompt(messages=turns)
    return detection_pb2.Prompt(token_ids=token_ids(items, field))


def response_message(response: Response, field: str = "response") -> detection_pb2.Response:
    """A response in the form in which it is given; raises like `prompt_message`."""
    if isinstance(response, str):
        return detection_pb2.Response(text=text(response, field))
    return detection_pb2.Response(token_ids=token_ids(listed(response, field), field))


def chat_message(turn: Mapping[str, Any], field: str) -> detection_pb2.ChatMessage:
    """One turn of a conversation."""
    if set(turn) != {"role", "content"} or not all(isinstance(value, str) for value in turn.values()):
        raise unusable(field, f"has the keys {sorted(map(str, turn))}; give role and content, both text")
    role, content = text(turn["role"], f"{field}.role"), text(turn["content"], f"{field}.content")
    return detection_pb2.ChatMessage(role=role, content=content)


def text(value: str, field: str) -> str:
    """The text; refuses what UTF-8 can't hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise unusable(
            field, f"has half of a surrogate pair at character {error.start}; give whole characters"
        ) from None
    return value


def token_ids(items: Sequence[Any], field: str) -> list[int]:
    """The ids as whole numbers of 32 bits; numpy's and torch's whole numbers count."""
    ids = []
    for i, item in enumerate(items):
        if isinstance(item, bool | float | str) or not hasattr(item, "__index__"):
            raise unusable(f"{field}.token_ids[{i}]", f"is {item!r:.40}; give whole numbers, text, or chat messages")
        number = item.__index__()
        if not -(2**31) <= number < 2**31:
            raise unusable(f"{field}.token_ids[{i}]", f"is {number}; no vocabulary is that large")
        ids.append(number)
    return ids


def listed(value: Any, field: str) -> list[Any]:
    """The items of a sequence."""
    if isinstance(value, bytes | Mapping) or not hasattr(value, "__iter__"):
        raise unusable(field, f"is a {type(value).__name__}; give text, a list of messages, or a list of token ids")
    return list(value)


def unusable(field: str, message: str) -> InvalidRequest:
    """An argument that can't even be sent."""
    return InvalidRequest(f"{field}: {message}", reason="INVALID_INPUT", code="INVALID_ARGUMENT", field=field)


def floats(tensor: tensor_pb2.Tensor) -> tuple[float, ...]:
    """The numbers of a float32 tensor."""
    if not tensor.data:
        return ()
    if tensor.dtype != tensor_pb2.DATA_TYPE_FLOAT32:
        raise LapwingError(f"a tensor has type {tensor.dtype}, which this client can't read; update it")
    numbers = array("f", tensor.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def detection_of(message: detection_pb2.Detection) -> results.Detection:
    """The score, or that there is none."""
    state = suffix(detection_pb2.DetectionState, message.state, "DETECTION_STATE_")
    scored = state == "SCORED"
    return results.Detection(
        state=state,
        reason=None if scored else suffix(detection_pb2.UnscoredReason, message.reason, "UNSCORED_REASON_"),
        message=message.message,
        probability=optional(message, "probability"),
        logit=optional(message, "logit"),
        bias=message.bias,
        flagged=optional(message, "flagged"),
        false_positive_rate=message.false_positive_rate,
        flagged_at=tuple(message.flagged_at),
        probe_name=message.probe_name,
        probe_revision=message.probe_revision,
        prompt_tokens=message.prompt_tokens,
        response_tokens=message.response_tokens,
        token_ids=tuple(message.token_ids),
        token_contributions=floats(message.token_contributions),
        strongest_heads=tuple(
            results.HeadContribution(head.layer, head.head, head.contribution) for head in message.strongest_heads
        ),
        seconds=dict(message.stage_seconds),
    )


def outcome_of(message: detector_pb2.ScoreResult) -> results.Detection | LapwingError:
    """What became of one item of a batch."""
    if message.WhichOneof("result") == "detection":
        return detection_of(message.detection)
    return error_of_status(message.error)


def event_of(message: detector_pb2.GenerateResponse) -> results.GeneratedToken | results.Generation:
    """One event of a generation."""
    if message.WhichOneof("event") == "token":
        token = message.token
        return results.GeneratedToken(
            index=token.index,
            token_id=token.token_id,
            text=token.text,
            log_probability=token.log_probability,
            probability=optional(token, "probability"),
            logit=optional(token, "logit"),
        )
    generation = message.generation
    return results.Generation(
        text=generation.text,
        prompt_token_ids=tuple(generation.prompt_token_ids),
        token_ids=tuple(generation.token_ids),
        finish_reason=suffix(detector_pb2.FinishReason, generation.finish_reason, "FINISH_REASON_"),
        detection=detection_of(generation.detection),
    )


def heatmap_of(message: probes_pb2.GetHeatmapResponse) -> results.Heatmap:
    """A heatmap."""
    rows, columns = message.values.shape
    return results.Heatmap(
        probe_name=message.probe_name,
        probe_revision=message.probe_revision,
        feature=message.feature,
        statistic=suffix(probes_pb2.Statistic, message.statistic, "STATISTIC_"),
        values=results.Matrix((rows, columns), floats(message.values)),
        layers=tuple(message.layers),
        column_label=message.column_label,
        row_label=message.row_label,
        value_label=message.value_label,
        image=message.image,
    )


def identity_of(message: model_pb2.ModelIdentity) -> results.ModelIdentity:
    """Which model it is."""
    return results.ModelIdentity(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def probe_of(message: probes_pb2.Probe) -> results.Probe:
    """A probe."""
    return results.Probe(
        name=message.name,
        revision=message.revision,
        state=suffix(probes_pb2.ProbeState, message.state, "PROBE_STATE_"),
        state_message=message.state_message,
        features=tuple(message.features),
        k=message.k,
        layers=tuple(message.layers),
        heads=message.heads,
        width=message.width,
        needed_tokens=message.needed_tokens,
        selected_heads=tuple((head.layer, head.head) for head in message.selected_heads),
        slope=message.calibration.slope,
        intercept=message.calibration.intercept,
        thresholds=tuple(
            results.Threshold(point.false_positive_rate, point.logit, optional(point, "realised_rate"), point.negatives)
            for point in message.thresholds
        ),
        metrics=json_of(message.metrics),
        training=json_of(message.training),
        model=identity_of(message.model) if message.HasField("model") else None,
        heatmaps=tuple(
            (name.feature, suffix(probes_pb2.Statistic, name.statistic, "STATISTIC_")) for name in message.heatmaps
        ),
    )


def server_info_of(message: detector_pb2.GetServerInfoResponse) -> results.ServerInfo:
    """What runs in a server."""
    limits = message.limits
    return results.ServerInfo(
        version=message.version,
        state=suffix(detector_pb2.ServerState, message.state, "SERVER_STATE_"),
        message=message.message,
        model=identity_of(message.model.identity) if message.HasField("model") else None,
        max_tokens=message.model.max_tokens,
        limits=results.Limits(**{field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields}),
        probe_name=message.probe_name,
        probe_revision=message.probe_revision,
        library_versions=dict(message.library_versions),
    )


def json_of(message: struct_pb2.Struct) -> dict[str, Any]:
    """JSON values."""
    values: dict[str, Any] = json_format.MessageToDict(message)
    return values


def optional(message: Any, field: str) -> Any:
    """The field; None when it is not set."""
    return getattr(message, field) if message.HasField(field) else None


def suffix(enum: Any, number: int, prefix: str) -> str:
    """The name of an enum's value without its prefix; its number when a newer server sent an unknown one."""
    names = {value: name for name, value in enum.items()}
    return names[number].removeprefix(prefix) if number in names else str(number)
