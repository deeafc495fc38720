"""A tiny random model of every causal language model class of transformers, built from its configuration.

Knows configurations only: what is captured of these models is for others to find out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.detector.tiny_models import BOS, EOS, PAD, VOCABULARY, WINDOW

LAYERS = 4

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": list(EOS),
    **dict.fromkeys(
        ["initializer_range", "init_std"], 0.5
    ),  # with the usual 0.02 attention is so flat that no mechanism makes a difference
    "is_decoder": True,  # or BERT and its like would see later tokens
    "tie_word_embeddings": False,
    # Attention.
    **dict.fromkeys(["num_hidden_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head"], 4),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "lru_width"], 16),
    **dict.fromkeys(["word_embed_proj_dim", "embedding_size", "input_embedding_size", "output_embedding_size"], 16),
    **dict.fromkeys(["head_dim", "swa_head_dim", "kv_channels", "dim_head"], 8),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads"], 2),
    "max_position_embeddings": 512,
    **dict.fromkeys(["sliding_window", "attention_chunk_size", "attention_window_size", "window_size"], WINDOW),
    "use_sliding_window": True,
    "max_window_layers": 2,
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": 3.0,
    # Latent and indexed attention: keys of 8 + 4, values of 6.
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_nope_head_dim"], 8),
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    **dict.fromkeys(["index_topk", "index_block_size"], 8),
    "index_head_dim": 16,
    "index_n_heads": 2,
    # Layers without attention.
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_heads"], 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_dt_rank"], 4),
    **dict.fromkeys(["mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "block_size"], 16),
    **dict.fromkeys(["mamba_n_groups", "n_groups"], 1),
    "mamba_d_ssm": 32,
    # Feed-forward layers and experts.
    **dict.fromkeys(["intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "ffn_hidden_size"], 32),
    **dict.fromkeys(["ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff", "d_inner"], 32),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size", "router_hidden_size"], 16),
    **dict.fromkeys(["n_routed_experts", "num_local_experts", "num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "zero_expert_num"], 2),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace"], 1),
    # Embeddings beside those of the tokens.
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "dim_model_base": 16,
}
"""By the name of the field, for every configuration that has it."""

LEFT_OUT = ...
"""In place of a value of SMALL: the configuration keeps its own."""

ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
BLOCKS = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, "head_dim": LEFT_OUT}
LATENT = {"head_dim": LEFT_OUT, "num_key_value_heads": 4}
ROTARY = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
INDEXER = {f"indexer_{name}": size for name, size in [("n_heads", 2), ("kv_heads", 1), ("head_dim", 8)]}

OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, **HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": ["full_attention"] * LAYERS, **ROTARY},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},  # the last is no field, but asked for
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "dots3_note_text": {**LATENT, "layer_types": ["indexed_attention"] * LAYERS},
    "falcon": {"head_dim": LEFT_OUT},
    "gemma3_text": ALTERNATING,
    "gemma3n_text": {**ALTERNATING, "num_kv_shared_layers": 2, "intermediate_size": [32] * LAYERS},
    "gemma4_text": ALTERNATING,
    "gemma4_unified_text": ALTERNATING,
    "git": {"num_image_with_embedding": 1},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": LAYERS, "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**HYBRID, "position_embedding_type": "rope"},
    "helium": {"head_dim": 4},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "inkling2_text": {"eos_token_id": EOS[0]},
    "inkling_text": {"eos_token_id": EOS[0]},
    "kimi_linear": {**LATENT, **HYBRID},
    "laguna": ALTERNATING,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**LATENT, "num_layers": 2},
    "mamba2": {"num_heads": 4},
    "mellum": ALTERNATING,
    "minicpm3": LATENT,
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "modernbert-decoder": {"local_attention": WINDOW, **ALTERNATING},
    "mpt": {"use_cache": True},
    "olmo_hybrid": HYBRID,
    "prophetnet": {
        "num_hidden_layers": LEFT_OUT,
        **{f"num_{part}_{what}": 4 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    },
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {**INDEXER, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "roc_bert": {f"{what}_{size}": 8 for what in ("shape", "pronunciation") for size in ("embed_dim", "vocab_size")},
    "xlm": {"causal": True},
    "xlnet": {"max_position_embeddings": LEFT_OUT},
    "zamba": {**BLOCKS, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": BLOCKS,
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type: what its configuration needs besides, or in place of, SMALL."""

ODD = {
    "blt": "reads bytes in patches through four models of its own",
    "gemma3n": "its part for images needs the package timm; the one for text is gemma3n_text",
    "gemma4_assistant": "drafts tokens for another model and reads that model's cache",
    "gemma4_unified_assistant": "drafts tokens for another model and reads that model's cache",
    "musicgen": "its configuration is of an encoder and a decoder of sounds",
    "musicgen_melody": "its configuration is of an encoder and a decoder of sounds",
    "reformer": "takes texts of one length only",
}
"""By model type: those that can't be built from a configuration alone, and why."""


def model_types() -> dict[str, str]:
    """Class name -> model type, for every class that transformers calls a causal language model."""
    # Where several share a class the last one is its own: llama behind internlm3, qwen3_5_text behind qwen3_5.
    return {name: model_type for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def build(model_type: str, **options: Any) -> PreTrainedModel:
    """A new model in evaluation mode, the same at every call.

    Args:
        options: such as `attn_implementation`, which transformers chooses otherwise.
    """
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_configuration(CONFIG_MAPPING[model_type]), **options)
    for parameter in model.parameters():
        if not parameter.any():  # biases, sinks and temperatures start at zero, where they make no difference
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def _configuration(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    values = {name: value for name, value in SMALL.items() if name in names} | OWN.get(kind.model_type, {})
    if kind.sub_configs:
        default = kind()
        parts = {name: getattr(default, name, None) for name in kind.sub_configs}
        values = {name: _configuration(type(part)) for name, part in parts.items() if part is not None} | values
    return kind(**{name: value for name, value in values.items() if value is not LEFT_OUT})
