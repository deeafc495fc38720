"""Which sequences share a forward: as many as pay for the padding between them. Knows lengths and seconds only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FIRST_OVERHEAD: Final = 64.0
"""Tokens that could be computed in the time that a further forward costs by itself, until it is measured."""

LEAST_OVERHEAD: Final = 32.0
MOST_OVERHEAD: Final = 4096.0

WORTH: Final = 20
"""Times its overhead, a forward is long enough: a longer one would save at most a twentieth, and all would wait for it
longer, scores and streams."""


def cut(lengths: Sequence[int], tokens: int, items: int, overhead: float = FIRST_OVERHEAD) -> list[list[int]]:
    """Places of the sequences that share a forward: those that are about as long, so that little of it is padding.

    Args:
        lengths: tokens of each sequence.
        tokens: most of one forward, padding counted; a longer sequence has one of its own.
        items: most sequences of one forward.
        overhead: what a forward costs by itself, in tokens.

    Returns:
        Every place once, in the forwards that take the least time together. The forward comes first in which the
        earliest sequence is.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    sizes = [lengths[place] for place in order]  # the longest first, so that a forward is a stretch of them
    if sizes and len(sizes) <= items and len(sizes) * sizes[0] <= min(tokens, sum(sizes) + overhead):
        return [sorted(order)]  # what is padded costs less than any second forward
    costs, starts = [0.0], [0]
    for end in range(1, len(sizes) + 1):
        possible = (
            (costs[start] + overhead + (end - start) * sizes[start], start)
            for start in range(max(0, end - items), end)
            if start == end - 1 or (end - start) * sizes[start] <= tokens
        )
        cost, start = min(possible)
        costs.append(cost)
        starts.append(start)
    shared, end = [], len(sizes)
    while end:
        shared.append(sorted(order[starts[end] : end]))
        end = starts[end]
    return sorted(shared)


class Overhead:
    """What a forward costs by itself, measured: a straight line through seconds over tokens, lately seen ones first."""

    KEPT: Final = 0.98
    """Of what was seen before, with every look."""

    LEAST_SPREAD: Final = 0.01
    """Of the tokens, as a share of their mean, squared: forwards of one size tell nothing."""

    def __init__(self) -> None:
        self.tokens = FIRST_OVERHEAD
        """Tokens that could be computed in the time."""
        self._count = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def enough(self) -> int:
        """Tokens of a forward that is as large as it is worth."""
        return round(WORTH * self.tokens)

    def saw(self, tokens: int, seconds: float) -> None:
        """A forward of so many tokens, padding counted, took so long."""
        for name, new in (
            ("_count", 1),
            ("_x", tokens),
            ("_y", seconds),
            ("_xx", tokens**2),
            ("_xy", tokens * seconds),
        ):
            setattr(self, name, self.KEPT * getattr(self, name) + new)
        spread = self._count * self._xx - self._x**2
        slope = self._count * self._xy - self._x * self._y  # both times the same
        if slope > 0 and spread > self.LEAST_SPREAD * self._x**2:
            found = (self._y * spread - slope * self._x) / (self._count * slope)
            self.tokens = min(max(found, LEAST_OVERHEAD), MOST_OVERHEAD)
