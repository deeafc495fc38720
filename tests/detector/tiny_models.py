"""Tiny random models of every family that is tested, and the oracle: their own eager attention, reduced in float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lapwing_detector.capture import capture_attention
from lapwing_detector.summary import AttentionSummary

VOCABULARY = 97
PAD, BOS = 0, 1
EOS = tuple(range(2, 12))
"""So many that sampled answers of one batch end at different steps."""

WINDOW = 16

# With the default of 0.02 attention is so flat that leaving a mechanism out changes nothing.
COMMON = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.5,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": list(EOS),
    "tie_word_embeddings": False,
}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2_SHAPE = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 512}
NEOX_SHAPE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
WINDOWED = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING}
CAPPED = {"query_pre_attn_scalar": 6, "attn_logit_softcapping": 3.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "attn_implementation": "eager"}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SHAPE),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**SHAPE, "head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {**SHAPE, "sliding_window": WINDOW}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**SHAPE, **WINDOWED, **CAPPED, "attn_implementation": "eager"}),
    "phi3": (Phi3ForCausalLM, Phi3Config, SHAPE),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {**GPT2_SHAPE, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, NEOX_SHAPE),
}
"""The seven families that are tested throughout."""

OTHERS = {
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {**SHAPE, **WINDOWED, **EXPERTS}),
    "lfm2": (Lfm2ForCausalLM, Lfm2Config, {**SHAPE, "layer_types": ["conv", "full_attention", "conv"]}),
}
"""Learned sinks; a hybrid whose layers have not all attention."""

LONG = 32
"""Longest text of `long_model` with the frequencies of short ones."""


@cache
def tiny_model(family: str) -> PreTrainedModel:
    """The model of a family in evaluation mode, the same at every call; leave it as it is."""
    return new_model(family)


def new_model(family: str, **changes: object) -> PreTrainedModel:
    """A model of its own, to be changed at will."""
    kind, config, shape = {**FAMILIES, **OTHERS}[family]
    torch.manual_seed(7)
    return kind(config(**{**COMMON, **shape, **changes})).eval()


def long_model(kind: str) -> PreTrainedModel:
    """A Phi-3 with `longrope` or a Llama with `dynamic` rotary embeddings: other frequencies beyond LONG tokens."""
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "dynamic":
        return new_model("llama", max_position_embeddings=LONG, rope_parameters={**rope, "factor": 8.0})
    factors = {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2, "original_max_position_embeddings": LONG}
    return new_model("phi3", original_max_position_embeddings=LONG, rope_parameters={**rope, **factors})


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids of the given shape, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(EOS) + 1, VOCABULARY, shape, generator=generator)


def captured_forward(model: PreTrainedModel, ids: torch.Tensor, **inputs: object) -> list[AttentionSummary]:
    """What is captured of one forward."""
    with capture_attention(model) as captured, torch.no_grad():
        model(ids, **inputs)
    return captured.summaries()


def eager_forward(model: PreTrainedModel, ids: torch.Tensor) -> AttentionSummary:
    """The oracle: of one sequence (1, tokens) alone."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    kept = [(index, layer) for index, layer in enumerate(_by_layer(model, maps)) if layer is not None]
    stacked = torch.stack([layer[0] for _, layer in kept]).double().numpy()  # (layers, heads, tokens, tokens)
    return AttentionSummary(
        diagonal=np.diagonal(stacked, axis1=-2, axis2=-1).copy(),
        received=stacked.sum(axis=-2),
        layers=tuple(index for index, _ in kept),
    )


def _by_layer(model: PreTrainedModel, maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    if len(maps) == len(kinds):
        return list(maps)
    rest = iter(maps)
    return [next(rest) if kind.endswith("attention") else None for kind in kinds]


def difference(left: AttentionSummary, right: AttentionSummary) -> float:
    """Largest difference: absolute for the diagonal, relative above 1 for the sums, which grow with T."""
    if left.diagonal.shape != right.diagonal.shape or left.layers != right.layers:
        return float("inf")
    if left.token_count == 0:
        return 0.0
    diagonal = np.abs(left.diagonal.astype(np.float64) - right.diagonal).max()
    received = np.abs(left.received.astype(np.float64) - right.received) / np.maximum(1.0, np.abs(right.received))
    return float(max(diagonal, received.max()))
