"""Which modules of a model compute attention, and at which layer. Runs nothing and changes nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lapwing_detector.errors import InvalidInput, UnsupportedModel

WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})
"""Kinds of layers of hybrid models that have no attention map."""


@dataclass(frozen=True)
class AttentionLayer:
    """One module that computes attention."""

    index: int
    """Layer of the model, counted from 0, layers without attention included."""

    name: str
    """Name of the module in the model, such as `model.layers.0.self_attn`."""

    module: nn.Module


def attention_layers(model: object) -> tuple[AttentionLayer, ...]:
    """Every attention of a decoder, in the order of its layers.

    Raises:
        UnsupportedModel: some attention of the model can't be captured.
    """
    checked = _checked(model)
    found = tuple(
        AttentionLayer(_layer_index(checked, name), name, module)
        for name, module in checked.named_modules()
        if uses_attention_interface(type(module))
    )
    _compare_with_config(checked, found)
    return tuple(sorted(found, key=lambda layer: layer.index))


def kept_heads(
    layers: tuple[AttentionLayer, ...], heads: Mapping[int, Collection[int]] | None
) -> dict[int, tuple[int, ...]] | None:
    """Layer index -> heads to keep, ascending; None for all of all layers.

    Raises:
        InvalidInput: a layer that has no attention, a negative head, or none at all.
    """
    if heads is None:
        return None
    known = [layer.index for layer in layers]
    for index, wanted in heads.items():
        if index not in known:
            raise InvalidInput("heads", f"names layer {index}; the layers with attention are {known}")
        if any(head < 0 for head in wanted):
            raise InvalidInput("heads", f"names head {min(wanted)} of layer {index}; heads count from 0")
    kept = {index: tuple(sorted(set(heads[index]))) for index in known if heads.get(index)}
    if not kept:
        raise InvalidInput("heads", "names no head; leave it out to capture all of them")
    return kept


def require_heads(layer: AttentionLayer, kept: Collection[int], heads: int) -> None:
    """The layer must have the heads that are to be kept.

    Raises:
        InvalidInput: it has fewer.
    """
    if max(kept) >= heads:
        raise InvalidInput("heads", f"names head {max(kept)} of layer {layer.index}, which has {heads}, from 0")


def uses_attention_interface(kind: type[nn.Module]) -> bool:
    """Whether the forward of this class asks transformers' attention interface for its attention function."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _checked(model: object) -> PreTrainedModel:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{name} is not a transformers PreTrainedModel; give the model itself, without a wrapper "
            "(for PEFT: model.merge_and_unload())"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; only decoder models have one causal attention map")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel(f"{name} is compiled, so its attention can't be switched; load it without compile()")
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedModel(
            f"{name} does not use transformers' attention interface, so its attention can't be captured; "
            "use a family that does, such as Llama, Qwen3, Mistral, Gemma 2, Phi-3, GPT-2 or GPT-NeoX"
        )
    return model


def _layer_index(model: PreTrainedModel, name: str) -> int:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if number is None:
        raise UnsupportedModel(
            f"{type(model).__name__}: attention {name!r} belongs to no numbered layer, so its map has no place; "
            "use a plain decoder"
        )
    return int(number.group(1))


def _compare_with_config(model: PreTrainedModel, found: tuple[AttentionLayer, ...]) -> None:
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no attention that goes through transformers' interface")
    indices = sorted(layer.index for layer in found)
    expected = _expected_indices(model.config.get_text_config(decoder=True))
    if indices != expected:
        raise UnsupportedModel(
            f"{type(model).__name__}: attention goes through transformers' interface in layers {indices}, "
            f"its configuration has attention in layers {expected}; every one must be captured, exactly once: "
            "use the plain decoder, without cross-attention or layers of your own"
        )
    for layer in found:
        if getattr(layer.module, "config", None) is None:
            raise UnsupportedModel(f"{type(model).__name__}: {layer.name} has no config to switch its attention by")


def _expected_indices(config: Any) -> list[int]:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return list(range(config.num_hidden_layers))
    return [index for index, kind in enumerate(kinds) if kind not in WITHOUT_ATTENTION]
