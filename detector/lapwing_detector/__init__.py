"""Lapwing's detector: from a language model's attention to the probability that its answer is made up.

Names are imported when they are first used, so that `Probe` and the features need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapwing_detector.capture import Captured, capture_attention
    from lapwing_detector.chunks import AttentionChunk, AttentionChunks
    from lapwing_detector.detection import Detection, HeadContribution, Reason, State
    from lapwing_detector.detector import Detector
    from lapwing_detector.features import (
        attention_eigenvalues,
        attention_scores,
        laplacian_eigenvalues,
        sink_scores,
    )
    from lapwing_detector.generation import GeneratedToken, Generation
    from lapwing_detector.head_map import HeadMap, plot_pair
    from lapwing_detector.identity import ModelIdentity, identity_of
    from lapwing_detector.options import GenerationOptions
    from lapwing_detector.probe import Probe
    from lapwing_detector.running import RunningLogits
    from lapwing_detector.scoring import Scored, ScoreJob
    from lapwing_detector.streams import Stream, Streams
    from lapwing_detector.summary import AttentionSummary

_HOMES = {
    "AttentionChunk": "chunks",
    "AttentionChunks": "chunks",
    "AttentionSummary": "summary",
    "Captured": "capture",
    "Detection": "detection",
    "Detector": "detector",
    "GeneratedToken": "generation",
    "Generation": "generation",
    "GenerationOptions": "options",
    "HeadContribution": "detection",
    "HeadMap": "head_map",
    "ModelIdentity": "identity",
    "Probe": "probe",
    "Reason": "detection",
    "RunningLogits": "running",
    "ScoreJob": "scoring",
    "Scored": "scoring",
    "State": "detection",
    "Stream": "streams",
    "Streams": "streams",
    "attention_eigenvalues": "features",
    "attention_scores": "features",
    "capture_attention": "capture",
    "identity_of": "identity",
    "laplacian_eigenvalues": "features",
    "plot_pair": "head_map",
    "sink_scores": "features",
}

__all__ = [
    "AttentionChunk",
    "AttentionChunks",
    "AttentionSummary",
    "Captured",
    "Detection",
    "Detector",
    "GeneratedToken",
    "Generation",
    "GenerationOptions",
    "HeadContribution",
    "HeadMap",
    "ModelIdentity",
    "Probe",
    "Reason",
    "RunningLogits",
    "ScoreJob",
    "Scored",
    "State",
    "Stream",
    "Streams",
    "attention_eigenvalues",
    "attention_scores",
    "capture_attention",
    "identity_of",
    "laplacian_eigenvalues",
    "plot_pair",
    "sink_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lapwing_detector' has no attribute {name!r}")
    value = getattr(import_module(f"lapwing_detector.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
