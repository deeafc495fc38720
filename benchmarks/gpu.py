"""Cost of capturing attention on a GPU: a model of 8B shape with random weights, beside the same on fused SDPA.

    python benchmarks/gpu.py            # everything; a few minutes
    python benchmarks/gpu.py --quick    # shortest prompt, fewer repetitions

Without a GPU it says so and measures nothing. Plain and captured runs take turns, and the ratio is that of the medians.
Before anything is timed, the sums are held against those that torch computes without the kernels, and the logits
against the plain model's. Writes its numbers to benchmarks/results/<gpu>.json, which the next run replaces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_work
import machine
import torch
from gpu_check import against_torch, apart, require_right
from gpu_work import DEVICE, NEW_TOKENS, SHAPE, Heads, Work
from results import Limit, middle_half, ratio_of_medians
from table import columns, limit_cells, other_work
from transformers import LlamaForCausalLM

REPETITIONS, QUICK_REPETITIONS = 15, 7
SHORTEST = 512


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    work: Work
    tokens: int
    """Of the prompt."""

    heads: Heads
    at_most: float | None

    @property
    def limit(self) -> Limit | None:
        """Of the ratio."""
        return None if self.at_most is None else Limit(self.at_most, at_most=True)


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
    path: str
    """What captured: kernels, or torch."""

    logits_apart: float
    """Of plain and captured, as a share of their norm."""

    plain: list[float] = field(default_factory=list)
    captured: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    """Of the captured seconds, the model's own work."""

    @property
    def ratio(self) -> float:
        """Of the medians: captured to plain."""
        return ratio_of_medians(self.captured, self.plain)

    @property
    def forward_ratio(self) -> float:
        """The same of the forwards alone."""
        return ratio_of_medians(self.forward, self.plain)

    @property
    def middle(self) -> tuple[float, float]:
        """First and third quartile of the ratios within each repetition."""
        return middle_half(self.captured, self.plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"prompts of {SHORTEST} tokens only, {QUICK_REPETITIONS} repetitions"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/<gpu>.json")
    arguments = parser.parse_args()
    if (reason := gpu_work.unable()) is not None:
        print(f"{reason}; nothing was measured on a GPU")
        return
    about = describe()
    model = gpu_work.make_model()
    about["apart_from_torch"] = against_torch(model)
    results = []
    for case in (case for case in CASES if not arguments.quick or case.tokens == SHORTEST):
        results.append(measure(model, case, QUICK_REPETITIONS if arguments.quick else REPETITIONS))
        print(*row(results[-1]), sep="  ", file=sys.stderr)
    machine.finish(about)
    print(table(results, about))
    name = machine.stem(about["gpu"]) + ("-quick" if arguments.quick else "")
    write(results, about, arguments.out or Path(__file__).parent / "results" / f"{name}.json")


def measure(model: LlamaForCausalLM, case: Case, repetitions: int) -> Result:
    """Plain and captured in turns.

    Raises:
        SystemExit: logits or sums can't be right, so their time means nothing.
    """
    ids = gpu_work.make_ids(case.tokens)
    for _ in range(2):  # kernels are compiled, and memory is taken
        plain = gpu_work.run(model, case.work, ids, None)
        with gpu_work.counted() as calls:
            captured = gpu_work.run(model, case.work, ids, case.heads)
    require_right(case.heads, plain, captured)
    entry = "attend_row" if case.work == "decode" else "attend"
    result = Result(case, "kernels" if calls[entry] else "torch", round(apart(captured.logits, plain.logits), 4))
    for repetition in range(repetitions):
        # Each goes first as often as the other: what one leaves, in caches and clocks, is the other's start.
        for heads in (case.heads, None) if repetition % 2 else (None, case.heads):
            one = gpu_work.run(model, case.work, ids, heads)
            (result.plain if heads is None else result.captured).append(one.seconds)
            if heads is not None:
                result.forward.append(one.forward)
    return result


HEADER = (
    *("work", "prompt", "heads", "path", "SDPA", "captured", "ratio", "middle half", "limit", "met"),
    *("forward alone", "ratio", "logits apart"),
)

KEY = f"""\
captured: from making the capture to having the summaries; the limit is of that. forward alone: the model's work in it.
SDPA: the plain model. "?" where the limit lies within the middle half of the ratios within a turn. path: what captured.
decode: {NEW_TOKENS} tokens one by one, without reading the prompt. logits apart: captured from plain, by their norm."""


def row(result: Result) -> tuple[str, ...]:
    case, (low, high) = result.case, result.middle
    return (
        case.work,
        str(case.tokens),
        case.heads,
        result.path,
        f"{1e3 * statistics.median(result.plain):.1f} ms",
        f"{1e3 * statistics.median(result.captured):.1f} ms",
        f"{result.ratio:.3f}",
        f"{low:.3f} to {high:.3f}",
        *limit_cells(case.limit, result.ratio, "{:.2f}", result.middle),
        f"{1e3 * statistics.median(result.forward):.1f} ms",
        f"{result.forward_ratio:.3f}",
        f"{result.logits_apart:.4f}",
    )


def table(results: list[Result], about: dict[str, Any]) -> str:
    far = ", ".join(f"{name} {share}" for name, share in about["apart_from_torch"].items())
    return "\n".join(
        [
            f"{about['gpu']}, torch {about['torch']} (CUDA {about['cuda']}), triton {about['triton']}, "
            f"transformers {about['transformers']}, {about['date']}; {other_work(about)}",
            f"Llama with random weights, {SHAPE}, bfloat16, batch of 1",
            f"Captured with kernels and without, apart by shares of the norm: {far}",
            "",
            *columns([HEADER, *map(row, results)]),
            "",
            KEY,
        ]
    )


def describe() -> dict[str, Any]:
    """JSON-ready: the GPU and the machine around it."""
    properties = torch.cuda.get_device_properties(DEVICE)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "missing"
    return {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton,
        **machine.describe(torch.get_num_threads()),
    }


def write(results: list[Result], about: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {"machine": about, "model": SHAPE, "times": []}
    for result in results:
        seconds = {name: [round(one, 6) for one in getattr(result, name)] for name in ("plain", "captured", "forward")}
        told = {
            "path": result.path,
            "logits_apart": result.logits_apart,
            "ratio": round(result.ratio, 4),
            "forward_ratio": round(result.forward_ratio, 4),
            "middle_half_of_ratios": [round(one, 4) for one in result.middle],
            "met": None if result.case.limit is None else result.case.limit.met_by(result.ratio),
        }
        plain["times"].append({"case": asdict(result.case), **told, **seconds})
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
