"""Models and attention that can't be followed are refused by name, before any number is produced."""

from __future__ import annotations

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
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError, UnsupportedModel
from tests.detector.captures import require_nothing
from tests.detector.tiny_models import (
    COMMON,
    GPT2_SHAPE,
    VOCABULARY,
    captured_forward,
    new_model,
    tiny_model,
    token_ids,
)

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


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


def test_attention_made_bidirectional_between_two_contexts() -> None:
    model = new_model("llama")
    with capture_attention(model) as captured:
        model(token_ids(1, 5))
    model.model.layers[1].self_attn.is_causal = False
    with captured.resume(), pytest.raises(CaptureError, match="not causal"):
        model(token_ids(1, 5))


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


@pytest.mark.parametrize("p", [0.1, pytest.param(0.0, id="control: it drops nothing")])
def test_dropout_that_comes_between_two_contexts(p: float) -> None:
    model, ids = new_model("gpt2").eval(), token_ids(1, 5)
    with capture_attention(model) as captured:
        cache = model(ids, use_cache=True).past_key_values
    model.transformer.h[1].mlp.dropout = nn.Dropout(p).train()
    with captured.resume(), nullcontext() if p == 0 else pytest.raises(CaptureError, match=r"h\.1\.mlp\.dropout is in"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


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
