"""Caches that were filled or changed outside of the capture are refused by name, and never counted as captured."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError
from tests.detector.captures import require_nothing
from tests.detector.tiny_models import LONG, captured_forward, difference, long_model, new_model, tiny_model, token_ids


def filled(family: str = "llama", tokens: int = 9, batch: int = 1) -> DynamicCache:
    cache = DynamicCache(config=tiny_model(family).config)
    with torch.no_grad():
        tiny_model(family)(token_ids(batch, tokens), past_key_values=cache)
    return cache


def test_cache_filled_outside() -> None:
    model, cache = tiny_model("llama"), filled()
    with capture_attention(model) as captured, pytest.raises(CaptureError, match="9 tokens, 0 of them"):
        model(token_ids(1, 1), past_key_values=cache)
    require_nothing(captured)
    with capture_attention(model) as captured, pytest.raises(CaptureError, match="9 tokens, 0 of them"):
        model.generate(token_ids(1, 12), past_key_values=cache, max_new_tokens=3)
    require_nothing(captured)


def test_cache_given_by_position() -> None:
    model, cache = tiny_model("llama"), filled()
    with capture_attention(model), pytest.raises(CaptureError, match="9 tokens, 0 of them"):
        model(token_ids(1, 1), None, None, cache)


def crop(cache: DynamicCache) -> None:
    cache.crop(-2)


def crop_and_fill(cache: DynamicCache) -> None:
    cache.crop(-2)
    model = new_model("llama")
    model(token_ids(2, 2), past_key_values=cache)


def reorder(cache: DynamicCache) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def select(cache: DynamicCache) -> None:
    cache.batch_select_indices(torch.tensor([0]))


def fill_again(cache: StaticCache) -> None:
    cache.reset()  # keeps the tensors
    tiny_model("llama")(torch.cat([token_ids(2, 8, seed=1), token_ids(2, 9)[:, 8:]], dim=1), past_key_values=cache)


def nothing(cache: Any) -> None: ...


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((DynamicCache, change) for change in (crop, crop_and_fill, reorder, select, copy.deepcopy, nothing)),
        *((StaticCache, change) for change in (fill_again, reorder, copy.deepcopy, nothing)),
    ],
)
def test_cache_changed_outside(kind: Any, change: Any, inference: bool) -> None:
    model = tiny_model("llama")
    captured = capture_attention(model)
    cache = kind(config=model.config, **({"max_cache_len": 12} if kind is StaticCache else {}))
    with captured, torch.inference_mode(inference), torch.no_grad():
        model(token_ids(2, 9), past_key_values=cache)
    with torch.inference_mode(inference), torch.no_grad():
        cache = change(cache) or cache
    rows = cache.layers[0].keys.shape[0]
    refused = pytest.raises(CaptureError, match=r"holds 7|was cropped|another cache")
    outcome = nullcontext() if change is nothing else refused
    with outcome, captured.resume(), torch.inference_mode(inference), torch.no_grad():
        model(token_ids(rows, 1), past_key_values=cache)


def test_control_a_refilled_static_cache_is_known_by_its_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapwing_detector.cache_mark._written", lambda cache: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_cache_changed_outside(StaticCache, fill_again, inference=False)


@pytest.mark.parametrize(("kind", "filled"), [("longrope", LONG), ("dynamic", LONG), ("dynamic", LONG + 5)])
def test_cache_with_other_frequencies(kind: str, filled: int) -> None:
    model, ids = long_model(kind), token_ids(1, LONG + 8)
    with capture_attention(model) as captured, torch.no_grad():
        cache = model(ids[:, :filled]).past_key_values
        with pytest.raises(CaptureError, match=f"{kind} .* beyond {LONG} tokens.* in one forward"):
            model(ids[:, filled : filled + 1], past_key_values=cache)
        model(ids)
    assert captured.summaries()[0].token_count == LONG + 8


def test_generation_that_ends_where_the_frequencies_change() -> None:
    model = long_model("longrope")
    with capture_attention(model) as captured:
        model.generate(token_ids(1, 9), max_new_tokens=LONG - 8, eos_token_id=None)
    for _ in range(2):
        with pytest.raises(CaptureError, match="longrope"):
            captured.summaries()
    with capture_attention(model) as captured:
        result = model.generate(token_ids(1, 9), max_new_tokens=LONG - 7, eos_token_id=None)
    assert difference(captured.summaries()[0], captured_forward(model, result)[0]) < 1e-4


def test_frequencies_change_by_position_and_not_by_column() -> None:
    model, mask = long_model("longrope"), torch.ones(1, 9)
    mask[:, :3] = 0
    options = {"attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    with capture_attention(model) as captured:
        with pytest.raises(CaptureError, match="longrope"):
            model.generate(token_ids(1, 9), max_new_tokens=40, **options)
        model.generate(token_ids(1, 9), max_new_tokens=LONG - 6, **options)  # one column beyond, but no position
    assert captured.summaries()[0].token_count == LONG


def test_a_refused_step_leaves_what_was_captured() -> None:
    model, other = tiny_model("llama"), filled()
    with capture_attention(model) as captured:
        result = model.generate(token_ids(1, 9), max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True)
        with pytest.raises(CaptureError, match="were captured"):
            model(token_ids(1, 1), past_key_values=other)
    assert captured.summaries()[0].token_count == 14
    with capture_attention(model) as captured:
        result = model.generate(token_ids(1, 9), max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True)
    result.past_key_values.crop(-2)
    for _ in range(2):  # never 13 of 14 tokens
        with pytest.raises(CaptureError, match="were captured"):
            captured.summaries()


def test_forward_that_failed_is_not_gone_on_with() -> None:
    model = new_model("llama")
    with capture_attention(model) as captured, torch.no_grad():
        cache = model(token_ids(1, 9)).past_key_values
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token_ids(1, 1), past_key_values=cache)
        handle.remove()
        require_nothing(captured)
        with pytest.raises(CaptureError, match="did not finish"):
            model(token_ids(1, 1), past_key_values=cache)
        model(token_ids(1, 4))  # new sequences are fine
    assert captured.summaries()[0].token_count == 4


def test_queries_behind_a_past_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr("lapwing_detector.switch.sdpa_mask", lambda **_: None)
    with capture_attention(model) as captured, torch.no_grad():
        cache = model(token_ids(1, 9)).past_key_values
        with pytest.raises(CaptureError, match="no mask"):
            model(token_ids(1, 3), past_key_values=cache)
        require_nothing(captured)


def test_full_static_cache_given_by_hand() -> None:
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=12)
    with capture_attention(model) as captured:
        model.generate(token_ids(1, 9), past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    for _ in range(2):
        with pytest.raises(CaptureError, match="max_cache_len=13"):
            captured.summaries()


def test_ended_sequences_do_not_go_on() -> None:
    model = tiny_model("llama")
    torch.manual_seed(3)
    with capture_attention(model) as captured:
        result = model.generate(token_ids(4, 9), max_new_tokens=30, do_sample=True, return_dict_in_generate=True)
        assert captured._sequences.any_ended
        with pytest.raises(CaptureError, match="have ended"):
            model(result.sequences[:, -1:], past_key_values=result.past_key_values)
        ids = torch.cat([result.sequences, token_ids(4, 3)], dim=1)
        for chunk in (None, 2):
            with pytest.raises(CaptureError, match="have ended"):
                model.generate(ids, past_key_values=result.past_key_values, max_new_tokens=5, prefill_chunk_size=chunk)
    with capture_attention(model) as captured:  # those that have not ended do go on
        result = model.generate(token_ids(4, 9), max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True)
        ids = torch.cat([result.sequences, token_ids(4, 3)], dim=1)
        model.generate(ids, past_key_values=result.past_key_values, max_new_tokens=5, eos_token_id=None)
    assert [summary.token_count for summary in captured.summaries()] == [22] * 4
