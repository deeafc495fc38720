"""What becomes of a model family under capture: how far it is from its own eager maps, or why it is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import DetectorError
from lapwing_detector.summary import AttentionSummary
from tests.detector.architecture_mechanisms import Used, broken_error, described
from tests.detector.architecture_runs import RUNS, NoCache, largest, reduced
from tests.detector.architectures import build
from tests.detector.tiny_models import difference, token_ids

TOKENS = 40
"""More than two windows or chunks of attention."""

SAME = 1e-4
"""Float32, several layers deep: eager attention itself is up to 2e-5 from the same model in float64, and the routers
of experts amplify rounding."""


@dataclass(frozen=True)
class OverCache:
    """Of one run over a cache. Differences are largest ones, see `difference`."""

    eager: float
    """From what is captured to the sums of its own eager maps of the same steps."""

    forward: float
    """From what is captured to one forward over the same text."""


@dataclass
class Finding:
    """Of one family. Differences are largest ones, see `difference`."""

    model_type: str
    class_name: str
    rival: str
    """Attention that transformers chooses for it: `sdpa` or `eager`."""

    refusal: str | None = None
    """Why nothing is captured, or only by the fallback; as raised."""

    fallback: bool = False
    """Whether it is captured by its own eager maps."""

    mechanisms: tuple[str, ...] = ()
    """Of its attention, in words."""

    eager: float = 0.0
    """From what is captured to the sums of its own eager maps."""

    logits: float = 0.0
    """From its logits under capture to those without, relative to the largest."""

    broken: dict[str, float] = field(default_factory=dict)
    """From its own eager maps, with one mechanism switched off."""

    over_cache: dict[str, OverCache | str] = field(default_factory=dict)
    """Of each of RUNS, or why there is none."""


@cache
def find(model_type: str) -> Finding:
    """Run the family, once."""
    model = build(model_type)
    finding = Finding(model_type, type(model).__name__, str(model.config._attn_implementation))
    try:
        _look(model, finding)
    except DetectorError as error:
        finding.refusal = str(error)
        with suppress(DetectorError):
            _look_by_fallback(model, finding)
    return finding


def _look(model: PreTrainedModel, finding: Finding) -> None:
    ids, used = token_ids(1, TOKENS), Used()
    with used.watching():
        summary = read(model, ids)
    oracle = eager_summary(finding.model_type, ids, summary.layers)
    finding.eager = difference(summary, oracle)
    finding.logits = logits_error(model, ids)
    finding.broken = {name: broken_error(name, model, ids, oracle) for name in used.mechanisms}
    finding.mechanisms = tuple(described(model, summary, used, finding.broken))
    _run_over_cache(model, finding)


def _look_by_fallback(model: PreTrainedModel, finding: Finding) -> None:
    ids = token_ids(1, TOKENS)
    summary = read(model, ids, fallback="eager")
    finding.fallback = True
    finding.eager = difference(summary, eager_summary(finding.model_type, ids, summary.layers))
    finding.logits = logits_error(model, ids, fallback="eager")
    _run_over_cache(model, finding, fallback="eager")


def _run_over_cache(model: PreTrainedModel, finding: Finding, **options: Any) -> None:
    for name in RUNS:
        try:
            finding.over_cache[name] = run_over_cache(name, finding.model_type, model, **options)
        except DetectorError as refused:
            finding.over_cache[name] = f"refused, {refused}"
        except NoCache:
            finding.over_cache[name] = "not possible, it returns no cache"


def run_over_cache(name: str, model_type: str, model: PreTrainedModel, **options: Any) -> OverCache:
    """One of RUNS, with the options of the capture."""
    run, run_eagerly = RUNS[name]
    ran, eager = run(model, **options), eager_model(model_type)
    with _sinks_in_the_maps(eager):
        oracle = reduced(run_eagerly(eager, ran.ids), ran)
    alone = [read(model, text, **options) for text in ran.texts()]
    return OverCache(largest(ran.summaries, oracle), largest(ran.summaries, alone))


# The oracle.


@lru_cache(maxsize=1)  # a family asks several times in a row
def eager_model(model_type: str) -> PreTrainedModel:
    return build(model_type, attn_implementation="eager")


def eager_summary(model_type: str, ids: Tensor, layers: tuple[int, ...]) -> AttentionSummary:
    """Of one sequence (1, tokens): the family's own maps, reduced in float64.

    Args:
        layers: numbers of the layers with attention, where the model does not return them.
    """
    model = eager_model(model_type)
    with torch.no_grad(), _sinks_in_the_maps(model):
        found = model(ids, output_attentions=True, use_cache=False).attentions
    square = (ids.shape[1], ids.shape[1])  # linear attention returns something of another shape, or None
    maps = {index: one for index, one in enumerate(found) if one is not None and tuple(one.shape[-2:]) == square}
    if len(found) == model.config.get_text_config(decoder=True).num_hidden_layers:
        layers = tuple(maps)
    stacked = torch.cat(list(maps.values())).double().numpy()  # (layers, heads, tokens, tokens)
    return AttentionSummary(
        diagonal=np.diagonal(stacked, axis1=-2, axis2=-1).copy(), received=stacked.sum(axis=-2), layers=layers
    )


@contextmanager
def _sinks_in_the_maps(model: PreTrainedModel) -> Iterator[None]:
    """Granite SWA lets its sinks scale the output, and returns the map as it was before."""
    if not type(model).__name__.endswith("SWAForCausalLM"):
        yield
        return
    module: Any = sys.modules[type(model).__module__]
    real = module.eager_attention_forward

    def scaled(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **rest: Any) -> Any:
        output, weights = real(layer, query, key, value, mask, scaling=scaling, **rest)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ keys.transpose(-1, -2) * scaling + mask  # (batch, heads, rows, columns)
        share = torch.sigmoid(scores.logsumexp(-1) - layer.sinks[:, None])
        return output, weights * share[..., None]

    with patch.object(module, "eager_attention_forward", scaled):
        yield


# What is compared with what.


def read(model: PreTrainedModel, ids: Tensor, **options: Any) -> AttentionSummary:
    """What is captured of one sequence (1, tokens)."""
    with capture_attention(model, **options) as captured, torch.no_grad():
        model(ids)
    return captured.summaries()[0]


def logits_error(model: PreTrainedModel, ids: Tensor, **options: Any) -> float:
    with torch.no_grad():
        plain = model(ids).logits
        with capture_attention(model, **options):
            captured = model(ids).logits
    return relative(captured, plain)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))
