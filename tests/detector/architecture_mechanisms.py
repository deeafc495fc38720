"""The mechanisms of attention that a model asks for, and how each is switched off: in the arguments of `attend`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector import reading
from lapwing_detector.summary import AttentionSummary
from tests.detector.tiny_models import captured_forward, difference

MATTERS = 1e-2
"""What leaving out a mechanism does to the sums, at least; rounding is below 1e-4."""

ATTEND = reading.attend


class Used:
    """What the layers of a model ask of `attend`."""

    def __init__(self) -> None:
        self.mechanisms: list[str] = []
        self.grouped = self.own_scale = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        with patch.object(reading, "attend", self._watched):
            yield

    def _watched(self, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Any:
        self.grouped |= query.shape[1] != key.shape[1]
        self.own_scale |= not np.isclose(rest["scaling"], query.shape[-1] ** -0.5)
        asked = {"window": True, "scale": True, "head order": key.shape[1] > 1}
        asked |= {"soft-cap": rest.get("softcap") is not None, "sinks": rest.get("sinks") is not None}
        self.mechanisms += [name for name, one in asked.items() if one and name not in self.mechanisms]
        return ATTEND(query, key, value, **rest)


def _everything_visible(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, **{name: None for name in ("mask", "starts") if name in given}}


def _another_scale(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "scaling": 1.0 if given["scaling"] != 1.0 else given["query"].shape[-1] ** -0.5}


SWITCHED_OFF: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "window": _everything_visible,
    "soft-cap": lambda given: {**given, "softcap": None},
    "sinks": lambda given: {**given, "sinks": None},
    "scale": _another_scale,
    "head order": lambda given: {**given, "key": given["key"].flip(1)},
}


def broken_error(mechanism: str, model: PreTrainedModel, ids: Tensor, oracle: AttentionSummary) -> float:
    """From what is captured with one mechanism switched off to what should be."""

    def broken(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Any:
        return ATTEND(**SWITCHED_OFF[mechanism]({"query": query, "key": key, "value": value, **rest}))

    with patch.object(reading, "attend", broken):
        return difference(captured_forward(model, ids)[0], oracle)


def described(model: PreTrainedModel, summary: AttentionSummary, used: Used, broken: dict[str, float]) -> Iterator[str]:
    """The mechanisms, in words; a window is one only where it hides something."""
    config = model.config.get_text_config(decoder=True)
    if broken["window"] > MATTERS:
        chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        yield "chunks" if chunked else "window"
    yield from (name for name in ("soft-cap", "sinks") if name in broken)
    if used.own_scale:
        yield "own scale"
    if getattr(config, "kv_lora_rank", None):
        yield "latent"
    if used.grouped:
        yield "grouped heads"
    if summary.layers != tuple(range(config.num_hidden_layers)):
        yield "layers without attention"
