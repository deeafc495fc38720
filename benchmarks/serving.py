"""What the service does under load, and what it adds to the library called directly.

    python benchmarks/serving.py           # some minutes on 2 cores
    python benchmarks/serving.py --quick   # about a minute, for a look
    python benchmarks/serving.py --only overload

The embedded model behind `lapwing serve` in a process of its own, clients in this one: they share the cores, as the
ratios do. Overload is measured on an engine that only sleeps, whose capacity is known. Prints a table, and writes it
with a description of the machine as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import grpc
import machine
from results import Limit
from serving_calls import (
    HOT,
    NEW_TOKENS,
    OPTIONS,
    PROMPTS,
    RESPONSE,
    empty_calls,
    generating,
    heatmap_ms,
    scoring,
    watching,
)
from serving_load import Load, closed_loop, open_loop, percentile
from table import columns, limit_cells, other_work
from tqdm import tqdm

from lapwing_client import Client

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROUNDS = 5
"""Of each of two servers that are compared."""

ITEM_MS = 10.0
"""Of the sleeping engine: a capacity of 100 a second."""

LIMITS = {
    "tiny model of Atlas's tokens: 32 clients with micro-batches / without": Limit(3.0, at_most=False),
    "generate: 8 streams at once / one after another": Limit(3.0, at_most=False),
    "first token less one forward, ms": Limit(20.0, at_most=True),
    "empty calls/s, 8 threads": Limit(2000.0, at_most=False),
    "empty call p50, ms, 1 thread": Limit(1.0, at_most=True),
    "heatmap 32 x 32 as PNG p50, ms": Limit(250.0, at_most=True),
    "overload 10x: goodput / capacity": Limit(0.95, at_most=False),
    "overload 10x: refusal p99, ms": Limit(20.0, at_most=True),
    "overload 10x: health p99, ms": Limit(50.0, at_most=True),
    "overload 10x: codes but OK and RESOURCE_EXHAUSTED": Limit(0.0, at_most=True),
}


@dataclass(frozen=True)
class Row:
    """One number."""

    what: str
    value: float
    about: str = ""


@contextmanager
def server(*command: str, **settings: str) -> Iterator[str]:
    """A server in a process of its own; yields its address."""
    environment = {**os.environ, **{f"LAPWING_{name}": value for name, value in settings.items()}}
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                sys.exit(f"{' '.join(command)} did not start")
            target = line.removeprefix("listening on ").strip()
            with Client(target) as client:
                client.wait_until_ready(120)
            yield target
        finally:
            process.terminate()


ATLAS = ("-m", "lapwing_client", "serve", "--port", "0")
SLEEPING = (str(HERE / "serving_fake.py"), "--item-ms", str(ITEM_MS))


def score(seconds: float) -> Iterator[Row]:
    """Score on the embedded model: the library, then the service."""
    from lapwing_detector import Detector

    detector = Detector.from_pretrained()
    items = [(prompt, RESPONSE) for prompt in PROMPTS]
    alone, spent = _repeat(lambda number: detector.score(*items[number % len(items)]), seconds)
    yield Row("library, one after another, /s", alone, f"p50 {percentile(spent, 50) * 1000:.2f} ms")
    batches, _ = _repeat(lambda _: detector.score_batch(items * 4), seconds)
    yield Row("library, in batches of 32, /s", 32 * batches)
    found: dict[int, Load] = {}
    with server(*ATLAS) as target, server(*ATLAS, LIMITS__BATCH_FORWARD_ITEMS="1") as rival:
        for clients in (1, 8):
            found[clients] = asyncio.run(_closed(target, clients, seconds))
            yield _score_row(f"service, {clients} clients, /s", found[clients])
        (found[32], without), gain = asyncio.run(_in_turns((target, rival), 32, seconds))
    yield _score_row("service, 32 clients, /s", found[32])
    yield Row("score: 32 clients / library one after another", found[32].goodput / alone)
    yield _score_row("service without micro-batches, 32 clients, /s", without)
    yield Row("score: 32 clients with micro-batches / without", *gain)
    yield Row("service adds to p50, ms", found[1].percentile_ms(50) - percentile(spent, 50) * 1000)


def tiny(seconds: float) -> Iterator[Row]:
    """Micro-batches of a model so small that a forward costs more than what is in it."""
    fake = str(HERE / "serving_fake.py")
    with (
        server(fake, "--tiny", "--batch-items", "64") as target,
        server(fake, "--tiny", "--batch-items", "1") as rival,
    ):
        loads, gain = asyncio.run(_in_turns((target, rival), 32, seconds))
    for items, load in zip((64, 1), loads, strict=True):
        yield _score_row(f"tiny model of Atlas's tokens: 32 clients, at most {items} in a forward, /s", load)
    yield Row("tiny model of Atlas's tokens: 32 clients with micro-batches / without", *gain)


def generate(seconds: float) -> Iterator[Row]:
    """Generate on the embedded model: the library one after another, then the service with several streams."""
    from lapwing_detector import Detector

    detector = Detector.from_pretrained()

    def write(number: int) -> int:
        options = {"max_new_tokens": NEW_TOKENS, "temperature": HOT, "seed": number}
        return sum(1 for _ in detector.generate(PROMPTS[number % len(PROMPTS)], **options)) - 1

    begun, tokens, number = time.perf_counter(), 0, 0
    while time.perf_counter() < begun + seconds:
        tokens, number = tokens + write(number), number + 1
    library = tokens / (time.perf_counter() - begun)
    yield Row("library, one after another, tokens/s", library)
    forwards = [_first(detector, prompt) for prompt in PROMPTS * 4]
    rates: dict[int, float] = {}
    with server(*ATLAS, LIMITS__GENERATE_STREAMS="32", LIMITS__STREAMS_PER_CLIENT="32") as target:
        for streams in (1, 8, 32):
            counts: list[int] = []
            first: list[float] = []
            load = asyncio.run(_streams(target, streams, seconds, counts, first))
            rates[streams] = sum(counts) / load.seconds
            about = f"first token p50 {percentile(first, 50) * 1000:.1f} ms, codes {load.codes}"
            yield Row(f"service, {streams} streams, tokens/s", rates[streams], about)
            if streams == 1:
                late = percentile(first, 50) - percentile(forwards, 50)
                yield Row("first token less one forward, ms", late * 1000)
    yield Row("generate: 8 streams at once / one after another", rates[8] / rates[1], "both by the service")
    yield Row("generate: 8 streams / library one after another", rates[8] / library)


def empty(seconds: float) -> Iterator[Row]:
    """What a call costs in which nothing is computed, and a picture."""
    with server(*SLEEPING) as target:
        rate, _ = empty_calls(target, 8, seconds)
        yield Row("empty calls/s, 8 threads", rate)
        _, middle = empty_calls(target, 1, seconds)
        yield Row("empty call p50, ms, 1 thread", middle)
        yield Row("heatmap 32 x 32 as PNG p50, ms", heatmap_ms(target, 20))


def overload(seconds: float) -> Iterator[Row]:
    """More than the engine can do, by the clock."""
    with server(*SLEEPING) as target:
        capacity = asyncio.run(_closed(target, 8, seconds)).goodput
        yield Row("overload: capacity, /s", capacity, f"8 clients that wait; {1000 / ITEM_MS:g} by the engine alone")
        for times in (0.5, 1, 2, 10):
            load, health = asyncio.run(_overload(target, times * capacity, seconds))
            name = f"overload {times:g}x"
            about = f"p50 {load.percentile_ms(50):.0f}, p99 {load.percentile_ms(99):.0f} ms; {load.codes}; "
            about += f"sent late by {load.latest_ms:.0f} ms (p99)"
            yield Row(f"{name}: goodput / capacity", load.goodput / capacity, about)
            yield Row(f"{name}: refusal p99, ms", load.percentile_ms(99, ok=False))
            yield Row(f"{name}: health p99, ms", percentile(health, 99) * 1000)
            others = sum(count for code, count in load.codes.items() if code not in ("OK", "RESOURCE_EXHAUSTED"))
            yield Row(f"{name}: codes but OK and RESOURCE_EXHAUSTED", others)


PARTS: dict[str, Callable[[float], Iterator[Row]]] = {
    "score": score,
    "tiny": tiny,
    "generate": generate,
    "empty": empty,
    "overload": overload,
}


async def _closed(target: str, clients: int, seconds: float) -> Load:
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        await closed_loop(scoring(channel), clients, min(1.0, seconds / 2))  # warm
        return await closed_loop(scoring(channel), clients, seconds)


async def _in_turns(targets: tuple[str, str], clients: int, seconds: float) -> tuple[list[Load], tuple[float, str]]:
    """The same of two servers, a round of each in turn, so that whatever else the machine does befalls both.

    Returns:
        The load of each over all rounds, and how many times as much the first does, with how that varied: the median
        over the rounds.
    """
    rounds: list[list[Load]] = []
    async with (
        grpc.aio.insecure_channel(targets[0], options=OPTIONS) as one,
        grpc.aio.insecure_channel(targets[1], options=OPTIONS) as other,
    ):
        calls = (scoring(one), scoring(other))
        for call in calls:
            await closed_loop(call, clients, min(1.0, seconds / 2))  # warm
        for _ in range(ROUNDS):
            rounds.append([await closed_loop(call, clients, seconds / ROUNDS) for call in calls])
    whole = [
        Load(sum(load.seconds for load in loads), [outcome for load in loads for outcome in load.outcomes])
        for loads in zip(*rounds, strict=True)
    ]
    gains = sorted(first.goodput / second.goodput for first, second in rounds)
    about = f"median of {ROUNDS} rounds in turn, {gains[0]:.2f} to {gains[-1]:.2f}"
    return whole, (median(gains), about)


async def _streams(target: str, streams: int, seconds: float, counts: list[int], first: list[float]) -> Load:
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        await closed_loop(generating(channel, [], []), streams, min(1.0, seconds / 2))
        return await closed_loop(generating(channel, counts, first), streams, seconds)


async def _overload(target: str, rate: float, seconds: float) -> tuple[Load, list[float]]:
    over = asyncio.Event()
    health = asyncio.create_task(watching(target, over))
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        load = await open_loop(scoring(channel, timeout=1.0), rate, seconds)
    over.set()
    return load, await health


def _repeat(call: Callable[[int], object], seconds: float) -> tuple[float, list[float]]:
    """(calls per second, seconds of each)."""
    for number in range(3):
        call(number)
    spent: list[float] = []
    begun = time.perf_counter()
    while (sent := time.perf_counter()) < begun + seconds:
        call(len(spent))
        spent.append(time.perf_counter() - sent)
    return len(spent) / (time.perf_counter() - begun), spent


def _first(detector: object, prompt: str) -> float:
    """Seconds of one forward over the prompt, and its summary."""
    begun = time.perf_counter()
    detector.score(prompt, " a")  # type: ignore[attr-defined]
    return time.perf_counter() - begun


def _score_row(what: str, load: Load) -> Row:
    about = f"p50 {load.percentile_ms(50):.2f}, p99 {load.percentile_ms(99):.2f} ms; {load.codes}"
    return Row(what, load.goodput, about)


def table(rows: Sequence[Row], described: dict[str, object]) -> str:
    """All rows as text."""
    shown = [
        (row.what, number(row.value), *limit_cells(LIMITS.get(row.what), row.value, "{:g}"), row.about) for row in rows
    ]
    head = f"{described['cpu']}, {described['cores']} cores, {described['memory_gb']} GB, {described['date']}; "
    return "\n".join([head + other_work(described), "", *columns([("what", "", "limit", "met", ""), *shown])])


def number(value: float) -> str:
    """With three digits that count."""
    return "-" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain(row: Row) -> dict[str, object]:
    """As JSON values; NaN, which JSON does not have, is None."""
    return asdict(row) | ({"value": None} if math.isnan(row.value) else {})


def main() -> None:
    arguments = _arguments()
    seconds = 3.0 if arguments.quick else arguments.seconds
    described = machine.describe(machine.cores())
    rows: list[Row] = []
    parts = arguments.only or list(PARTS)
    for part in tqdm(parts, unit="part", leave=False):
        rows += PARTS[part](seconds)
    machine.finish(described)
    print(table(rows, described))
    if not arguments.only:
        suffix = "-quick" if arguments.quick else ""
        out = arguments.out or RESULTS / f"{machine.file_stem(machine.cores())}-serving{suffix}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": described, "rows": [plain(row) for row in rows]}, indent=1) + "\n")
        print(f"wrote {out}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 seconds for each load")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load (default 20)")
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), help="this part; may be repeated; writes nothing"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/<cpu>-serving.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
