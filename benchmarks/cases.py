"""What is measured, and the limits that it is held against. Measures nothing itself.

More of it is one more row here; a new kind of work is one more function in workload.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN, INTERMEDIATE, VOCABULARY = 12, 16, 4, 1024, 2048, 8000
"""Of the model: a Llama with random weights, since time and memory do not depend on what it has learned."""

BATCH = 8

Way = Literal["sdpa", "ours", "selected", "eager"]
"""The model alone; with every head captured; with a quarter of the heads; with maps that are then summed."""

Work = Literal["prefill", "decode", "generate", "batch"]
DType = Literal["float32", "bfloat16"]
Heap = Literal["fixed", "glibc"]


@dataclass(frozen=True)
class TimeCase:
    """Two ways to do the same work, in turns in one process; the ratio is that of the first to the second."""

    work: Work
    tokens: int
    """Tokens of the prompt; of the longest one in a batch."""

    ways: tuple[Way, Way] = ("ours", "sdpa")
    dtype: DType = "float32"
    at_most: float | None = None
    at_least: float | None = None
    repetitions: int = 7
    """Of each way, at least."""

    seconds: float = 6.0
    """Short work is repeated for this long."""

    new_tokens: int = 64
    """That are decoded or generated."""

    @property
    def name(self) -> str:
        """What the table and `--only` call it."""
        tokens = f"{self.new_tokens} after {self.tokens}" if self.work in ("decode", "generate") else self.tokens
        return f"time {self.work} {tokens} {self.dtype} {self.ways[0]}/{self.ways[1]}"


@dataclass(frozen=True)
class MemoryCase:
    """The peak of one forward above the loaded model, each time in a process of its own."""

    way: Way
    tokens: int
    dtype: DType = "float32"
    heap: Heap = "fixed"
    """With glibc's own growing threshold the peak is another one from run to run; see memory.py."""

    processes: int = 1

    @property
    def name(self) -> str:
        """What the table and `--only` call it."""
        unusual = [word for word in (self.dtype, self.heap) if word not in ("float32", "fixed")]
        return " ".join(["memory", str(self.tokens), self.way, *unusual])


Case = TimeCase | MemoryCase

EAGER_PEAK_AT_LEAST = {4096: 20.0}
"""Eager peak / ours, by tokens."""


def extra_mb_at_most(tokens: int) -> float:
    """How much more than SDPA a captured forward may take: two float32 per layer, head and token, and 64 MB."""
    return 2 * 4 * LAYERS * HEADS * tokens / 1e6 + 64


def maps_mb(tokens: int) -> float:
    """Size of all attention maps in float32."""
    return 4 * LAYERS * HEADS * tokens**2 / 1e6


def claimed(dtype: DType) -> tuple[TimeCase, ...]:
    """What is claimed of captured to plain time, the same for every dtype."""
    return (
        *(TimeCase("prefill", tokens, dtype=dtype, at_most=1.03, seconds=120) for tokens in (128, 512, 1024)),
        TimeCase("prefill", 2048, dtype=dtype, at_most=1.03),
        *(TimeCase("prefill", tokens, dtype=dtype, at_most=1.08) for tokens in (4096, 8192)),
        *(TimeCase("decode", tokens, dtype=dtype, at_most=1.03) for tokens in (64, 1024)),
        TimeCase("batch", 512, dtype=dtype, at_most=1.05),
    )


FULL: tuple[Case, ...] = (
    *claimed("float32"),
    TimeCase("generate", 64),  # no limit: the closing step makes it one forward more in 64
    *(TimeCase("prefill", tokens, ("selected", "sdpa")) for tokens in (512, 2048, 4096)),
    TimeCase("decode", 1024, ("selected", "sdpa")),
    *(TimeCase("prefill", tokens, ("eager", "ours")) for tokens in (128, 512, 1024)),
    TimeCase("prefill", 2048, ("eager", "ours"), at_least=4.5),
    TimeCase("prefill", 4096, ("eager", "ours"), repetitions=3),
    *claimed("bfloat16"),
    *(MemoryCase(way, tokens) for tokens in (1024, 2048, 4096) for way in ("sdpa", "ours", "eager")),
    *(MemoryCase(way, 8192) for way in ("sdpa", "ours")),
    *(MemoryCase(way, 2048, "bfloat16") for way in ("sdpa", "ours")),
    *(MemoryCase(way, tokens, heap="glibc", processes=3) for tokens in (2048, 4096) for way in ("sdpa", "ours")),
)

QUICK: tuple[Case, ...] = (
    TimeCase("prefill", 512, at_most=1.03, seconds=1),
    TimeCase("decode", 64, new_tokens=16, repetitions=2, seconds=0),  # the limit is one of 64 tokens
    TimeCase("prefill", 256, ("eager", "ours"), repetitions=2, seconds=0),
    *(MemoryCase(way, 512) for way in ("sdpa", "ours", "eager")),
)
