"""From the messages of a server to plain results, also those of a newer server."""

from __future__ import annotations

import sys
from array import array
from typing import Any

from google.protobuf import json_format, struct_pb2

from lapwing.v1 import detection_pb2, detector_pb2, model_pb2, probes_pb2, tensor_pb2
from lapwing_client import results
from lapwing_client.errors import LapwingError, error_of_status
from lapwing_client.values import Matrix


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
        heads_contribution=message.heads_contribution,
        statistic_contributions=dict(message.statistic_contributions),
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
            token_contributions=floats(token.token_contributions),
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
        values=Matrix((rows, columns), floats(message.values)),
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
        knots=tuple((knot.logit, knot.probability) for knot in message.calibration.knots),
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
        revisions=tuple(message.revisions),
        rejected_revisions=tuple(
            results.RejectedRevision(rejected.revision, rejected.message) for rejected in message.rejected_revisions
        ),
        statistic_weights=dict(message.statistic_weights),
    )


def activation_of(message: probes_pb2.ActivateProbeResponse) -> results.Activation:
    """What was activated."""
    return results.Activation(probe_of(message.active), message.previous_name, message.previous_revision)


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
