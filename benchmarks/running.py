"""Time of the running logit of one token on one core: what is computed after every token beside the model itself.

    python benchmarks/running.py           # 1,024, 4,096 and 8,192 tokens; under a minute
    python benchmarks/running.py --quick   # 4,096 tokens; under 20 s

Sums as those of a model of 32 layers x 32 heads grow token by token, and a probe reads 128 or all of the heads. The
ways take turns. Prints a table, and writes it with a description of the machine as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from results import Limit
from table import limit_cells, other_work
from torch import Tensor, nn

from lapwing_detector.calibration import Calibration
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.probe import Probe
from lapwing_detector.running import RunningLogits
from lapwing_detector.sequences import Sequences

LAYERS, HEADS, K = 32, 32, 10
FEATURE = "laplacian_eigenvalues.v1"
LIMITS_MS = {(128, 4096): Limit(3.0, at_most=True)}
"""Of the running logit, by heads and tokens."""

MAPS = 4
"""Random maps that are made; the heads share them, for what takes time is how many there are."""

SWEEP_MB = 64
"""Written over before each measurement, as the model's weights pass through the caches between two tokens."""

SAME = 1e-4
"""Of logits, which are of order 1: far above what rounding does, far below what an error would."""

Way = tuple[Sequences, Callable[[], list[float | None]]]
"""The sums that grow, and what asks for their logit."""

KEY = """\
running: RunningLogits, of the heads that the probe reads. at once: summaries() and Probe.score, of the same heads;
of all captured: the same, where the capture keeps all 1,024 heads for it. Medians of the thread's time, so other work
on the machine counts for little; caches are cold. The limit is in milliseconds: whether it is met depends on the
machine, the ratios do so less."""


@dataclass(frozen=True)
class Row:
    """One length and one number of heads that the probe reads."""

    tokens: int
    heads: int
    milliseconds: Mapping[str, float]
    """By way, the median."""

    middle_half: Mapping[str, tuple[float, float]]
    """By way, first and third quartile."""

    limit_ms: float | None
    met: bool | None


@dataclass
class Summed:
    """Stands in for a capture."""

    sums: Sequences


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    lengths, repetitions = ((4096,), 9) if arguments.quick else ((1024, 4096, 8192), 51)
    described = machine.describe(threads=1)
    rows = [row for tokens in lengths for row in measure(tokens, repetitions)]
    machine.finish(described)
    print(table(rows, described))
    name = f"{machine.file_stem(1)}-running{'-quick' if arguments.quick else ''}.json"
    path = arguments.out or Path(__file__).parent / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": described, "quick": arguments.quick, "repetitions": repetitions, "k": K, "feature": FEATURE}
    path.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def measure(tokens: int, repetitions: int) -> list[Row]:
    """The rows of one length."""
    diagonal, received = column_sums(tokens)
    few, every = a_probe(HEADS // 8), a_probe(HEADS)
    rows = []
    for probe in (few, every):
        same = summed(probe.heads, diagonal, received)
        running = RunningLogits(probe, Summed(same))
        ways: dict[str, Way] = {"running": (same, running.logits), "at once": (same, partial(at_once, probe, same))}
        if probe is few:
            whole = summed(every.heads, diagonal, received)
            ways["of all captured"] = (whole, partial(at_once, probe, whole))
        rows.append(_row(tokens, int(probe.selected.sum()), _seconds(ways, repetitions)))
    return rows


def at_once(probe: Probe, sequences: Sequences) -> list[float | None]:
    return [probe.score(summary)[0] for summary in sequences.summaries()]


def a_probe(heads: int) -> Probe:
    """Reads that many heads of every layer, spread over them."""
    selected = np.zeros((LAYERS, HEADS), bool)
    selected[:, :: HEADS // heads] = True
    weights = np.random.default_rng(0).normal(size=(LAYERS, HEADS, K)).astype(np.float32) * selected[..., None]
    identity = ModelIdentity("none", "", "", "", "", "float32", "none", "", "", LAYERS, HEADS, ())
    layers = tuple(range(LAYERS))
    return Probe("benchmark", (FEATURE,), K, layers, weights, 0.0, selected, Calibration(1.0, 0.0), (), identity)


def column_sums(tokens: int, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Diagonal and column sums of random causal maps; (MAPS, tokens) each."""
    generator = torch.Generator().manual_seed(0)
    diagonal, received = torch.zeros(MAPS, tokens), torch.zeros(MAPS, tokens)
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        scores = 2 * torch.randn(MAPS, stop - start, stop, generator=generator)
        later = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
        part = scores.masked_fill_(later, -torch.inf).softmax(-1)
        diagonal[:, start:stop] = part.diagonal(start, 1, 2)
        received[:, :stop] += part.sum(1)
    return diagonal, received


def summed(heads: Mapping[int, tuple[int, ...]], diagonal: Tensor, received: Tensor) -> Sequences:
    """A sequence of which these heads were captured."""
    sequences = Sequences(tuple(AttentionLayer(index, str(index), nn.Identity()) for index in heads), heads)
    tokens = diagonal.shape[1]
    for layer in sequences.layers:
        maps = [head % MAPS for head in heads[layer.index]]
        sequences.add_kept(layer, HEADS, diagonal[None, maps], received[None, maps], tokens)
    sequences.close()
    sequences.tokens = tokens
    sequences.counted.add(torch.ones(1, tokens, dtype=torch.bool))
    return sequences


def feed(sequences: Sequences) -> None:
    """One more token, which attends to all."""
    tokens = sequences.tokens + 1
    for layer in sequences.layers:
        assert sequences.kept is not None
        row = torch.rand(1, len(sequences.kept[layer.index]), tokens)
        row /= row.sum(-1, keepdim=True)
        sequences.add_kept(layer, HEADS, row[..., -1:], row, tokens)
    sequences.close()
    sequences.tokens = tokens
    sequences.counted.add(torch.ones(1, 1, dtype=torch.bool))


def _seconds(ways: Mapping[str, Way], repetitions: int) -> dict[str, list[float]]:
    """Of each repetition, by way; one token is fed before each."""
    sweep = torch.zeros(SWEEP_MB * 1_000_000 // 4)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(-2, repetitions):  # two to warm up
        for way, (sequences, ask) in ways.items():
            feed(sequences)
            sweep.add_(1.0)
            start = time.thread_time()
            ask()
            if repetition >= 0:
                seconds[way].append(time.thread_time() - start)
    _require_same(ways)
    return seconds


def _require_same(ways: Mapping[str, Way]) -> None:
    """The ways that read one sequence must say the same, or their times must not be compared."""
    (first, running), (second, asked) = ways["running"], ways["at once"]
    assert first is second
    [found], [expected] = running(), asked()
    if found is None or expected is None or abs(found - expected) > SAME:
        raise SystemExit(f"the running logit is {found}, read at once it is {expected}")


def _row(tokens: int, heads: int, seconds: Mapping[str, list[float]]) -> Row:
    medians, halves = {}, {}
    for way, measured in seconds.items():
        low, middle, high = (round(1000 * one, 3) for one in statistics.quantiles(measured, n=4, method="inclusive"))
        medians[way], halves[way] = middle, (low, high)
    limit = LIMITS_MS.get((heads, tokens))
    met = None if limit is None else limit.met_by(medians["running"])
    return Row(tokens, heads, medians, halves, None if limit is None else limit.value, met)


def table(rows: list[Row], described: Mapping[str, Any]) -> str:
    form = "{:>6}  {:>5}  {:>11}  {:>14}  {:>11}  {:>6}  {:>15}  {:>6}  {:>8}  {:>4}"
    header = ("tokens", "heads", "running, ms", "middle half", "at once, ms", "ratio", "of all captured", "ratio")
    lines = [form.format(*header, "limit", "met")]
    for row in rows:
        ours = row.milliseconds["running"]
        low, high = row.middle_half["running"]
        others = []
        for way in ("at once", "of all captured"):
            theirs = row.milliseconds.get(way)
            others += ["", ""] if theirs is None else [f"{theirs:.2f}", f"{theirs / ours:.1f}"]
        limit, met = limit_cells(LIMITS_MS.get((row.heads, row.tokens)), ours, "{:.1f}", (low, high))
        lines.append(form.format(row.tokens, row.heads, f"{ours:.2f}", f"{low:.2f} to {high:.2f}", *others, limit, met))
    head = f"{described['cpu']}, {described['capability']}, one core, torch {described['torch']}, {described['date']}"
    head += f"; {other_work(described)}"
    return "\n".join([head, "", *lines, "", KEY])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length, fewer repetitions; under 20 s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="default: benchmarks/results/<cpu>-1-threads-running.json, which the next run replaces",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
