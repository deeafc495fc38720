"""The eager fallback is never taken silently, refuses what has no causal map, and leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, StaticCache

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError, InvalidInput, UnsupportedModel
from tests.detector.architecture_findings import eager_summary
from tests.detector.architectures import build
from tests.detector.captures import SAME_MAP, require_nothing
from tests.detector.eager_models import FAMILIES, built, captured_eagerly, largest, read
from tests.detector.tiny_models import PAD, captured_forward, difference, new_model, token_ids

# Never silently.


@pytest.mark.parametrize("family", FAMILIES)
def test_without_being_told_so_it_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=r'does not use .* capture_attention\(model, fallback="eager"\)'):
        capture_attention(built(family))


@pytest.mark.parametrize("family", ["rwkv", "mamba", "mvp"])
def test_where_it_would_not_help_it_is_not_named(family: str) -> None:
    for fallback in (None, "eager"):
        with pytest.raises(UnsupportedModel) as caught:
            capture_attention(built(family), fallback=fallback)
        assert "fallback" not in str(caught.value)


def test_an_unknown_fallback() -> None:
    with pytest.raises(InvalidInput, match="fallback: is 'slow'"):
        capture_attention(built("falcon"), fallback="slow")  # type: ignore[arg-type]


def test_where_the_interface_is_asked_it_changes_nothing() -> None:
    model, ids = new_model("llama"), token_ids(1, 30)
    with captured_eagerly(model) as captured, torch.no_grad():
        assert model.config._attn_implementation.startswith("lapwing_capture")
        model(ids)
    assert largest(captured.summaries(), captured_forward(model, ids)) == 0


def test_keys_that_are_selected_by_what_they_hold() -> None:
    model, ids = built("qwen4_exp_text"), token_ids(1, 40)
    with pytest.raises(UnsupportedModel, match=r"kind 'indexed_attention'.*fallback"):
        capture_attention(model)
    (summary,) = read(model, ids)
    assert summary.token_count == 40  # tokens that do not see themselves are no padding
    assert (summary.diagonal == 0).any()
    assert difference(summary, eager_summary("qwen4_exp_text", ids, summary.layers)) < SAME_MAP


# Refused.


def test_attention_that_is_not_causal() -> None:
    model = build("megatron-bert")
    model.config.is_decoder = model.bert.config.is_decoder = False
    with captured_eagerly(model) as captured, torch.no_grad(), pytest.raises(CaptureError, match="later tokens"):
        model(token_ids(1, 5))
    require_nothing(captured)


def test_maps_that_are_not_finite_are_no_attention_to_later_tokens() -> None:
    model = build("falcon")
    with torch.no_grad():
        model.transformer.h[1].self_attention.query_key_value.weight.fill_(torch.nan)
    (summary,) = read(model, token_ids(1, 9))
    assert np.isfinite(summary.received[0]).all()
    assert np.isnan(summary.received[1]).all()


def test_a_cache_that_the_model_itself_gets_wrong() -> None:
    model = built("gpt_neo")  # its window lies at the end of a static cache, not at the newest token
    past = StaticCache(config=model.config, max_cache_len=40)
    with captured_eagerly(model) as captured, torch.no_grad(), pytest.raises(CaptureError, match="what is no token"):
        model(token_ids(2, 10), past_key_values=past)
    require_nothing(captured)


def test_attention_to_padding() -> None:
    model, mask = build("falcon"), torch.ones(1, 5, dtype=torch.long)
    mask[0, 0] = 0
    model.transformer.h[2].register_forward_pre_hook(
        lambda layer, args, kwargs: (args, {**kwargs, "attention_mask": torch.zeros(1, 1, 5, 5)}), with_kwargs=True
    )
    with captured_eagerly(model) as captured, torch.no_grad(), pytest.raises(CaptureError, match=r"h\.2.* to padding"):
        model(token_ids(1, 5), attention_mask=mask)
    require_nothing(captured)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("cpmant", "72 rows, where 40 tokens"), ("xlnet", "returned no map"), ("big_bird", "did not report")],
)
def test_layers_without_one_row_per_token(family: str, reason: str) -> None:
    with captured_eagerly(built(family)) as captured, torch.no_grad(), pytest.raises(CaptureError, match=reason):
        built(family)(token_ids(1, 40))
    require_nothing(captured)


def test_maps_are_not_to_be_had() -> None:
    for family in ("falcon", "codegen"):
        with captured_eagerly(built(family)), pytest.raises(CaptureError, match="output_attentions"):
            built(family)(token_ids(1, 5), output_attentions=True)


def test_masks_of_another_shape() -> None:
    with captured_eagerly(built("falcon")), pytest.raises(CaptureError, match=r"must be \(batch, tokens\), here"):
        built("falcon")(token_ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


def test_a_part_of_the_model() -> None:
    model = built("falcon")
    with captured_eagerly(model) as captured, torch.no_grad():
        for _ in range(2):  # before a forward and after it
            with pytest.raises(CaptureError, match="a part of"):
                model.transformer(token_ids(1, 5))
            model(token_ids(1, 5))
    assert captured.summaries()[0].token_count == 5


@pytest.mark.parametrize("family", ["openai-gpt", "xlm"])
def test_generating_without_a_cache(family: str) -> None:
    settings = GenerationConfig(max_new_tokens=3, pad_token_id=PAD)
    with captured_eagerly(built(family)), pytest.raises(CaptureError, match="generates without a cache"):
        built(family).generate(token_ids(1, 9), generation_config=settings)


def test_two_captures_at_once() -> None:
    model = build("falcon")
    first, second = captured_eagerly(model), captured_eagerly(model)
    with first:
        with pytest.raises(CaptureError, match="already"), second:
            pass
        with torch.no_grad():
            model(token_ids(1, 5))
    assert first.summaries()[0].token_count == 5


def test_leaving_restores_the_model() -> None:
    model = build("falcon")
    layer = model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before = hooks(model), model.config._attn_implementation
    with captured_eagerly(model):
        assert hooks(model) != before[0]
        assert model.config._attn_implementation == "eager"
    for run in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ZeroDivisionError), captured_eagerly(model):
            run(token_ids(1, 5))
        assert (hooks(model), model.config._attn_implementation) == before
    layer.remove()
    assert read(model, token_ids(1, 5))[0].token_count == 5


def hooks(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
