"""What the detector says, as messages of the wire."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from google.protobuf import struct_pb2
from numpy.typing import NDArray

from lapwing.v1 import detection_pb2, detector_pb2, model_pb2, probes_pb2, tensor_pb2
from lapwing_detector.calibration import Calibration
from lapwing_detector.detection import Detection, State
from lapwing_detector.head_map import STATISTICS
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_server.limits import Limits
from lapwing_server.shelf import Shelved

if TYPE_CHECKING:
    from lapwing_detector import GeneratedToken, Generation

REPORT_ONLY = ("examples", "roc", "pr", "histogram")
"""Metrics that stay in the probe's report: points of curves, and examples, whose texts are nobody's business here."""

STRONGEST_HEADS = 32
"""Heads of one detection; all of a large model would be thousands of messages."""


def tensor(values: NDArray[np.float32]) -> tensor_pb2.Tensor:
    """An array as packed little-endian float32."""
    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=data)


def detection_message(detection: Detection, seconds: Mapping[str, float] | None = None) -> detection_pb2.Detection:
    """A detection; `seconds` of further stages, which the detector does not know of."""
    scored = detection.state is State.SCORED
    message = detection_pb2.Detection(
        state=f"DETECTION_STATE_{detection.state.value}",
        reason=f"UNSCORED_REASON_{detection.reason.value if detection.reason else 'UNSPECIFIED'}",
        message=detection.message,
        probability=detection.probability if scored else None,
        logit=detection.logit if scored else None,
        bias=detection.bias,
        false_positive_rate=detection.false_positive_rate,
        flagged_at=detection.flagged_at,
        probe_name=detection.probe_name,
        probe_revision=detection.probe_revision,
        prompt_tokens=detection.prompt_tokens,
        response_tokens=detection.response_tokens,
        token_ids=detection.token_ids,
        token_contributions=tensor(detection.token_contributions),
        strongest_heads=[
            detection_pb2.HeadContribution(layer=one.layer, head=one.head, contribution=one.contribution)
            for one in detection.head_contributions[:STRONGEST_HEADS]
        ],
        stage_seconds={**(seconds or {}), **detection.seconds},
        heads_contribution=detection.heads_contribution,
        statistic_contributions=detection.statistic_contributions,
    )
    if scored and detection.flagged is not None:
        message.flagged = detection.flagged
    return message


def event_message(
    event: GeneratedToken | Generation, seconds: Mapping[str, float] | None = None
) -> detector_pb2.GenerateResponse:
    """One event of a generation; `seconds` as for `detection_message`."""
    # Their classes need torch, so the two are told apart by what they have.
    if hasattr(event, "token_id"):
        return token_event(cast("GeneratedToken", event))
    return generation_event(event, seconds)


def token_event(token: GeneratedToken) -> detector_pb2.GenerateResponse:
    """One written token."""
    return detector_pb2.GenerateResponse(
        token=detector_pb2.GeneratedToken(
            index=token.index,
            token_id=token.token_id,
            text=token.text,
            log_probability=token.log_probability,
            probability=token.probability,
            logit=token.logit,
            token_contributions=None if token.token_contributions is None else tensor(token.token_contributions),
        )
    )


def generation_event(
    generation: Generation, seconds: Mapping[str, float] | None = None
) -> detector_pb2.GenerateResponse:
    """The finished response."""
    return detector_pb2.GenerateResponse(
        generation=detector_pb2.Generation(
            text=generation.text,
            prompt_token_ids=generation.prompt_ids,
            token_ids=generation.token_ids,
            finish_reason=f"FINISH_REASON_{generation.finish_reason.upper()}",
            detection=detection_message(generation.detection, seconds),
        )
    )


def identity_message(identity: ModelIdentity) -> model_pb2.ModelIdentity:
    """A model's identity, without the sample of its weights, of which the digest is enough."""
    names = [field.name for field in model_pb2.ModelIdentity.DESCRIPTOR.fields]
    return model_pb2.ModelIdentity(**{name: getattr(identity, name) for name in names})


def limits_message(limits: Limits) -> detector_pb2.Limits:
    """What the server takes."""
    return detector_pb2.Limits(
        max_request_bytes=limits.request_bytes,
        max_batch_items=limits.batch_items,
        max_new_tokens=limits.new_tokens,
        max_generate_streams=limits.generate_streams,
        max_heatmap_pixels=limits.heatmap_pixels,
        max_messages=limits.messages,
        max_characters_per_token=limits.characters_per_token,
        max_streams_per_client=limits.streams_of_one,
        max_stop_strings=limits.stop_strings,
        max_stop_string_characters=limits.stop_string_characters,
        max_stream_seconds=limits.stream_seconds,
        max_attention_streams=limits.attention_streams,
        max_attention_bytes=limits.attention_bytes,
    )


def probe_message(entry: Shelved, active: Probe, shadows: Sequence[Probe] = ()) -> probes_pb2.Probe:
    """A probe, or why it was rejected."""
    probe = entry.probe
    rejected = [probes_pb2.RejectedRevision(revision=one.revision, message=one.reason) for one in entry.rejected]
    if probe is None:
        return probes_pb2.Probe(
            name=entry.name,
            state=probes_pb2.PROBE_STATE_REJECTED,
            state_message=entry.reason,
            revisions=entry.revisions,
            rejected_revisions=rejected,
        )
    return probes_pb2.Probe(
        name=probe.name,
        revision=probe.revision,
        revisions=entry.revisions or (probe.revision,),
        rejected_revisions=rejected,
        state=probe_state(probe, active, shadows),
        features=probe.features,
        k=probe.k,
        layers=probe.layers,
        heads=probe.selected.shape[1],
        width=probe.width,
        needed_tokens=probe.needed_tokens,
        selected_heads=[
            probes_pb2.Head(layer=probe.layers[row], head=int(head)) for row, head in np.argwhere(probe.selected)
        ],
        calibration=_calibration(probe.calibration),
        thresholds=[
            probes_pb2.Threshold(
                false_positive_rate=point.false_positive_rate,
                logit=point.logit,
                realised_rate=point.realised_rate,
                negatives=point.negatives,
            )
            for point in probe.thresholds
        ],
        metrics=struct({name: value for name, value in probe.metrics.items() if name not in REPORT_ONLY}),
        training=struct(probe.training),
        model=identity_message(probe.identity),
        heatmaps=[
            probes_pb2.HeatmapName(feature=feature, statistic=f"STATISTIC_{statistic}")
            for feature in probe.mapped_features
            for statistic in statistics_of(probe, feature)
        ],
        statistic_weights=probe.statistic_weights,
    )


def probe_state(probe: Probe, active: Probe, shadows: Sequence[Probe]) -> probes_pb2.ProbeState:
    """What a sound probe is doing."""
    if probe is active:
        return probes_pb2.PROBE_STATE_ACTIVE
    beside = any(probe is shadow for shadow in shadows)
    return probes_pb2.PROBE_STATE_SHADOW if beside else probes_pb2.PROBE_STATE_LOADED


def _calibration(calibration: Calibration) -> probes_pb2.Calibration:
    knots = [probes_pb2.CalibrationKnot(logit=logit, probability=value) for logit, value in calibration.knots]
    return probes_pb2.Calibration(slope=calibration.slope, intercept=calibration.intercept, knots=knots)


def statistics_of(probe: Probe, feature: str) -> list[str]:
    """Names of the statistics that the probe can show of a feature; two are made of the weights and always there."""
    always = ("WEIGHT", "SELECTED")
    return [name for name in STATISTICS if name in always or f"{feature}/{name}" in probe.statistics]


def struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    """JSON values as a message; numbers that JSON has no word for become text."""
    message = struct_pb2.Struct()
    message.update(json.loads(json.dumps(speakable(values), default=str)))
    return message


def speakable(value: Any) -> Any:
    """The same with NaN and infinities as text."""
    if isinstance(value, Mapping):
        return {str(key): speakable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [speakable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
