"""What a model and its capture hold in memory at any length, by what they hold of a short text. An estimate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapwing_detector.cache_mark import cache_in, decoder_cache
from lapwing_detector.doctor.layers import reaches
from lapwing_detector.doctor.patient import Patient


@dataclass(frozen=True)
class Memory:
    """What a model and its capture hold, of one text."""

    weights: int
    """Bytes, with buffers."""

    heads: tuple[int, ...]
    """Of each captured layer."""

    cache: list[tuple[float, int | None, int]] | None
    """See `cache_sizes`."""

    masked: tuple[int, ...]
    """Tokens from which on each kind of layer has a mask of its own."""

    itemsize: int
    """Bytes of a number of the model."""

    makes_maps: bool

    @classmethod
    def of(cls, patient: Patient) -> Memory:
        """By one short forward under capture, and one with a cache."""
        model = patient.model
        with torch.inference_mode(), patient.capture() as captured:
            patient.language_model.forward(patient.tokens(len(patient.ids)), use_cache=False)
        return cls(
            _bytes([*model.parameters(), *model.buffers()]),
            tuple(captured.sums.heads.values()),
            cache_sizes(patient),
            tuple(reaches(model).values()),
            model.dtype.itemsize,
            patient.makes_maps,
        )

    def at(self, tokens: int) -> dict[str, int | None]:
        """Bytes by what they are for, their total with the weights, and what all whole maps would be instead."""
        cache = None if self.cache is None else cached_bytes(self.cache, tokens)
        # Two float32 of every layer, head and token.
        sums = 8 * sum(self.heads) * tokens
        masks, one_map = self.masks(tokens), max(self.heads) * tokens**2 * self.itemsize if self.makes_maps else 0
        return {
            "cache_bytes": cache,
            "sums_bytes": sums,
            "masks_bytes": masks,
            "map_bytes": one_map,
            "total_bytes": self.weights + (cache or 0) + sums + masks + one_map,
            "maps_bytes": sum(self.heads) * tokens**2 * self.itemsize,
        }

    def masks(self, tokens: int) -> int:
        """Bytes of the masks (tokens, tokens), which layers of one kind share.

        transformers makes a bool one as soon as the text is as long as the window or chunk; full attention of one text
        needs none. Eager attention has one that is added to the scores, and the fallback a bool one to check by.
        """
        if self.makes_maps:
            return tokens**2 * (self.itemsize + 1)
        return tokens**2 * sum(tokens >= reach for reach in self.masked)


def cache_sizes(patient: Patient) -> list[tuple[float, int | None, int]] | None:
    """For each layer: bytes of keys and values a token, its window if it slides, and bytes that do not grow.

    None for a model that fills no cache.
    """
    count = len(patient.ids)
    with torch.inference_mode():
        cache = cache_in(patient.language_model.forward(patient.tokens(count), use_cache=True))
    if cache is None:
        return None
    return [_layer_size(layer, count) for layer in decoder_cache(cache).layers]


def _layer_size(layer: Any, count: int) -> tuple[float, int | None, int]:
    window = getattr(layer, "sliding_window", None)
    growing = [getattr(layer, name, None) for name in ("keys", "values")]
    fixed = [one for name in ("conv_states", "recurrent_states") for one in getattr(layer, name, {}).values()]
    return _bytes(growing) / _held(count, window), window, _bytes(fixed)


def _held(tokens: int, window: int | None) -> int:
    """A sliding cache leaves out the token whose step it is."""
    return tokens if window is None else min(tokens, window - 1)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))


def cached_bytes(sizes: list[tuple[float, int | None, int]], tokens: int) -> int:
    """Of the key-value cache of one text; see `cache_sizes`."""
    return round(sum(each * _held(tokens, window) + fixed for each, window, fixed in sizes))
