"""How much slower a model is with capture than without, measured on the spot, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lapwing_detector.cache_mark import cache_in
from lapwing_detector.doctor.clock import read, seconds, without_collection
from lapwing_detector.doctor.memory import cache_sizes
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.verdict import Check

PREFILL, PROMPT, STEPS = 512, 64, 16
"""Tokens of the forward, and of the prompt and the steps behind it, by which the overhead is measured."""

REPETITIONS, MOST_REPETITIONS, SECONDS = 5, 30, 0.8
"""Of each way; between the two as long as the seconds last."""

SLOW = 2.0
"""Seconds for both ways together from which on one repetition must do."""


def check_overhead(patient: Patient) -> Check:
    """The model with capture beside the model as it is, in turns: one forward, and steps of decoding."""
    rival = str(patient.model.config.get_text_config(decoder=True)._attn_implementation)
    context = patient.language_model.max_tokens
    tokens, prompt = min(PREFILL, context), min(PROMPT, context - STEPS)
    with without_collection():
        prefill = ratio(lambda captured: seconds(patient, lambda: read(patient, tokens, captured)))
        cached = cache_sizes(patient) is not None
        steps = ratio(lambda captured: decode(patient, prompt, captured)) if cached else None
    said = f"{in_words(prefill)} the time of {rival} for a forward of {tokens} tokens with its summaries; "
    said += (
        f"{in_words(steps)} for {STEPS} steps after {prompt}, the steps alone: without what begins and ends a capture"
        if steps
        else "it generates without a cache"
    )
    numbers = {
        "rival": rival,
        "prefill": {"tokens": tokens, **prefill},
        "decode": steps and {"prompt": prompt, "steps": STEPS, **steps},
    }
    return Check("overhead", "measured", said, numbers)


def in_words(found: dict[str, float]) -> str:
    """A ratio with its spread, and how often it was measured."""
    if found["repetitions"] == 1:
        return f"{found['ratio']:.2f} x (measured once)"
    return f"{found['ratio']:.2f} x ({found['low']:.2f} to {found['high']:.2f} in {found['repetitions']:.0f} turns)"


def ratio(once: Callable[[bool], float]) -> dict[str, float]:
    """With capture by without: ratio of the medians, and quartiles of the ratios of neighbours.

    Args:
        once: seconds of the work, with capture or without.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    fewest = REPETITIONS if once(True) + once(False) < SLOW else 1
    start = time.perf_counter()
    for repetition in range(MOST_REPETITIONS):
        if repetition >= fewest and time.perf_counter() - start > SECONDS:
            break
        # Each goes first as often as the other: what the first leaves in caches is the second's start.
        for captured in (True, False) if repetition % 2 else (False, True):
            times[captured].append(once(captured))
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    ours, theirs = statistics.median(times[True]), statistics.median(times[False])
    return {
        "ratio": ours / theirs,
        "low": quartiles[0],
        "high": quartiles[2],
        "repetitions": len(times[True]),
        "seconds": ours,
        "rival_seconds": theirs,
    }


def decode(patient: Patient, prompt: int, captured: bool) -> float:
    """Seconds of the steps alone; the prompt is what `read` is for."""
    if captured:
        with patient.capture():
            return decode(patient, prompt, False)
    ids = patient.tokens(prompt + STEPS)
    with torch.inference_mode():
        cache = cache_in(patient.language_model.forward(ids[:, :prompt], use_cache=True))

        def steps() -> None:
            for place in range(prompt, prompt + STEPS):
                patient.language_model.forward(ids[:, place : place + 1], past_key_values=cache, use_cache=True)

        return seconds(patient, steps)
