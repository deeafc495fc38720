"""Takes the time of a model at work, with capture and without."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lapwing_detector.doctor.patient import Patient


def read(patient: Patient, tokens: int, captured: bool) -> None:
    """One forward, and the summaries if it is captured; what stands beyond the context stands at its last position."""
    ids, inputs = patient.tokens(tokens), {}
    if tokens > patient.language_model.max_tokens:
        places = torch.arange(tokens, device=ids.device).clamp(max=patient.language_model.max_tokens - 1)
        inputs = {"position_ids": places[None], "attention_mask": torch.ones_like(ids)}
    if not captured:
        patient.language_model.forward(ids, use_cache=False, **inputs)
        return
    with patient.capture() as capture:
        patient.language_model.forward(ids, use_cache=False, **inputs)
    capture.summaries()


def seconds(patient: Patient, work: Callable[[], None]) -> float:
    """That it takes, in inference mode, with what a device does behind."""
    device = patient.model.device
    with torch.inference_mode():
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def without_collection() -> Iterator[None]:
    """As `timeit` does: whose turn it is when the garbage collector runs is chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
