"""The numbers of one feature, row by row, in memory or in files. Knows neither labels nor what the numbers mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 26
"""Bytes that are worked on at a time."""


@dataclass(frozen=True)
class Stored:
    """Rows in a file; it is mapped while they are read and not held open, however many there are."""

    path: Path
    offset: int
    """Bytes in front of the numbers."""

    shape: tuple[int, ...]
    """(rows, layers, heads, width), little-endian float32."""

    def open(self) -> NDArray[np.float32]:
        """The rows as an array that reads the file where it is looked at."""
        if 0 in self.shape:  # nothing can't be mapped
            return np.empty(self.shape, np.float32)
        return np.asarray(np.memmap(self.path, dtype="<f4", mode="r", offset=self.offset, shape=self.shape))


Part = NDArray[np.float32] | Stored


@dataclass(frozen=True)
class FeatureRows:
    """Rows that lie in several parts; taking some of them copies no feature."""

    parts: tuple[Part, ...]
    """Each (some rows, layers, heads, width)."""

    part: NDArray[np.int64]
    """(rows,) the part that each row lies in."""

    place: NDArray[np.int64]
    """(rows,) its place there."""

    @classmethod
    def of(cls, values: Values) -> FeatureRows:
        """An array as its own only part."""
        if isinstance(values, FeatureRows):
            return values
        return cls((values,), np.zeros(len(values), np.int64), np.arange(len(values), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, layers, heads, width)."""
        return (len(self), *self.parts[0].shape[1:])

    def take(self, rows: NDArray[Any]) -> FeatureRows:
        """Some rows, by index or by mask."""
        return FeatureRows(self.parts, self.part[rows], self.place[rows])

    def blocks(
        self, width: int | None = None, heads: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Consecutive rows, so many that they fit into `BLOCK`, and a copy of their numbers.

        Args:
            width: the first so many numbers of each head; all without it.
            heads: flat indices, in the order that is wanted; all without them.

        Yields:
            which rows, and their numbers (some rows, heads, width).
        """
        _, layers, of_layer, whole = self.shape
        width = whole if width is None else width
        count = layers * of_layer if heads is None else len(heads)
        size = max(1, BLOCK // max(1, 4 * count * width))
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            block = np.empty((rows.stop - start, count, width), np.float32)
            part, place = self.part[rows], self.place[rows]
            for number in np.unique(part):
                here = np.flatnonzero(part == number)
                block[here] = _picked(self.parts[number], place[here], width, heads)
            yield rows, block

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = np.empty((len(self), *self.shape[1:]), np.float32)
        for rows, block in self.blocks():
            values[rows] = block.reshape(values[rows].shape)
        return values if dtype is None else values.astype(dtype)


Values = NDArray[np.float32] | FeatureRows


def _picked(part: Part, places: NDArray[np.int64], width: int, heads: NDArray[np.int64] | None) -> NDArray[np.float32]:
    """(places, heads, width)."""
    values = part.open() if isinstance(part, Stored) else part
    rows, layers, of_layer, whole = values.shape
    flat = values.reshape(rows, layers * of_layer, whole)
    return flat[places, :, :width] if heads is None else flat[places[:, None], heads[None], :width]
