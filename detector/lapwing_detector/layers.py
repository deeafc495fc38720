"""Which modules of a model compute attention, and at which layer. Runs nothing and changes nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lapwing_detector.eager_fallback import computes_a_map
from lapwing_detector.errors import InvalidInput, UnsupportedModel

WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})
"""Kinds of layers of hybrid models that have no attention map."""

WITH_ATTENTION = frozenset(
    {"attention", "full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}
)
"""Kinds of layers in which every token sees itself, and the keys before it by their place alone."""

EXPECTED_HEADS = "give a mapping of layers to their heads, whole numbers, such as {0: [2, 5]} or probe.heads"


@dataclass(frozen=True)
class AttentionLayer:
    """One module that computes attention."""

    index: int
    """Layer of the model, counted from 0, layers without attention included."""

    name: str
    """Name of the module in the model, such as `model.layers.0.self_attn`."""

    module: nn.Module


def attention_layers(model: object) -> tuple[AttentionLayer, ...]:
    """Every attention of a decoder that goes through transformers' attention interface, in the order of its layers.

    Raises:
        UnsupportedModel: some attention of the model can't be captured; names the fallback where it could.
    """
    checked = _checked(model)
    reason = _why_not_by_interface(checked)
    if reason is not None:
        raise UnsupportedModel(f"{reason}; {_mend(checked)}")
    found = _found(checked, _asks_interface, "goes through transformers' interface")
    for layer in found:
        if getattr(layer.module, "config", None) is None:
            raise UnsupportedModel(f"{type(checked).__name__}: {layer.name} has no config to switch its attention by")
    return found


def eager_layers(model: object) -> tuple[AttentionLayer, ...] | None:
    """Every attention of a decoder that can't be captured by the interface; None for a decoder that can.

    Raises:
        UnsupportedModel: some attention of the model can't be captured by its eager maps either.
    """
    checked = _checked(model)
    return None if _why_not_by_interface(checked) is None else _eager(checked)


def kept_heads(
    layers: tuple[AttentionLayer, ...], heads: Mapping[int, Collection[int]] | None
) -> dict[int, tuple[int, ...]] | None:
    """Layer index -> heads to keep, ascending; None for all of all layers.

    Raises:
        InvalidInput: a layer that has no attention, a negative head, or none at all.
    """
    if heads is None:
        return None
    if not isinstance(heads, Mapping):
        raise InvalidInput("heads", f"is {heads!r}; {EXPECTED_HEADS}")
    known = [layer.index for layer in layers]
    for index, wanted in heads.items():
        if not isinstance(index, Integral) or not _are_whole_numbers(wanted):
            raise InvalidInput("heads", f"holds {index!r}: {wanted!r}; {EXPECTED_HEADS}")
        if index not in known:
            raise InvalidInput("heads", f"names layer {index}; the layers with attention are {known}")
        if any(head < 0 for head in wanted):
            raise InvalidInput("heads", f"names head {min(wanted)} of layer {index}; heads count from 0")
    kept = {index: tuple(sorted({int(head) for head in heads[index]})) for index in known if len(heads.get(index, ()))}
    if not kept:
        raise InvalidInput("heads", "names no head; leave it out to capture all of them")
    return kept


def _are_whole_numbers(wanted: object) -> bool:
    return (
        isinstance(wanted, Collection)
        and getattr(wanted, "ndim", 1) == 1
        and all(isinstance(head, Integral) for head in wanted)
    )


def require_heads(layer: AttentionLayer, kept: Collection[int], heads: int) -> None:
    """The layer must have the heads that are to be kept.

    Raises:
        InvalidInput: it has fewer.
    """
    if max(kept, default=0) >= heads:
        raise InvalidInput("heads", f"names head {max(kept)} of layer {layer.index}, which has {heads}, from 0")


@cache
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
    return model


def _why_not_by_interface(model: PreTrainedModel) -> str | None:
    name = type(model).__name__
    if not type(model)._can_set_attn_implementation():
        return f"{name} does not use transformers' attention interface, so its attention can't be captured"
    for index, kind in enumerate(_kinds(model.config.get_text_config(decoder=True)) or ()):
        # Where a layer selects its keys by what they hold, a token need not see itself, and would look like padding.
        if kind not in WITH_ATTENTION and kind not in WITHOUT_ATTENTION:
            return f"{name}: layer {index} is of the kind {kind!r}, which is not known here"
    return None


def _mend(model: PreTrainedModel) -> str:
    try:
        _eager(model)
    except UnsupportedModel:
        return "use a family that does, such as Llama, Qwen3, Mistral, Gemma 2, Phi-3, GPT-2 or GPT-NeoX"
    return 'its layers can run eagerly, which is slower: capture_attention(model, fallback="eager")'


def _eager(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    return _found(model, lambda module: _asks_interface(module) or computes_a_map(module), "computes maps")


def _asks_interface(module: nn.Module) -> bool:
    kind: Any = type(module)
    return uses_attention_interface(kind)


def _found(model: PreTrainedModel, computes: Callable[[nn.Module], bool], how: str) -> tuple[AttentionLayer, ...]:
    named = [(name, module) for name, module in model.named_modules() if computes(module)]
    expected = _expected_indices(model.config.get_text_config(decoder=True))
    inside = _decoder_modules(model) if len(named) != len(expected) else ()
    found = tuple(
        AttentionLayer(_layer_index(model, name), name, module)
        for name, module in named
        if not inside or module in inside
    )
    _compare_with_config(model, found, how)
    return tuple(sorted(found, key=lambda layer: layer.index))


def _decoder_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Those of the decoder: not of the towers beside it that read images or sounds."""
    untyped: Any = model
    decoder = untyped.get_decoder()
    # Where a family calls something else its decoder, it is no model.
    return set((decoder if isinstance(decoder, PreTrainedModel) else model).modules())


def _layer_index(model: PreTrainedModel, name: str) -> int:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if number is None:
        raise UnsupportedModel(
            f"{type(model).__name__}: attention {name!r} belongs to no numbered layer, so its map has no place; "
            "use a plain decoder"
        )
    return int(number.group(1))


def _compare_with_config(model: PreTrainedModel, found: tuple[AttentionLayer, ...], how: str) -> None:
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no attention that {how}")
    indices = sorted(layer.index for layer in found)
    expected = _expected_indices(model.config.get_text_config(decoder=True))
    if indices != expected:
        raise UnsupportedModel(
            f"{type(model).__name__}: attention {how} in layers {indices}, "
            f"its configuration has attention in layers {expected}; every one must be captured, exactly once: "
            "use the plain decoder, without cross-attention or layers of your own"
        )


def _expected_indices(config: Any) -> list[int]:
    kinds = _kinds(config)
    if kinds is None:
        return list(range(config.num_hidden_layers))
    return [index for index, kind in enumerate(kinds) if kind not in WITHOUT_ATTENTION]


def _kinds(config: Any) -> list[str] | None:
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
