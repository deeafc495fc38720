"""How far today's answers are from those that the probe was judged on when it was made. Knows numbers only, no text."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lapwing_detector.probe import Probe

WINDOW: Final = 1000
"""Responses that are looked at: the last ones."""

FEWEST: Final = 100
"""Responses from which on there is a value."""

GROUPS: Final = 10
"""At most so many groups are compared: with more of them, 100 responses differ by chance alone."""

READING: Final = (
    "Population stability index of the last 1,000 responses that the active probe scored, from 100 on, against the "
    "answers that it was judged on when it was made. Of 1,000: below 0.1 they are alike, 0.1 to 0.25 is worth a look, "
    "above 0.25 they are others. Chance alone gives up to 9 / responses on average and seldom twice that, so that of "
    "the first 100 only more than 0.25 says something. It does not say why: other questions, another model's manner, "
    "or as many more hallucinations."
)


@dataclass(frozen=True)
class Reference:
    """A distribution in few groups."""

    edges: NDArray[np.float64]
    """(groups - 1,): the inner borders, ascending; a value on a border belongs to the group above it."""

    shares: NDArray[np.float64]
    """(groups,): they sum to 1."""

    @classmethod
    def of(cls, edges: Sequence[float], counts: Sequence[float], groups: int = GROUPS) -> Reference | None:
        """The distribution of a histogram, whose neighbouring bins are joined into about equally full groups.

        Args:
            edges: (bins + 1,) ascending.
            counts: (bins,) not negative.
            groups: most groups.

        Returns:
            None if the histogram is none, or empty, or all in one group.
        """
        borders, counted = np.asarray(edges, np.float64), np.asarray(counts, np.float64)
        if borders.ndim != 1 or counted.shape != (len(borders) - 1,) or not (np.diff(borders) > 0).all():
            return None
        if not np.isfinite(counted).all() or (counted < 0).any() or counted.sum() == 0:
            return None
        share = counted.cumsum()[:-1] / counted.sum()  # below each inner border
        wanted = np.arange(1, groups) / groups
        inner = (share > 0) & (share < 1)
        if not inner.any():
            return None
        places = np.flatnonzero(inner)
        chosen = np.unique(places[np.abs(share[places][:, None] - wanted).argmin(axis=0)])
        return cls(borders[1:-1][chosen], np.diff(share[chosen], prepend=0.0, append=1.0))

    def index(self, values: Sequence[float]) -> float:
        """Population stability index of the values: sum over groups of (p - q) log(p / q); 0 is the same.

        Half a response is added to each group, so that an empty one does not make it infinite.
        """
        places = np.searchsorted(self.edges, np.asarray(values, np.float64), side="right")
        counts = np.bincount(places, minlength=len(self.shares)) + 0.5
        now = counts / counts.sum()
        return float(((now - self.shares) * np.log(now / self.shares)).sum())


class Drift(Collector):
    """The last responses beside those that the probe was judged on; computed when somebody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._revision = ""
        self._scores: Reference | None = None
        self._lengths: Reference | None = None
        self._window: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def follow(self, probe: Probe) -> None:
        """Compares with what this probe was judged on from now on; another revision begins with an empty window."""
        if probe.revision == self._revision:
            return
        scores, lengths = score_reference(probe.metrics), length_reference(probe.metrics)
        with self._lock:
            self._revision, self._scores, self._lengths = probe.revision, scores, lengths
            self._window.clear()

    def add(self, revision: str, probability: float, response_tokens: int) -> None:
        """A response was scored; one that another revision scored is left out."""
        with self._lock:
            if revision == self._revision:
                self._window.append((probability, response_tokens))

    def describe(self) -> Iterable[Metric]:
        """Nothing: which metrics there are depends on the probe."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The indices that there are by now, and how many responses they are of."""
        with self._lock:
            window, scores, lengths = list(self._window), self._scores, self._lengths
        yield GaugeMetricFamily("lapwing_drift_responses", "Responses that the drift is of.", len(window))
        for name, reference, values in (
            ("lapwing_drift_score_index", scores, [one for one, _ in window]),
            ("lapwing_drift_length_index", lengths, [one for _, one in window]),
        ):
            if reference is not None and len(window) >= FEWEST:
                yield GaugeMetricFamily(name, READING, reference.index(values))


def score_reference(metrics: Mapping[str, Any]) -> Reference | None:
    """Probabilities that it gave the answers it was judged on; None if the probe does not say."""
    counts = metrics.get("histogram")
    try:
        return Reference.of(counts["edges"], np.add(counts["hallucinated"], counts["other"]).tolist())  # type: ignore[index]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def length_reference(metrics: Mapping[str, Any]) -> Reference | None:
    """Response tokens of the answers it was judged on; None if the probe does not say."""
    counts = metrics.get("lengths")
    try:
        return Reference.of(counts["edges"], counts["counts"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return None
