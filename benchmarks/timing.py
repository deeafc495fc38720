"""Times cases, all with one model."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from cases import TimeCase, Way
from torch import Tensor
from transformers import LlamaForCausalLM
from workload import Sums, decode, make_inputs, make_model, run, twin_of

from lapwing_detector.doctor.clock import without_collection

WARM_UP_SECONDS = 0.5
MOST_REPETITIONS = 99


def send_seconds(sender: Connection, cases: Sequence[TimeCase], threads: int) -> None:
    """Send what `measure` tells of each case. For a process of its own."""
    torch.set_num_threads(threads)
    model = make_model()
    gc.freeze()  # all of it stays, and to look at it would take a third of a second before each forward
    for case in cases:
        model.to(getattr(torch, case.dtype))  # float32 comes first, so nothing is rounded that should not be
        sender.send(measure(model, case))


def measure(model: LlamaForCausalLM, case: TimeCase) -> dict[str, list[float]]:
    """Seconds of each repetition, by way.

    Raises:
        AssertionError: the two ways do not give the same sums, so their times must not be compared.
    """
    inputs = make_inputs(case.work, case.tokens)
    twin = twin_of(model) if case.work == "decode" else None
    _warm_up(model, twin, case, inputs)
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    start = time.perf_counter()
    for repetition in range(MOST_REPETITIONS):
        if repetition >= case.repetitions and time.perf_counter() - start > case.seconds:
            break
        if twin is not None:
            for way, taken in _decode(model, twin, case, inputs).items():
                seconds[way].append(taken)
            continue
        # Each way goes first as often as the other: what the first leaves in cache and heap is the second's start.
        for way in case.ways if repetition % 2 else case.ways[::-1]:
            seconds[way].append(_once(model, way, case, inputs)[0])
    return seconds


def _warm_up(model: LlamaForCausalLM, twin: LlamaForCausalLM | None, case: TimeCase, inputs: dict[str, Tensor]) -> None:
    if twin is not None:
        _decode(model, twin, case, inputs)
        return
    start = time.perf_counter()
    while True:
        first, second = (_once(model, way, case, inputs)[1] for way in case.ways)
        if "eager" in case.ways:
            _require_same(first, second)
        if time.perf_counter() - start > WARM_UP_SECONDS:
            return


def _once(model: LlamaForCausalLM, way: Way, case: TimeCase, inputs: dict[str, Tensor]) -> tuple[float, Sums]:
    with without_collection():
        return run(model, way, case.work, inputs, case.new_tokens)


def _decode(
    model: LlamaForCausalLM, twin: LlamaForCausalLM, case: TimeCase, inputs: dict[str, Tensor]
) -> dict[Way, float]:
    with without_collection():
        return decode(dict(zip(case.ways, (model, twin), strict=True)), inputs, case.new_tokens)


def _require_same(first: Sums, second: Sums) -> None:
    for ours, theirs in zip(first, second, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            # Sums of float32 in another order, through as many layers.
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
