"""Cuts attention maps into pieces that fit the caches of a CPU. Knows sizes and places, no attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

TOGETHER_BYTES = 8 * 2**20
"""Scores up to which several heads or sequences are taken at once: many small products would cost more than their
numbers do."""

STRIP_ROWS = 256
"""Rows of one strip, counted for each head that shares its keys: enough for products at full speed."""

LEAST_ROWS, MOST_ROWS = 32, 128
"""Rows of one strip for one head: few when the hidden triangle at its end should be small."""

STRIP_BYTES = 16 * 2**20
"""Most that the scores of a strip take, however long its rows are."""


@dataclass(frozen=True)
class Strip:
    """Some rows of the maps of some heads, over all the columns that these rows see."""

    batch: slice
    shared: slice
    """Key-value heads."""

    heads: slice
    """The heads that they serve."""

    rows: slice
    low: int
    """First column that any of the rows sees."""

    clean: int
    """First column from which on the rows see all up to their own."""

    own: int
    """Column of the first row's own token."""

    stop: int
    """Behind the column of the last row's own token."""

    @cached_property
    def head_count(self) -> int:
        """How many heads it has rows of."""
        return int(self.heads.stop - self.heads.start)

    @cached_property
    def row_count(self) -> int:
        """How many rows of each."""
        return int(self.rows.stop - self.rows.start)

    @property
    def columns(self) -> slice:
        """All that any of the rows sees, up to the own token of the last one."""
        return slice(self.low, self.stop)


def strips(
    batch: int, heads: int, shared: int, rows: int, *, first: int, starts: Tensor | None, clean: bool, cached: bool
) -> Iterable[Strip]:
    """All the strips of a layer; those of the same sequences and key-value heads follow each other.

    Args:
        batch: sequences.
        heads: of the queries.
        shared: key-value heads, each of which serves heads / shared consecutive heads.
        rows: of the maps.
        first: column of the first row's own token.
        starts: (batch or 1, rows), first column of each row if it sees all from there up to its own; else None.
        clean: without `starts`, whether every row sees all columns up to its own.
        cached: whether the pieces are to fit the caches of a CPU; elsewhere they are as large as `STRIP_BYTES`.
    """
    if starts is None:
        return _alike(batch, heads, shared, rows, first, clean, cached)
    return _strips(batch, heads, shared, rows, first, starts, clean, cached)


@lru_cache(maxsize=4)
def _alike(batch: int, heads: int, shared: int, rows: int, first: int, clean: bool, cached: bool) -> tuple[Strip, ...]:
    """All layers of a forward have the same; to plan for each would take a tenth of what a short text may cost."""
    return tuple(_strips(batch, heads, shared, rows, first, None, clean, cached))


def _strips(
    batch: int, heads: int, shared: int, rows: int, first: int, starts: Tensor | None, clean: bool, cached: bool
) -> Iterator[Strip]:
    group = heads // shared
    row_bytes = 4 * group * (first + rows)  # one row of all the heads that share their keys
    height = max(1, min(rows, STRIP_BYTES // row_bytes))
    together = STRIP_BYTES // (row_bytes * height)
    if cached:
        fitting = min(MOST_ROWS, STRIP_ROWS // group, STRIP_BYTES // (2 * row_bytes))
        height = min(height, max(LEAST_ROWS, fitting))
        # Two at least: threads that each have a head of their own do not wait for each other.
        pair = min(2, STRIP_BYTES // (row_bytes * height))
        together = max(pair, TOGETHER_BYTES // (row_bytes * height))
    for sequences, served in parts(batch, shared, together):
        # From the widest strip to the narrowest: what each needs fits where the last one was.
        for start in reversed(range(0, rows, height)):
            stop = min(start + height, rows)
            low, seen = 0, 0 if clean else first + stop
            if starts is not None:
                of_strip = starts[sequences if starts.shape[0] > 1 else slice(None), start:stop]
                low, seen = int(of_strip.min()), int(of_strip.max())
            queries, here = slice(served.start * group, served.stop * group), slice(start, stop)
            yield Strip(sequences, served, queries, here, low, seen, first + start, first + stop)


def parts(batch: int, shared: int, together: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and key-value heads that are taken at once: some heads of one sequence, or all heads of several."""
    if together >= shared:
        several = together // shared
        yield from ((slice(one, min(one + several, batch)), slice(0, shared)) for one in range(0, batch, several))
    else:
        several = max(1, together)
        for one in range(batch):
            for served in range(0, shared, several):
                yield slice(one, one + 1), slice(served, min(served + several, shared))
