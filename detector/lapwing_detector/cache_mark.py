"""Recognises a key-value cache between two forwards: the same object, of the same length, with nobody's hand in it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from lapwing_detector.errors import CaptureError


def past_length(cache: Any) -> int:
    """Tokens in the cache; 0 without one."""
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise CaptureError(f"past_key_values is a {type(cache).__name__}; it must be a transformers Cache")
    return int(cache.get_seq_length())


def cache_in(output: Any) -> Cache | None:
    """The cache in what a forward returned, if there is one."""
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def decoder_cache(cache: Cache) -> Cache:
    """The cache of the decoder's attention to itself, where it comes together with one of attention to an encoder."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def require_room(cache: Cache, tokens: int) -> None:
    """One more token must fit.

    Raises:
        CaptureError: a static cache is full.
    """
    for layer in decoder_cache(cache).layers:
        size = int(layer.get_max_length())
        if size != -1 and not getattr(layer, "is_sliding", False) and size < tokens + 1:
            raise CaptureError(
                f"the static cache holds {size} tokens and is full, but the newest token still needs its row; "
                f"make it one longer: max_cache_len={tokens + 1}"
            )


class CacheMark:
    """Remembers a cache as a forward left it, without keeping its memory."""

    def __init__(self, cache: Cache) -> None:
        cache = decoder_cache(cache)
        keys = _keys(cache)
        self.inference = keys is not None and keys.is_inference()
        """Whether it was filled in inference mode, so that it can only be filled on there."""
        self._cache = weakref.ref(cache)
        self._keys = None if keys is None else weakref.ref(keys)
        self._written = _written(cache)

    def require(self, cache: Cache) -> None:
        """The cache must be the one that was marked, untouched.

        Raises:
            CaptureError: it is not.
        """
        cache = decoder_cache(cache)
        if self._cache() is not cache:
            raise CaptureError(
                "past_key_values is another cache than the one that the captured forward filled; go on with that one "
                "or start from an empty cache"
            )
        # Cropping, reordering, repeating or selecting sequences replaces the keys; a static cache keeps the tensor.
        replaced = self._keys is not None and self._keys() is not _keys(cache)
        written = None if self._written is None else _written(cache)
        if replaced or (self._written is not None and written is not None and not self._written.equal(written)):
            raise CaptureError(
                "the cache was cropped, reordered or filled since the captured forward, so the sums would mix "
                "sequences; start from an empty cache"
            )


def _keys(cache: Cache) -> Tensor | None:
    """The keys of the last layer, as the object whose identity tells that nobody replaced it."""
    if cache.offloading:  # moving it between devices replaces it, too
        return None
    for layer in reversed(cache.layers):  # whose keys depend on all the tokens before
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and not getattr(layer, "record_past", False):
            return keys
    return None


def _written(cache: Cache) -> Tensor | None:
    """(batch, columns) sums over the keys of a cache that is written in place."""
    keys = _keys(cache)
    if keys is None or not cache.is_compileable:
        return None
    return keys.detach().sum(dim=(1, 3), dtype=torch.float32)
