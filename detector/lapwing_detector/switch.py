"""Puts functions of our own in the place of a model's, and takes them back. Does not know what they do."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lapwing_detector.errors import CaptureError, UnsupportedModel
from lapwing_detector.layers import AttentionLayer

PREFIX = "lapwing_capture_"
"""Start of the name of every attention function that is registered here; each capture has its own."""

OUTSIDE = "the capture of attention keeps sums between calls; compile without fullgraph=True"
"""Why a compiler of forwards leaves the function out of its graphs."""

_numbers = itertools.count()
_lock = threading.Lock()


class AttentionSwitch:
    """One attention function under a name of its own, in force from `on` to `off`; nothing stays afterwards."""

    def __init__(self, model: PreTrainedModel, layers: Iterable[AttentionLayer], function: Callable[..., Any]) -> None:
        self.name = f"{PREFIX}{next(_numbers)}"
        self._model = model
        self._layers = tuple(layers)
        outside: Any = torch.compiler.disable
        self._function = outside(function, reason=OUTSIDE)
        self._configs = _distinct_configs(model, self._layers)
        self._verified: list[Any] = []
        self._before: list[tuple[Any, str | None]] = []

    def on(self) -> None:
        """Register the function and let the model use it.

        Raises:
            CaptureError: another capture is active on this model.
            UnsupportedModel: the model did not take the function.
        """
        with _lock:
            self._refuse_second()
            self._before = [(config, config._attn_implementation) for config in self._configs]
            AttentionInterface.register(self.name, self._function)
            # Without a mask function of the same name attention would silently not be causal.
            AttentionMaskInterface.register(self.name, sdpa_mask)
            try:
                self._switch()
            except BaseException:
                self._restore()
                raise

    def off(self) -> None:
        """Put everything back as it was."""
        with _lock:
            self._restore()

    def _refuse_second(self) -> None:
        for config in self._configs:
            if str(config._attn_implementation).startswith(PREFIX):
                raise CaptureError(
                    f"the attention of this {type(self._model).__name__} (or of a model that shares its config) "
                    "is being captured already; leave that context first"
                )

    def _switch(self) -> None:
        if self._verified:  # entered before: the same configs will do, without walking the model again
            for config in self._verified:
                config._attn_implementation_internal = self.name
            return
        self._model.set_attn_implementation(self.name)
        for layer in self._layers:
            in_force = layer.module.config._attn_implementation  # type: ignore[union-attr]
            if in_force != self.name:
                raise UnsupportedModel(
                    f"{type(self._model).__name__}: {layer.name} kept attention {in_force!r} instead of taking "
                    f"{self.name!r}; its attention can't be captured"
                )
        self._verified = [config for config in self._configs if config._attn_implementation == self.name]

    def _restore(self) -> None:
        for config, implementation in self._before:
            config._attn_implementation_internal = implementation
        self._before = []
        # The interfaces' own `del` only knows local overrides, and `register` writes to the class.
        AttentionInterface._global_mapping.pop(self.name, None)
        AttentionMaskInterface._global_mapping.pop(self.name, None)


def shadow(thing: object, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put a function in the place of a method of one object; returns what undoes it.

    Args:
        function: called with the original and then with the arguments of the call.
    """
    original, own = getattr(thing, name), thing.__dict__.get(name)

    @wraps(original)
    def instead(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    def undo() -> None:
        del thing.__dict__[name]
        if own is not None:
            thing.__dict__[name] = own

    thing.__dict__[name] = instead
    return undo


def _distinct_configs(model: PreTrainedModel, layers: Iterable[AttentionLayer]) -> list[Any]:
    """The configs of the model, of its submodels and of its attention, and all that these contain."""
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    waiting += [layer.module.config for layer in layers]
    configs: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in configs:
            continue
        configs[id(config)] = config
        waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(configs.values())
