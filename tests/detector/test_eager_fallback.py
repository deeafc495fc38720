"""Layers that do not ask the attention interface are captured by their own eager maps, one at a time, when told so."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.models.bloom import modeling_bloom

from lapwing_detector import capture, eager_fallback
from lapwing_detector.capture import capture_attention
from lapwing_detector.eager_fallback import EagerFallback, reduce_map
from lapwing_detector.forward import Place
from tests.detector.architecture_findings import eager_summary
from tests.detector.architectures import build
from tests.detector.captures import SAME_MAP, STEP_BY_STEP, content, padded
from tests.detector.eager_models import FAMILIES, built, captured_eagerly, largest, read
from tests.detector.tiny_models import EOS, PAD, difference, token_ids


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts straddle several blocks of rows."""
    monkeypatch.setattr(eager_fallback, "ROWS", 7)


# What is captured.


@pytest.mark.parametrize("length", [1, 2, 7, 8, 60])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sums_are_those_of_its_own_maps(family: str, length: int) -> None:
    ids = token_ids(1, length)
    (summary,) = read(built(family), ids)
    assert difference(summary, eager_summary(family, ids, summary.layers)) < SAME_MAP


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_without_capture(family: str) -> None:
    model, ids = built(family), token_ids(2, 40)
    with torch.no_grad():
        plain = model(ids)
        with captured_eagerly(model):
            output = model(ids)
    torch.testing.assert_close(output.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert output.attentions is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_each_alone(family: str, side: str) -> None:
    assert padding_error(family, side) < SAME_MAP


def padding_error(family: str, side: str) -> float:
    model, sequences = built(family), [token_ids(1, length, seed=length)[0] for length in (30, 17, 1, 40)]
    ids, mask = padded(sequences, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"position_ids": positions} if family in ("falcon", "codegen", "gptj", "gpt_neo", "xglm") else {}
    together = read(model, ids, attention_mask=mask, **inputs)
    return largest(together, [read(model, sequence[None])[0] for sequence in sequences])


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_equals_one_forward(family: str) -> None:
    model, prompts = built(family), [token_ids(1, length, seed=length)[0] for length in (12, 3, 9)]
    ids, mask = padded(prompts, "left")
    torch.manual_seed(3)
    options = {"do_sample": True, "eos_token_id": list(EOS), "pad_token_id": PAD, "max_new_tokens": 20}
    with captured_eagerly(model) as captured:
        result = model.generate(ids, attention_mask=mask, **options)
    kept = [content(row, row_mask) for row, row_mask in zip(result, mask, strict=True)]
    assert len({len(row) for row in kept}) > 1  # they ended at different steps
    assert largest(captured.summaries(), [read(model, row[None])[0] for row in kept]) < STEP_BY_STEP


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_and_single_tokens(family: str) -> None:
    model, ids, past = built(family), token_ids(2, 30), None
    captured = captured_eagerly(model)
    for start, stop in [(0, 10), (10, 22), *((at, at + 1) for at in range(22, 30))]:
        with captured.resume(), torch.no_grad():
            past = model(ids[:, start:stop], past_key_values=past, use_cache=True).past_key_values
    assert largest(captured.summaries(), read(model, ids)) < STEP_BY_STEP


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_a_static_cache(family: str) -> None:
    model, ids = built(family), token_ids(2, 30)
    past = StaticCache(config=model.config, max_cache_len=40)
    with captured_eagerly(model) as captured, torch.no_grad():
        for start, stop in [(0, 10), (10, 22), *((at, at + 1) for at in range(22, 30))]:
            model(ids[:, start:stop], past_key_values=past)
    assert largest(captured.summaries(), read(model, ids)) < STEP_BY_STEP


def test_half_precision_is_summed_in_float32() -> None:
    (summary,) = read(build("falcon").to(torch.bfloat16), token_ids(1, 300))
    assert abs(summary.received.sum(axis=-1) - 300).max() < 1  # each row is rounded, their sum is not
    assert summary.received.dtype == summary.diagonal.dtype == "float32"


def test_a_few_heads() -> None:
    model, ids = built("falcon"), token_ids(2, 20)
    with capture_attention(model, heads={1: [0, 2], 3: [1]}, fallback="eager") as captured, torch.no_grad():
        model(ids)
    for few, every in zip(captured.summaries(), read(model, ids), strict=True):
        assert few.layers == (1, 3)
        np.testing.assert_array_equal(few.received[0, [0, 2]], every.received[1, [0, 2]])
        np.testing.assert_array_equal(few.diagonal[1, 1], every.diagonal[3, 1])
        assert np.isnan(few.diagonal[1, [0, 2, 3]]).all()


# One map at a time.


class LiveMaps:
    """How many numbers of earlier maps are alive whenever a layer hands one over."""

    def __init__(self) -> None:
        self.maps: list[weakref.ref[Tensor]] = []
        self.largest = 0

    def __call__(self, real: Callable[..., Any], fallback: EagerFallback, layer: Any, *call: Any) -> Any:
        """In place of `EagerFallback._take`."""
        self.maps.append(weakref.ref(call[-1][1]))
        result = real(fallback, layer, *call)
        del call
        self.largest = max(self.largest, sum(one.numel() for ref in self.maps if (one := ref()) is not None))
        return result


def live_numbers(monkeypatch: pytest.MonkeyPatch, keep: bool) -> int:
    live, real, kept = LiveMaps(), EagerFallback._take, []

    def taking(self: EagerFallback, layer: Any, *call: Any) -> Any:
        kept.append(call[-1][1] if keep else None)
        return live(real, self, layer, *call)

    monkeypatch.setattr(EagerFallback, "_take", taking)
    read(built("bloom"), token_ids(1, 50))
    assert len(live.maps) == 4
    return live.largest


def test_no_more_than_one_map_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live_numbers(monkeypatch, keep=False) <= 4 * 50 * 50  # of one layer: 4 heads


def test_control_maps_that_are_kept_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live_numbers(monkeypatch, keep=True) == 4 * 4 * 50 * 50


# Controls.


@pytest.mark.parametrize("side", ["left", "right"])
def test_control_rows_of_padding_counted(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    def all_count(layer: Any, attention: Tensor, mask: Tensor, place: Place) -> Any:
        return reduce_map(layer, attention, torch.ones_like(mask), replace(place, counted=None))

    monkeypatch.setattr(capture, "reduce_map", all_count)
    assert padding_error("falcon", side) > 0.01


def test_control_alibi(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(1, 40)
    (summary,) = read(built("bloom"), ids)
    real = modeling_bloom._get_alibi_slopes
    monkeypatch.setattr(modeling_bloom, "_get_alibi_slopes", lambda *call: 0 * real(*call))
    assert difference(summary, eager_summary("bloom", ids, summary.layers)) > 0.01


def test_control_window() -> None:
    ids = token_ids(1, 40)
    (summary,) = read(built("gpt_neo"), ids)
    model = build("gpt_neo")
    for block in model.transformer.h:
        block.attn.attention.bias.copy_(torch.ones(512, 512).tril().bool())  # every second layer sees 16 tokens
    assert difference(read(model, ids)[0], summary) > 0.01
