"""What becomes of a model family under capture: how far it is from its own eager maps, or why it is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
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
from tests.detector.architectures import build
from tests.detector.captures import padded
from tests.detector.tiny_models import PAD, difference, token_ids

TOKENS = 40
"""More than two windows or chunks of attention."""

CHUNKS = ((0, 20), (20, 26), *((at, at + 1) for at in range(26, 31)))
"""A prompt past the window's edge in two parts, then single tokens."""

PROMPTS, NEW = (12, 7), 6
"""Lengths of the prompts of one batch, and how many tokens are generated: past the window's edge."""

SAME = 1e-4
"""Float32, several layers deep: eager attention itself is up to 2e-5 from the same model in float64, and the routers
of experts amplify rounding."""


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

    over_cache: dict[str, float | str] = field(default_factory=dict)
    """From what is captured of `generating` and of `chunks` to one forward, or why it is refused."""

    own: dict[str, float] = field(default_factory=dict)
    """Where `over_cache` is large: from its logits without capture to those of one forward, relative to the largest."""


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
    for name, (captured, own) in RUNS.items():
        try:
            finding.over_cache[name] = error = captured(model, **options)
        except DetectorError as refused:
            finding.over_cache[name] = str(refused)
        else:
            if error > SAME:
                finding.own[name] = own(model)


# The oracle.


def eager_summary(model_type: str, ids: Tensor, layers: tuple[int, ...]) -> AttentionSummary:
    """Of one sequence (1, tokens): the family's own maps, reduced in float64.

    Args:
        layers: numbers of the layers with attention, where the model does not return them.
    """
    model = build(model_type, attn_implementation="eager")
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


def feed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """CHUNKS over one cache; logits (batch, tokens, vocabulary)."""
    past, logits = None, []
    with torch.no_grad():
        for start, stop in CHUNKS:
            output = model(ids[:, start:stop], past_key_values=past, use_cache=True)
            past = getattr(output, "past_key_values", None)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def chunks_error(model: PreTrainedModel, **options: Any) -> float:
    ids = token_ids(2, CHUNKS[-1][1], seed=1)
    with capture_attention(model, **options) as captured:
        feed(model, ids)
    whole = [read(model, row[None], **options) for row in ids]
    return max(difference(one, other) for one, other in zip(captured.summaries(), whole, strict=True))


def own_chunks_error(model: PreTrainedModel) -> float:
    ids = token_ids(2, CHUNKS[-1][1], seed=1)
    with torch.no_grad():
        return relative(feed(model, ids), model(ids).logits)


def generate(model: PreTrainedModel) -> Any:
    """Of PROMPTS, padded on the left."""
    ids, mask = padded([token_ids(1, length, seed=length)[0] for length in PROMPTS], "left")
    torch.manual_seed(3)
    options = {"do_sample": True, "eos_token_id": None, "pad_token_id": PAD}
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True, **options
    )


def unpadded(sequences: Tensor) -> list[Tensor]:
    """(1, tokens) each."""
    return [row[None, max(PROMPTS) - length :] for length, row in zip(PROMPTS, sequences, strict=True)]


def generation_error(model: PreTrainedModel, **options: Any) -> float:
    with capture_attention(model, **options) as captured:
        sequences = generate(model).sequences
    alone = [read(model, ids, **options) for ids in unpadded(sequences)]
    return max(difference(one, other) for one, other in zip(captured.summaries(), alone, strict=True))


def own_generation_error(model: PreTrainedModel) -> float:
    result = generate(model)
    with torch.no_grad():
        alone = [model(ids).logits[:, -NEW - 1 : -1] for ids in unpadded(result.sequences)]
    return relative(torch.stack(result.logits, dim=1), torch.cat(alone))


RUNS = {"generating": (generation_error, own_generation_error), "chunks": (chunks_error, own_chunks_error)}
