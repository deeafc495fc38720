"""What was measured, what follows from it, and its file. Neither measures nor draws."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cases import (
    EAGER_PEAK_AT_LEAST,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEY_VALUE_HEADS,
    LAYERS,
    VOCABULARY,
    Case,
    DType,
    Heap,
    MemoryCase,
    TimeCase,
    Way,
    extra_mb_at_most,
)


@dataclass(frozen=True)
class Limit:
    """A number that was claimed, and whether what was measured keeps to it."""

    value: float
    at_most: bool
    """Else: at least."""

    def met_by(self, measured: float) -> bool:
        """A measured number keeps to the limit."""
        return measured <= self.value if self.at_most else measured >= self.value

    def verdict(self, measured: float, middle: tuple[float, float] | None = None) -> str:
        """Yes or NO, with "?" where the limit lies inside the middle half: the next run may well say the opposite."""
        uncertain = middle is not None and middle[0] < self.value < middle[1]
        return ("yes" if self.met_by(measured) else "NO") + "?" * uncertain


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.median(first) / statistics.median(second)


def middle_half(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """First and third quartile of the ratios within each repetition."""
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class TimeResult:
    """One case with its seconds."""

    case: TimeCase
    seconds: dict[str, list[float]]
    """By way, in the order of the repetitions."""

    def median(self, way: Way) -> float:
        """Seconds."""
        return statistics.median(self.seconds[way])

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return ratio_of_medians(*self._pair())

    @property
    def middle(self) -> tuple[float, float]:
        """First and third quartile of the ratios within each repetition."""
        return middle_half(*self._pair())

    def _pair(self) -> tuple[list[float], list[float]]:
        first, second = self.case.ways
        return self.seconds[first], self.seconds[second]

    @property
    def limit(self) -> Limit | None:
        """Of the ratio."""
        if self.case.at_most is not None:
            return Limit(self.case.at_most, at_most=True)
        return None if self.case.at_least is None else Limit(self.case.at_least, at_most=False)


@dataclass(frozen=True)
class MemoryResult:
    """One case with its peaks."""

    case: MemoryCase
    peaks_mb: list[float]
    """One for each process."""

    @property
    def median_mb(self) -> float:
        """Median over the processes, in MB."""
        return statistics.median(self.peaks_mb)


@dataclass
class Results:
    """All of one run of the benchmark."""

    machine: dict[str, Any]
    quick: bool
    times: list[TimeResult] = field(default_factory=list)
    memory: list[MemoryResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Names of cases that this machine could not run, with the reason."""

    def peak(self, way: Way, tokens: int, dtype: DType = "float32", heap: Heap = "fixed") -> MemoryResult | None:
        """The result of this forward, if there is one."""
        wanted = (way, tokens, dtype, heap)
        return next((one for one in self.memory if _place(one.case) == wanted), None)

    def sort(self, cases: Sequence[Case]) -> None:
        """In the order of the cases, of which all results are: a run that was resumed may have measured in another."""
        self.times.sort(key=lambda one: cases.index(one.case))
        self.memory.sort(key=lambda one: cases.index(one.case))

    def comparisons(self) -> list[Comparison]:
        """Of the peaks of the same forward; only those of a fixed heap are held against limits."""
        found = []
        for tokens, dtype, heap in dict.fromkeys(_place(one.case)[1:] for one in self.memory):
            ours, sdpa, eager = (self.peak(way, tokens, dtype, heap) for way in ("ours", "sdpa", "eager"))
            if ours and sdpa:
                extra = Limit(extra_mb_at_most(tokens), at_most=True) if heap == "fixed" else None
                found.append(Comparison(ours, sdpa, lambda one, other: one - other, "{:+.1f} MB", extra))
            if eager and ours:
                least = EAGER_PEAK_AT_LEAST.get(tokens) if heap == "fixed" else None
                limit = None if least is None else Limit(least, at_most=False)
                found.append(Comparison(eager, ours, lambda one, other: one / other, "{:.1f}", limit))
        return found

    def write(self, path: Path) -> None:
        """As JSON. The derived numbers are in it for readers; `read` computes them again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(self._plain(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        whole.replace(path)  # a run that is stopped leaves none that is cut

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        times = [
            TimeResult(TimeCase(**{**one["case"], "ways": tuple(one["case"]["ways"])}), one["seconds"])
            for one in stored["times"]
        ]
        memory = [MemoryResult(MemoryCase(**one["case"]), one["peaks_mb"]) for one in stored["memory"]]
        return cls(stored["machine"], stored["quick"], times, memory, stored["left_out"])

    def _plain(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "quick": self.quick,
            "model": {
                "layers": LAYERS,
                "heads": HEADS,
                "key_value_heads": KEY_VALUE_HEADS,
                "hidden": HIDDEN,
                "intermediate": INTERMEDIATE,
                "vocabulary": VOCABULARY,
            },
            "times": [_plain_time(one) for one in self.times],
            "memory": [
                {
                    "name": one.case.name,
                    "case": asdict(one.case),
                    "peaks_mb": _rounded(one.peaks_mb, 2),
                }
                for one in self.memory
            ],
            "comparisons": [_plain_comparison(one) for one in self.comparisons()],
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Comparison:
    """Two peaks, and what is said of them."""

    first: MemoryResult
    second: MemoryResult
    compute: Callable[[float, float], float]
    form: str
    limit: Limit | None

    @property
    def value(self) -> float:
        """From the medians."""
        return self.compute(self.first.median_mb, self.second.median_mb)


def _place(case: MemoryCase) -> tuple[Way, int, DType, Heap]:
    return case.way, case.tokens, case.dtype, case.heap


def _plain_time(one: TimeResult) -> dict[str, Any]:
    return {
        "name": one.case.name,
        "case": asdict(one.case),
        "seconds": {way: _rounded(seconds, 6) for way, seconds in one.seconds.items()},
        "ratio": round(one.ratio, 4),
        "middle_half_of_ratios": _rounded(list(one.middle), 4),
        "met": None if one.limit is None else one.limit.met_by(one.ratio),
    }


def _plain_comparison(one: Comparison) -> dict[str, Any]:
    return {
        "first": one.first.case.name,
        "second": one.second.case.name,
        "is": one.form.format(one.value),
        "limit": None if one.limit is None else one.limit.value,
        "met": None if one.limit is None else one.limit.met_by(one.value),
    }


def _rounded(numbers: list[float], digits: int) -> list[float]:
    return [round(number, digits) for number in numbers]
