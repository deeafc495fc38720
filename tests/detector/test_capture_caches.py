"""Whatever cache a text is fed through, past the window's edge too, its sums are those of its own eager maps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError
from lapwing_detector.summary import AttentionSummary
from tests.detector.architectures import build
from tests.detector.captures import STEP_BY_STEP, generated, padded
from tests.detector.tiny_models import captured_forward, difference, new_model, tiny_model, token_ids

STEPS = ((0, 20), (20, 26), *((at, at + 1) for at in range(26, 36)))
"""A prompt past the window of 16, a chunk of it, and single tokens."""

TOKENS = STEPS[-1][1]

WINDOWED = ("mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "olmo3", "cohere2")
HYBRID = ("granitemoehybrid", "qwen3_next", "zaya")
FAMILIES = ("llama", *WINDOWED, *HYBRID)

built = cache(build)


def recording(config: PreTrainedConfig) -> DynamicCache:
    """Keeps what falls out of the window, so that it could be cropped."""
    made = DynamicCache(config=config)
    made.activate_past_recording()
    return made


CACHES: dict[str, Callable[[PreTrainedConfig], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "all keys": lambda config: DynamicCache(),  # no layer slides, only the mask does
    "static": lambda config: StaticCache(config=config, max_cache_len=TOKENS + 5),
    "recording": recording,
}

KNOWS_NO_LAYERS = {(family, "all keys") for family in HYBRID}
"""A cache without the configuration does not know which layers have no attention."""

CANNOT_RECORD = {("zaya", "recording")}
"""Its own forward fails."""


def fed(model: PreTrainedModel, ids: Tensor, past: Cache, **inputs: Any) -> list[Any]:
    """What the model returns at each of STEPS."""
    with torch.no_grad():
        return [model(ids[:, start:stop], past_key_values=past, use_cache=True, **inputs) for start, stop in STEPS]


def captured_over(model: PreTrainedModel, ids: Tensor, past: Cache) -> list[AttentionSummary]:
    with capture_attention(model) as captured:
        fed(model, ids, past)
    return captured.summaries()


def eager_over(model: PreTrainedModel, ids: Tensor, past: Cache, absolute: bool = True) -> list[AttentionSummary]:
    """The oracle: the model's own eager maps over such a cache, laid where their rows and columns belong.

    Args:
        absolute: otherwise the first key of a sliding cache is taken for the first of the text.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        outputs = fed(model, ids, past, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    found = [[one for one in output.attentions if one is not None] for output in outputs]
    batch, heads = found[0][0].shape[:2]
    whole = np.zeros((len(found[0]), batch, heads, TOKENS, TOKENS))
    for (start, stop), maps in zip(STEPS, found, strict=True):
        for layer, one in enumerate(maps):  # (batch, heads, rows, keys)
            columns = min(one.shape[-1], stop)  # a static cache has more
            first = stop - columns if absolute else 0
            whole[layer, :, :, start:stop, first : first + columns] = one[..., :columns].double().numpy()
    layers = captured_forward(model, ids)[0].layers
    diagonal, received = np.diagonal(whole, axis1=-2, axis2=-1), whole.sum(axis=-2)
    return [AttentionSummary(diagonal[:, row], received[:, row], layers) for row in range(batch)]


def largest(one: list[AttentionSummary], other: list[AttentionSummary]) -> float:
    return max(difference(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_over_every_cache(family: str, kind: str) -> None:
    if (family, kind) in KNOWS_NO_LAYERS | CANNOT_RECORD:
        with pytest.raises((IndexError, RuntimeError)):  # of transformers, captured or not
            fed(built(family), token_ids(2, TOKENS), CACHES[kind](built(family).config))
        return
    model, ids = built(family), token_ids(2, TOKENS)
    config = model.config.get_text_config(decoder=True)
    summaries = captured_over(model, ids, CACHES[kind](config))
    assert largest(summaries, eager_over(model, ids, CACHES[kind](config))) < STEP_BY_STEP
    assert largest(summaries, captured_forward(model, ids)) < STEP_BY_STEP


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama4_text"])
def test_control_positions_in_a_sliding_cache_are_not_those_of_the_text(family: str, kind: str) -> None:
    model, ids = built(family), token_ids(2, TOKENS)
    summaries = captured_over(model, ids, CACHES[kind](model.config))
    assert largest(summaries, eager_over(model, ids, CACHES[kind](model.config), absolute=False)) > 0.01


# Quantised and offloaded caches.


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_over_a_quantised_cache(backend: str) -> None:
    model, ids = built("llama"), token_ids(2, TOKENS)
    try:
        caches = [QuantizedCache(backend, model.config) for _ in range(2)]
    except ImportError as missing:
        pytest.skip(f"transformers makes none without a package of its own: {missing}")
    summaries = captured_over(model, ids, caches[0])
    assert largest(summaries, eager_over(model, ids, caches[1])) < STEP_BY_STEP
    # The keys are rounded, so it is another attention than that of one forward.
    assert largest(summaries, captured_forward(model, ids)) > 0.01


def test_windows_have_no_quantised_cache() -> None:
    with pytest.raises(ValueError, match="only full attention"):
        QuantizedCache("fp8", built("mistral").config)


def test_generating_with_a_quantised_cache() -> None:
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "eos_token_id": None}
    captured, result, _ = generated(tiny_model("llama"), [token_ids(1, 20)[0]], **options)
    (summary,) = captured.summaries()
    assert summary.token_count == result.shape[1] == 60
    np.testing.assert_allclose(summary.received.sum(axis=-1), 60, rtol=1e-5)


def offloaded(kind: Any, config: PreTrainedConfig) -> Cache:
    options = {"max_cache_len": TOKENS} if kind is StaticCache else {}
    return kind(config=config, offloading=True, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU there is none, as the next test shows")
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_over_an_offloaded_cache(kind: Any) -> None:
    model, ids = build("mistral").to("cuda"), token_ids(2, TOKENS).to("cuda")
    summaries = captured_over(model, ids, offloaded(kind, model.config))
    assert largest(summaries, captured_forward(model, ids)) < STEP_BY_STEP


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch is built for a GPU, and would say something else")
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_there_is_no_offloaded_cache_on_a_cpu(kind: Any) -> None:
    model, ids = built("mistral"), token_ids(2, TOKENS)
    # Of transformers, which asks for a stream of CUDA whatever the device is, captured or not.
    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        fed(model, ids, offloaded(kind, model.config))
    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        captured_over(model, ids, offloaded(kind, model.config))


@pytest.mark.parametrize("name", ["dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked"])
def test_generating_with_a_cache_by_its_name(name: str) -> None:
    for family in ("llama", "mistral"):
        captured, result, _ = generated(
            tiny_model(family), [token_ids(1, 20)[0]], cache_implementation=name, eos_token_id=None
        )
        whole = captured_forward(tiny_model(family), result)
        assert largest(captured.summaries(), whole) < STEP_BY_STEP  # the newest token's row too


def test_a_cache_that_does_not_tell_its_length() -> None:
    model = built("minimax")  # asks its first layer, which has no attention
    with capture_attention(model), torch.no_grad():
        past = model(token_ids(1, 9)).past_key_values
        with pytest.raises(CaptureError, match="sees 10 keys, where 1 tokens are known of"):
            model(token_ids(1, 1), past_key_values=past)


# Several sequences.


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_padding_between_a_text_and_its_continuation(family: str, kind: str) -> None:
    model = tiny_model(family)
    prompts = [token_ids(1, length, seed=length)[0] for length in (20, 13)]
    ids, mask = padded(prompts, "right")
    more = token_ids(2, 6, seed=1)
    past = CACHES[kind](model.config)
    with capture_attention(model) as captured, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=past)
        for at in range(6):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            model(more[:, at : at + 1], attention_mask=mask, position_ids=positions, past_key_values=past)
    alone = [
        captured_forward(model, torch.cat([prompt, rest])[None])[0] for prompt, rest in zip(prompts, more, strict=True)
    ]
    assert largest(captured.summaries(), alone) < STEP_BY_STEP


@pytest.mark.parametrize("kind", ["dynamic", "static", "all keys"])
@pytest.mark.parametrize("family", WINDOWED)
def test_padding_on_the_left_of_a_window(family: str, kind: str) -> None:
    model = built(family)
    texts = [token_ids(1, length, seed=length)[0] for length in (TOKENS, 23)]
    ids, mask = padded(texts, "left")
    past = CACHES[kind](model.config)
    with capture_attention(model) as captured, torch.no_grad():
        for start, stop in STEPS:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:stop]
            model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=past)
    alone = [captured_forward(model, text[None])[0] for text in texts]
    assert largest(captured.summaries(), alone) < STEP_BY_STEP


def test_another_text_in_between_ends_the_first() -> None:
    model = tiny_model("mistral")
    with capture_attention(model) as captured, torch.no_grad():
        first = model(token_ids(1, 20)).past_key_values
        model(token_ids(1, 20, seed=1))
        with pytest.raises(CaptureError, match="another cache"):
            model(token_ids(1, 1), past_key_values=first)
    assert largest(captured.summaries(), captured_forward(model, token_ids(1, 20, seed=1))) == 0


def test_two_models_generate_in_two_threads() -> None:
    prompts = {family: [token_ids(1, 12, seed=seed)[0] for seed in range(2)] for family in ("llama", "mistral")}
    errors: list[float] = []

    def work(family: str, options: dict[str, str]) -> None:
        model = new_model(family)
        for _ in range(3):
            captured, result, _ = generated(model, prompts[family], eos_token_id=None, **options)
            errors.append(largest(captured.summaries(), captured_forward(model, result)))

    threads = [
        threading.Thread(target=work, args=("llama", {})),
        threading.Thread(target=work, args=("mistral", {"cache_implementation": "static"})),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 6
    assert max(errors) < STEP_BY_STEP
