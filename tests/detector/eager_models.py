"""Models whose layers do not ask the attention interface, read with the eager fallback."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.summary import AttentionSummary
from tests.detector.architectures import build
from tests.detector.tiny_models import difference

FAMILIES = ("falcon", "bloom", "mpt", "codegen", "gptj", "gpt_neo", "xglm", "gpt_neox_japanese")

built = cache(build)


def captured_eagerly(model: PreTrainedModel) -> Captured:
    return capture_attention(model, fallback="eager")


def read(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> list[AttentionSummary]:
    with captured_eagerly(model) as captured, torch.no_grad():
        model(ids, **inputs)
    return captured.summaries()


def largest(one: list[AttentionSummary], other: list[AttentionSummary]) -> float:
    return max(difference(left, right) for left, right in zip(one, other, strict=True))
