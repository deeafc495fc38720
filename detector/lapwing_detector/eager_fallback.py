"""Attention layers that run eagerly by themselves: each hands over its whole map, which is reduced at once and dropped.

For families that do not ask transformers' attention interface. Slower, and it needs the memory of one layer's map.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from inspect import signature, unwrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lapwing_detector.errors import CaptureError, UnsupportedModel

if TYPE_CHECKING:
    from lapwing_detector.forward import Place
    from lapwing_detector.layers import AttentionLayer

ROWS = 256
"""Rows of a map that are looked at together: a copy of the whole would be as large as the map."""

ASKED = "output_attentions"
"""Argument by which most layers are asked for their map."""

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


def computes_a_map(module: nn.Module) -> bool:
    """Whether it is an attention of its own: named so, with a softmax in its class, and none within it."""
    kind = type(module)
    within = any("Attention" in type(child).__name__ for child in module.modules() if child is not module)
    return "Attention" in kind.__name__ and not within and any("softmax" in one.lower() for one in _names(kind))


def _names(kind: type) -> Iterator[str]:
    """What the methods of a class ask for, those of its bases included."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for method in vars(base).values():
            code = getattr(unwrap(method), "__code__", None) if callable(method) else None
            yield from () if code is None else code.co_names


class EagerFallback:
    """Eager attention in force from `on` to `off`, with every map given to a function and to nobody else."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Iterable[AttentionLayer],
        function: Callable[[AttentionLayer, Tensor, Tensor], None],
    ) -> None:
        """Nothing is changed yet.

        Args:
            function: called with a layer, its map (batch, heads, rows, columns) and the mask (batch or 1, 1, rows,
                columns), bool, that the model was told of: a column may be seen and is none later than the row.
        """
        self._model = model
        self._layers = tuple(layers)
        self._function = function
        self._configs = _configs(model, self._layers)
        self._parameters = {layer.module: tuple(signature(layer.module.forward).parameters) for layer in self._layers}
        self._undo = ExitStack()
        self._given: Tensor | None = None
        self._fed = self._past = 0
        self._masks: dict[int, Tensor] = {}
        for layer in self._layers:
            if "Flash" in type(layer.module).__name__:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {layer.name} computes no map, it is a {type(layer.module).__name__}; "
                    "load the model with attn_implementation='eager'"
                )

    def on(self) -> None:
        """Let every layer run eagerly and hand over its map.

        Raises:
            CaptureError: another capture is active on this model.
        """
        modules = {layer.module for layer in self._layers}
        with _lock, ExitStack() as stack:
            if any(module in _active for module in modules):
                raise CaptureError(
                    f"the attention of this {type(self._model).__name__} is being captured already; leave that "
                    "context first"
                )
            for config in self._configs:
                stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
                config._attn_implementation_internal = "eager"
            for layer in self._layers:
                before, after = partial(self._ask, layer), partial(self._take, layer)
                stack.callback(layer.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.module.register_forward_hook(after).remove)
                stack.callback(_active.discard, layer.module)
                _active.add(layer.module)
            self._undo = stack.pop_all()

    def off(self) -> None:
        """Put everything back as it was."""
        with _lock:
            self._undo.close()

    def begin(self, inputs: Mapping[str, Any], past: int) -> None:
        """A forward of the model begins.

        Args:
            inputs: its arguments by name.
            past: tokens in its cache.

        Raises:
            CaptureError: its attention_mask is not (batch, tokens).
        """
        mask = inputs.get("attention_mask")
        fed = next(value for name in ("input_ids", "inputs_embeds") if (value := inputs.get(name)) is not None)
        self._fed, self._past, self._masks = int(fed.shape[1]), past, {}
        if mask is not None and tuple(mask.shape) != (fed.shape[0], past + self._fed):
            raise CaptureError(
                f"attention_mask has the shape {tuple(mask.shape)}; with eager attention it must be (batch, tokens), "
                f"here {(int(fed.shape[0]), past + self._fed)}"
            )
        self._given = None if mask is None else mask.bool()

    def _ask(
        self, layer: AttentionLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a layer's forward: it is to return its map."""
        parameters = self._parameters[module]
        if ASKED not in parameters:  # it returns the map always
            return args, kwargs
        place = parameters.index(ASKED)
        if args[place] if place < len(args) else kwargs.get(ASKED):
            raise CaptureError(f"{ASKED}=True, but the maps are dropped when they are summed up; leave it out")
        if place < len(args):
            return (*args[:place], True, *args[place + 1 :]), kwargs
        return args, {**kwargs, ASKED: True}

    def _take(self, layer: AttentionLayer, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a layer's forward: its map goes to the function, and nothing to the model."""
        second = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
        if not isinstance(second, Tensor) or second.ndim != 4:
            raise CaptureError(
                f"{layer.name} returned no map (batch, heads, rows, columns) beside its output; "
                "its attention can't be captured"
            )
        if second.shape[2] != self._fed:
            raise CaptureError(
                f"{layer.name} has a map of {second.shape[2]} rows, where {self._fed} tokens were fed to the model; "
                "every token must have one row, and a part of the model can't be called by itself"
            )
        self._function(layer, second.detach(), self._mask(second))
        return type(output)([output[0], None, *output[2:]])

    def _mask(self, attention: Tensor) -> Tensor:
        """The same object for all layers with as many columns."""
        columns, tokens = attention.shape[-1], self._past + self._fed
        if columns not in self._masks:
            used = min(columns, tokens)  # a static cache has more, a sliding one starts behind the first token
            causal = torch.ones(self._fed, columns, dtype=torch.bool, device=attention.device).tril_(used - self._fed)
            mask = causal[None, None]  # (1, 1, rows, columns)
            if self._given is not None:
                seen = self._given[:, tokens - used :].to(attention.device)  # (batch, used)
                mask = mask & nn.functional.pad(seen, (0, columns - used))[:, None, None, :]
            self._masks[columns] = mask
        return self._masks[columns]


def reduce_map(layer: AttentionLayer, attention: Tensor, mask: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """The two sums of one layer's map.

    Args:
        attention: (batch, heads, rows, columns); a static cache has more columns than tokens.
        mask: (batch or 1, 1, rows, columns) bool, what a row may see at most.
        place: where the rows lie.

    Returns:
        diagonal (batch, heads, rows) and received (batch, heads, place.columns), float32.

    Raises:
        CaptureError: a row that counts attends to something else.
    """
    every = attention.new_ones(1, attention.shape[2], dtype=torch.bool)
    counted = every if place.counted is None else place.counted.to(attention.device)  # (batch or 1, rows)
    received = attention.new_zeros(*attention.shape[:2], attention.shape[-1], dtype=torch.float32)
    for start in range(0, attention.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        block = attention[:, :, rows].float()
        counts = counted[:, None, None, rows]  # (batch or 1, 1, 1, rows)
        hidden = counts.transpose(-1, -2) & ~mask[..., rows, :]
        if bool((block.nan_to_num() * hidden).any()):  # NaN says nothing of where it comes from
            raise CaptureError(
                f"{layer.name} attends to later tokens, to padding or to what is no token; only causal attention has "
                "a triangular map"
            )
        received += (counts.to(block) @ block).squeeze(-2)
    # A copy in float32 as well: a view would keep the whole map.
    diagonal = attention.diagonal(offset=place.first, dim1=-2, dim2=-1).to(torch.float32, copy=True)
    return diagonal, received[..., : place.columns]


def _configs(model: PreTrainedModel, layers: Iterable[AttentionLayer]) -> list[Any]:
    """Those that the model, its submodels and its layers ask for the implementation of attention."""
    modules = [*(one for one in model.modules() if isinstance(one, PreTrainedModel)), *(one.module for one in layers)]
    found = [getattr(module, "config", None) for module in modules]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())
