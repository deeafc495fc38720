"""Cost of capturing attention on a GPU: a model of 8B shape with random weights, beside the same on fused SDPA.

    python benchmarks/gpu.py            # everything; a few minutes
    python benchmarks/gpu.py --quick    # shortest prompt, few repetitions

Without a GPU it says so and measures nothing. Times are those of CUDA events around the forwards; captured and plain
forwards take turns, and the ratio is that of the medians. What `summaries()` takes afterwards, to bring the sums to the
CPU, is a column of its own. Writes its numbers to benchmarks/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import machine
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from lapwing_detector.capture import Captured, capture_attention

LAYERS, HEADS, KEY_VALUE_HEADS = 32, 32, 8
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": 16384,
}
BYTES = 24 * 10**9
"""Memory that the weights (16 GB) and a forward over 8192 tokens take."""

QUARTER = {layer: range(layer % 4, HEADS, 4) for layer in range(LAYERS)}
"""Every fourth head: spread over all layers, the costliest way to read a quarter of them."""

NEW_TOKENS = 64
REPETITIONS = 15

Work = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    work: Work
    tokens: int
    """Of the prompt."""

    heads: Literal["all", "quarter"]
    at_most: float | None
    """Limit of the ratio."""


CASES = (
    Case("prefill", 512, "all", None),
    Case("prefill", 512, "quarter", None),
    Case("prefill", 2048, "all", 1.05),
    Case("prefill", 2048, "quarter", 1.05),
    Case("prefill", 8192, "all", 1.12),
    Case("prefill", 8192, "quarter", 1.05),
    Case("decode", 512, "all", 1.05),
    Case("decode", 512, "quarter", 1.05),
    Case("decode", 8192, "all", 1.05),
    Case("decode", 8192, "quarter", 1.05),
)


@dataclass(frozen=True)
class Result:
    """Seconds of each repetition, in their order."""

    case: Case
    plain: list[float]
    captured: list[float]
    summaries: list[float]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.captured) / statistics.median(self.plain)

    @property
    def middle(self) -> tuple[float, float]:
        """First and third quartile of the ratios within each repetition."""
        low, _, high = statistics.quantiles(
            [one / other for one, other in zip(self.captured, self.plain, strict=True)], n=4, method="inclusive"
        )
        return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="prompts of 512 tokens only, 5 repetitions")
    quick = parser.parse_args().quick
    if (reason := unable()) is not None:
        print(f"{reason}; nothing was measured on a GPU")
        return
    cases = [case for case in CASES if case.tokens == 512] if quick else list(CASES)
    model = make_model()
    results = []
    for case in cases:
        results.append(measure(model, case, 5 if quick else REPETITIONS))
        print(*row(results[-1]), sep="  ", file=sys.stderr)
    print(table(results))
    if not quick:
        write(results)


def unable() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use here"
    free, _ = torch.cuda.mem_get_info()
    if free < BYTES:
        return f"the GPU has {free / 1e9:.0f} GB free, the model needs {BYTES / 1e9:.0f}"
    return None


def make_model() -> LlamaForCausalLM:
    """In bfloat16, made on the GPU."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            # Never ends by itself, so that every decoding has the same number of steps.
            config = LlamaConfig(**SHAPE, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa")
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def measure(model: LlamaForCausalLM, case: Case, repetitions: int) -> Result:
    generator = torch.Generator("cuda").manual_seed(case.tokens)
    ids = torch.randint(1, SHAPE["vocab_size"], (1, case.tokens), generator=generator, device="cuda")
    result = Result(case, [], [], [])
    for _ in range(2):  # kernels are compiled, and memory is taken
        _plain(model, case, ids)
        _captured(model, case, ids)
    for repetition in range(repetitions):
        # Each goes first as often as the other: what one leaves, in caches and clocks, is the other's start.
        for captured in (True, False) if repetition % 2 else (False, True):
            if captured:
                seconds, after = _captured(model, case, ids)
                result.captured.append(seconds)
                result.summaries.append(after)
            else:
                result.plain.append(_plain(model, case, ids))
    return result


def _plain(model: LlamaForCausalLM, case: Case, ids: Tensor) -> float:
    return WORK[case.work](model, ids, None)


def _captured(model: LlamaForCausalLM, case: Case, ids: Tensor) -> tuple[float, float]:
    """Seconds of the forwards, and of the summaries.

    Raises:
        SystemExit: what was captured can't be attention, so its time means nothing.
    """
    heads = None if case.heads == "all" else QUARTER
    capture = capture_attention(model, heads=heads)
    seconds = WORK[case.work](model, ids, capture)
    start = time.perf_counter()
    (summary,) = capture.summaries()
    after = time.perf_counter() - start
    sums = torch.from_numpy(summary.received).sum(-1)
    sums = sums[sums.isfinite()]  # heads that were not asked for are NaN
    expected = LAYERS * HEADS // (1 if heads is None else 4)
    # Every row of a map sums to 1: a wrong mask or log-sum-exp would show. 1 % is for weights rounded to bfloat16.
    if len(sums) != expected or not bool(((sums / summary.token_count - 1).abs() < 0.01).all()):
        sys.exit(f"{case}: the captured sums are wrong: {len(sums)} heads, {sums.min():.1f} to {sums.max():.1f}")
    return seconds, after


def _prefill(model: LlamaForCausalLM, ids: Tensor, capture: Captured | None) -> float:
    torch.cuda.synchronize()
    clock = Clock()
    with capture or nullcontext():
        model(ids, use_cache=True, logits_to_keep=1)
    return clock.seconds()


def _decode(model: LlamaForCausalLM, ids: Tensor, capture: Captured | None) -> float:
    """Greedy steps alone, without reading the prompt."""
    cache = DynamicCache(config=model.config)
    with capture or nullcontext():
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        clock = Clock()
        for _ in range(NEW_TOKENS):
            logits = model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits
        return clock.seconds()


WORK: dict[Work, Callable[[LlamaForCausalLM, Tensor, Captured | None], float]] = {
    "prefill": _prefill,
    "decode": _decode,
}


class Clock:
    """Time on the GPU's stream since it was made, waiting for the CPU included."""

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._start.record()

    def seconds(self) -> float:
        """Until all that was asked of the GPU is done."""
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


HEADER = ("work", "prompt", "heads", "SDPA", "captured", "ratio", "middle half", "limit", "met", "summaries")


def row(result: Result) -> tuple[str, ...]:
    case, (low, high) = result.case, result.middle
    limit = case.at_most
    return (
        case.work,
        str(case.tokens),
        case.heads,
        f"{1e3 * statistics.median(result.plain):.1f} ms",
        f"{1e3 * statistics.median(result.captured):.1f} ms",
        f"{result.ratio:.3f}",
        f"{low:.3f} to {high:.3f}",
        "" if limit is None else f"{limit:.2f}",
        "" if limit is None else "yes" if result.ratio <= limit else "NO",
        f"{1e3 * statistics.median(result.summaries):.1f} ms",
    )


def table(results: list[Result]) -> str:
    rows = [HEADER, *map(row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(one, widths, strict=True)).rstrip() for one in rows]
    gpu = describe()
    return "\n".join(
        [
            f"{gpu['gpu']}, torch {gpu['torch']} (CUDA {gpu['cuda']}), triton {gpu['triton']}, "
            f"transformers {gpu['transformers']}, {gpu['date']}",
            f"Llama with random weights, {SHAPE}, bfloat16, batch of 1; decode: {NEW_TOKENS} tokens",
            *lines,
        ]
    )


def describe() -> dict[str, object]:
    """JSON-ready: the GPU and the machine around it."""
    properties = torch.cuda.get_device_properties(0)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "missing"
    return {
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton,
        **machine.describe(torch.get_num_threads()),
    }


def write(results: list[Result]) -> None:
    about = describe()
    stem = re.sub(r"[^a-z0-9]+", "-", str(about["gpu"]).lower()).strip("-")
    path = Path(__file__).parent / "results" / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {"machine": about, "model": SHAPE, "times": []}
    for result in results:
        numbers = {
            name: [round(one, 6) for one in getattr(result, name)] for name in ("plain", "captured", "summaries")
        }
        met = None if result.case.at_most is None else result.ratio <= result.case.at_most
        plain["times"].append({"case": asdict(result.case), "ratio": round(result.ratio, 4), "met": met, **numbers})
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
