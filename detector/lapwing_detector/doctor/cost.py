"""What capturing a model takes at several lengths: memory by what it holds, time by what was measured. An estimate."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lapwing_detector.cache_mark import cache_in, decoder_cache
from lapwing_detector.doctor.clock import read, seconds, without_collection
from lapwing_detector.doctor.layers import layer_kinds, sliding_window
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.verdict import Check

LENGTHS = (1024, 8192, 32768)
"""For which memory and time are estimated."""

MEASURED = (128, 256, 512, 1024, 2048)
"""At which time is measured, as long as it stays below PATIENCE."""

PATIENCE = 0.3
"""Seconds of one forward from which on no longer one is measured, and none twice; but always two lengths."""

FALLBACK_MOST = 1024
"""Longest text that is measured with whole maps: a longer one might not fit into memory."""


def check_cost(patient: Patient, measure: bool = True) -> Check:
    """Memory and time that it takes to read texts of LENGTHS tokens under capture.

    Args:
        measure: without it nothing is said of time.
    """
    measured = measured_seconds(patient) if measure else {}
    sums = per_token_sums(patient)
    cache = cache_sizes(patient)
    context = patient.language_model.max_tokens
    lengths = [
        {
            "tokens": tokens,
            "seconds": measured.get(tokens, estimated_seconds(patient, measured, tokens)),
            "measured": tokens in measured,
            "beyond_context": tokens > context,
            "cache_bytes": None if cache is None else cached_bytes(cache, tokens),
            "sums_bytes": sums * tokens,
            "maps_bytes": sums // 8 * tokens**2 * patient.model.dtype.itemsize,
        }
        for tokens in LENGTHS
    ]
    weights = _bytes([*patient.model.parameters(), *patient.model.buffers()])
    said = (
        f"an estimate, one text; beside the weights of {megabytes(weights)} and what one forward needs without capture"
    )
    numbers = {"weights_bytes": weights, "context": context, "measured_seconds": measured, "lengths": lengths}
    return Check("cost", "measured", said, numbers)


def megabytes(size: float) -> str:
    """Bytes in words, of powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e6:,.1f} MB"


# Memory.


def per_token_sums(patient: Patient) -> int:
    """Bytes of the two float32 of every captured layer and head."""
    with torch.inference_mode(), patient.capture() as captured:
        patient.language_model.forward(patient.tokens(len(patient.ids)), use_cache=False)
    return 8 * sum(captured.sums.heads.values())


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


# Time.


def measured_seconds(patient: Patient) -> dict[int, float]:
    """Tokens -> seconds of one forward under capture with its summaries, at lengths that are quick enough."""
    found: dict[int, float] = {}
    most = FALLBACK_MOST if patient.makes_maps else max(MEASURED)
    if not patient.takes_positions:
        most = min(most, patient.language_model.max_tokens)
    with without_collection(), suppress(RuntimeError, IndexError):  # too large for memory, or for a table of the model
        for tokens in MEASURED:
            if tokens > most or (len(found) > 1 and max(found.values()) > PATIENCE):
                break
            found[tokens] = quickest(patient, tokens)
    return found


def quickest(patient: Patient, tokens: int) -> float:
    """Seconds of two forwards under capture, or of one that is slow: the first meets memory that was never touched."""
    first = seconds(patient, lambda: read(patient, tokens, captured=True))
    return first if first > PATIENCE else min(first, seconds(patient, lambda: read(patient, tokens, captured=True)))


def estimated_seconds(patient: Patient, measured: dict[int, float], tokens: int) -> float | None:
    """From the two longest that were measured: a share for each token, and one for each pair that attends."""
    if len(measured) < 2:
        return None
    (short, before), (long, last) = sorted(measured.items())[-2:]
    pairs = {count: attended_pairs(patient, count) for count in (short, long, tokens)}
    # before = token * short + pair * pairs[short], last = token * long + pair * pairs[long]
    pair = (last - before * long / short) / (pairs[long] - pairs[short] * long / short)
    pair = min(max(pair, 0.0), last / pairs[long])  # noise must not make one of the shares negative
    token = (last - pair * pairs[long]) / long
    return token * tokens + pair * pairs[tokens]


def attended_pairs(patient: Patient, tokens: int) -> float:
    """Pairs of tokens of which one sees the other, summed over the layers."""
    seen = min(sliding_window(patient.model) or tokens, tokens)
    sliding, full = seen * (tokens - seen / 2), tokens**2 / 2
    return sum(sliding if "sliding" in kind else full for kind in layer_kinds(patient.model))
