"""What can't be followed is refused by name, before any number is produced."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    Mamba2Config,
    Mamba2ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.errors import CaptureError, UnsupportedGeneration, UnsupportedModel
from tests.detector.tiny_models import (
    COMMON,
    GPT2_SHAPE,
    LONG,
    VOCABULARY,
    captured_forward,
    difference,
    long_model,
    new_model,
    tiny_model,
    token_ids,
)

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def require_nothing(captured: Captured) -> None:
    """No number came out."""
    with pytest.raises(CaptureError):
        captured.summaries()


# Models.


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: FalconForCausalLM(FalconConfig(**SMALL)), "FalconForCausalLM does not use"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=16, n_layer=2, n_head=4)), "BloomForCausalLM"),
        (
            lambda: Mamba2ForCausalLM(
                Mamba2Config(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8)
            ),
            "Mamba2ForCausalLM has no attention",
        ),
        (lambda: nn.Linear(2, 2), "Linear is not a transformers PreTrainedModel"),
        (lambda: torch.compile(tiny_model("llama")), "OptimizedModule is not"),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=8)),
            "encoder-decoder",
        ),
        (lambda: GPT2LMHeadModel(GPT2Config(**COMMON, **GPT2_SHAPE, add_cross_attention=True)), r"layers \[0, 0, 1"),
        (lambda: None, "NoneType"),
    ],
    ids=["falcon", "bloom", "mamba", "no model", "compiled", "t5", "cross-attention", "none"],
)
def test_models_that_cannot_be_captured(build: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        capture_attention(build())


def test_model_compiled_in_place() -> None:
    model = new_model("llama")
    model.compile()
    with pytest.raises(UnsupportedModel, match="compiled"):
        capture_attention(model)


def test_a_layer_with_attention_of_its_own() -> None:
    class OwnAttention(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    model = new_model("llama")
    model.model.layers[1].self_attn = OwnAttention()
    with pytest.raises(
        UnsupportedModel, match=r"layers \[0, 2\], its configuration has attention in layers \[0, 1, 2\]"
    ):
        capture_attention(model)


def test_a_model_that_does_not_take_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)  # as if it had only warned
    with pytest.raises(UnsupportedModel, match="kept attention 'sdpa'"), capture_attention(model):
        pass
    assert model.config._attn_implementation == "sdpa"


# Attention.


def test_encoder_is_not_causal() -> None:
    model = BertModel(BertConfig(**SMALL, intermediate_size=16)).eval()
    with capture_attention(model) as captured, pytest.raises(CaptureError, match="not causal"):
        model(token_ids(1, 5))
    require_nothing(captured)


def test_attention_made_bidirectional() -> None:
    for change in ("module", "config"):
        model = new_model("llama")
        target = model.config if change == "config" else model.model.layers[1].self_attn
        target.is_causal = False
        with capture_attention(model) as captured, pytest.raises(CaptureError, match="not causal"):
            model(token_ids(1, 5))
        require_nothing(captured)
    model = tiny_model("llama")
    with capture_attention(model) as captured, pytest.raises(CaptureError, match="not causal"):
        model(token_ids(1, 5), is_causal=False)
    require_nothing(captured)


@pytest.mark.parametrize("static", [False, True])
def test_masks_that_cannot_be_read(static: bool) -> None:
    model = tiny_model("llama")
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    whole = torch.ones_like(causal)
    with capture_attention(model) as captured:
        model(token_ids(1, 5), attention_mask=causal)  # a bool mask is fine
        assert captured.summaries()[0].token_count == 5
        for mask, reason in [
            (whole, "later"),
            (causal.float(), "mask of float32"),
            (causal.long(), "mask of int64"),
            (causal[..., :4], "shape"),
        ]:
            with pytest.raises(CaptureError, match=reason):
                model(token_ids(1, 5), attention_mask=mask)
            require_nothing(captured)
    if static:  # columns behind the newest token are as forbidden
        cache = StaticCache(config=model.config, max_cache_len=9)
        mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
        with capture_attention(model) as captured, pytest.raises(CaptureError, match="later"):
            model(token_ids(1, 1), attention_mask=mask, past_key_values=cache)
        require_nothing(captured)


def test_one_late_column_is_enough() -> None:
    mask = torch.ones(1, 1, 600, 600, dtype=torch.bool).tril()
    mask[..., 300, 301] = True
    with capture_attention(tiny_model("llama")) as captured, pytest.raises(CaptureError, match="later"):
        captured._model(token_ids(1, 600), attention_mask=mask)


def test_packed_sequences() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    for use_cache in (False, True):
        with capture_attention(tiny_model("llama")) as captured, pytest.raises(CaptureError, match="packed"):
            captured._model(token_ids(1, 5), position_ids=positions, use_cache=use_cache)
        require_nothing(captured)


def test_dropout() -> None:
    model = new_model("llama", attention_dropout=0.1).train()
    with capture_attention(model) as captured, pytest.raises(CaptureError, match=r"call model.eval\(\)"):
        model(token_ids(1, 5))
    require_nothing(captured)


def test_training_mode() -> None:
    model = new_model("gpt2", attn_pdrop=0.0).train()  # what remains is dropout outside of attention
    with (
        capture_attention(model) as captured,
        pytest.raises(CaptureError, match=r"GPT2LMHeadModel is .*model.eval\(\)"),
    ):
        model(token_ids(1, 5))
    require_nothing(captured)
    model.eval().transformer.h[1].mlp.train()
    with capture_attention(model) as captured, pytest.raises(CaptureError, match=r"transformer.h.1.mlp.dropout is in"):
        model(token_ids(1, 5))
    model.transformer.h[1].mlp.dropout.p = 0.0
    assert captured_forward(model, token_ids(1, 5))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("position_bias", torch.zeros(1)), ("cu_seq_lens_q", torch.tensor([0, 5])), ("a_new_one", 1), ("cache", object())],
)
def test_unknown_arguments_of_attention(argument: str, value: object) -> None:
    with capture_attention(tiny_model("llama")) as captured, pytest.raises(CaptureError, match=argument):
        captured._model(token_ids(1, 5), **{argument: value})
    require_nothing(captured)


def test_maps_are_not_to_be_had() -> None:
    with capture_attention(tiny_model("llama")) as captured, pytest.raises(CaptureError, match="output_attentions"):
        captured._model(token_ids(1, 5), output_attentions=True)


def test_a_part_of_the_model() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, pytest.raises(CaptureError, match="outside of a forward"):
        model.model(token_ids(1, 5))
    require_nothing(captured)


def test_a_layer_that_does_not_report() -> None:
    model = new_model("llama")
    with capture_attention(model) as captured:
        model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        with pytest.raises(CaptureError, match=r"model\.layers\.1\.self_attn did not report"):
            model(token_ids(1, 5))
    require_nothing(captured)


def test_a_layer_that_reports_twice() -> None:
    model = new_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: None)
    real = model.model.layers[1].forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        real(*args, **{**kwargs, "past_key_values": None})
        return real(*args, **kwargs)

    model.model.layers[1].forward = twice
    with capture_attention(model) as captured, pytest.raises(CaptureError, match="twice"):
        model(token_ids(1, 5))
    require_nothing(captured)


def test_layers_with_unequal_numbers_of_heads() -> None:
    model = new_model("llama")
    last = model.model.layers[2].self_attn
    last.q_proj, last.o_proj = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)
    last.num_key_value_groups = 1
    with capture_attention(model) as captured, torch.no_grad():
        model(token_ids(1, 5))
    with pytest.raises(CaptureError, match="number of heads"):
        captured.summaries()


def test_nothing_captured() -> None:
    captured = capture_attention(tiny_model("llama"))
    with pytest.raises(CaptureError, match="nothing was captured"):
        captured.summaries()
    captured.complete()


# Caches.


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


# Ways of generating.


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"generation_config": GenerationConfig(num_beams=3, max_new_tokens=4)}, "num_beams=3"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"dola_layers": "high"}, "dola_layers='high'"),
        ({"force_words_ids": [[5]], "num_beams": 1}, "force_words_ids"),
        ({"custom_generate": "somebody/loop"}, "custom_generate='somebody/loop'"),
        ({"custom_generate": lambda *_: None}, "custom_generate=function"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"token_healing": True}, "token_healing"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"negative_prompt_ids": token_ids(1, 2)}, "negative_prompt_ids"),
        ({"inputs_embeds": torch.zeros(1, 9, 16)}, "inputs_embeds"),
        ({"attention_mask": torch.ones(1, 20)}, "attention_mask has 20"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_generation_that_cannot_be_followed(options: dict[str, Any], name: str) -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, pytest.raises(UnsupportedGeneration) as caught:
        model.generate(token_ids(1, 9), **{"max_new_tokens": 4, **options})
    assert name in str(caught.value)
    require_nothing(captured)


def test_assisted_generation() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, pytest.raises(UnsupportedGeneration, match="assistant_model"):
        model.generate(token_ids(1, 9), assistant_model=tiny_model("mistral"), max_new_tokens=4)
    require_nothing(captured)


def test_options_of_the_model_itself() -> None:
    model = new_model("llama")
    model.generation_config.num_beams = 4
    with capture_attention(model) as captured, pytest.raises(UnsupportedGeneration, match="num_beams=4"):
        model.generate(token_ids(1, 9), max_new_tokens=4)
    require_nothing(captured)
    with capture_attention(model) as captured:
        model.generate(token_ids(1, 9), max_new_tokens=4, num_beams=1)
    assert captured.summaries()


def test_generate_within_generate() -> None:
    model = tiny_model("llama")

    def again(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        model.generate(ids, max_new_tokens=1)
        return scores

    with capture_attention(model), pytest.raises(CaptureError, match="one generation at a time"):
        model.generate(token_ids(1, 9), max_new_tokens=4, logits_processor=LogitsProcessorList([again]))


def test_generate_that_runs_past_the_capture() -> None:
    model = new_model("llama")
    bound = model.generate
    for generate in (bound, lambda ids, **options: type(model).generate(model, ids, **options)):
        with capture_attention(model) as captured, pytest.raises(CaptureError, match=r"call model\.generate"):
            generate(token_ids(1, 9), max_new_tokens=4)
        require_nothing(captured)
    assert bound(token_ids(1, 9), max_new_tokens=4).shape == (1, 13)  # outside of the context it does its work


def test_generate_of_the_users_own_that_loops_by_itself() -> None:
    model = new_model("llama")

    def loop(inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat([inputs, model(inputs).logits[:, -1:].argmax(-1)], dim=1)

    model.generate = loop
    with capture_attention(model), pytest.raises(CaptureError, match="stopping criteria"):
        model.generate(token_ids(1, 9))


def test_a_generation_that_was_refused_leaves_the_capture_usable() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, torch.no_grad():
        with pytest.raises(UnsupportedGeneration):
            model.generate(token_ids(1, 9), num_beams=2)
        model(token_ids(1, 5))
        first = captured.summaries()
    with capture_attention(model) as captured, torch.no_grad():
        model(token_ids(1, 5))
    assert difference(first[0], captured.summaries()[0]) == 0
