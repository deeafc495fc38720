"""A model's own eager attention maps, reduced: what is captured of it must be the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector.doctor.verdict import Skipped
from lapwing_detector.errors import CaptureError
from lapwing_detector.summary import AttentionSummary

SINKS_NOT_IN_MAPS = ("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM")
"""Their eager maps are returned as they were before the learned sinks took their share."""


def eager_summary(model: PreTrainedModel, ids: Tensor, layers: tuple[int, ...]) -> AttentionSummary:
    """Of the model's own eager maps, reduced in float64. Makes every T x T map.

    Args:
        ids: (1, tokens).
        layers: indices of the layers with attention, in order.

    Raises:
        Skipped: the model has no maps that could be compared, for one of three reasons that say nothing against it:
            its learned sinks are not in them, it refuses eager attention, or it hands over none.
        CaptureError: its eager attention breaks, or gives other maps than are captured.
    """
    if type(model).__name__ in SINKS_NOT_IN_MAPS:
        raise Skipped("its eager maps are those before its learned sinks took their share, so they can't be compared")
    try:
        with torch.inference_mode(), eagerly(model):
            output: Any = model(input_ids=ids, output_attentions=True, use_cache=False)
    except (ValueError, NotImplementedError) as error:
        if not refuses_eager(error):
            raise CaptureError(f"its eager attention breaks: {type(error).__name__}: {error}") from error
        raise Skipped(f"it has no eager attention: {error}") from error
    except (TypeError, AttributeError, RuntimeError) as error:
        raise CaptureError(f"its eager attention breaks: {type(error).__name__}: {error}") from error
    found = [one for one in getattr(output, "attentions", None) or () if one is not None]
    if not found:
        raise Skipped("it has no eager attention that hands over maps")
    maps = square_maps(found, ids.shape[1])
    if len(maps) != len(layers):
        raise CaptureError(f"its eager attention gave {len(maps)} maps, {len(layers)} layers are captured")
    heads = {one.shape[1] for one in maps}
    if len(heads) > 1:
        raise CaptureError(f"its eager maps differ in their number of heads: {sorted(heads)}")
    return AttentionSummary(
        diagonal=np.concatenate([one.cpu().double().diagonal(dim1=-2, dim2=-1).numpy() for one in maps]),
        received=np.concatenate([one.cpu().double().sum(dim=-2).numpy() for one in maps]),
        layers=layers,
    )


def refuses_eager(error: Exception) -> bool:
    """Whether a model says that it has no eager attention, or no maps, and does not fail at something else."""
    said = str(error).lower()
    return isinstance(error, NotImplementedError) or "eager" in said or "output_attentions" in said


def square_maps(found: Sequence[Any], tokens: int) -> list[Tensor]:
    """The maps among what a model calls attentions: of other layers it is None, or of another shape."""
    return [one for one in found if isinstance(one, Tensor) and tuple(one.shape[-2:]) == (tokens, tokens)]


@contextmanager
def eagerly(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention in all parts of the model; afterwards each has its own again."""
    owners = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    configs = [one for one in owners.values() if hasattr(one, "_attn_implementation_internal")]
    before = [one._attn_implementation for one in configs]
    try:
        for one in configs:
            one._attn_implementation_internal = "eager"
        yield
    finally:
        for one, implementation in zip(configs, before, strict=True):
            one._attn_implementation_internal = implementation
