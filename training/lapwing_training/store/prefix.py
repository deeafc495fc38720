"""Text cut at a fraction of its response: what a probe sees while the response is being written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.store.feature_rows import FeatureRows, Values


@dataclass(frozen=True)
class Prefix:
    """Features of the cut text, of the rows of a table whose cut text is long enough."""

    rows: NDArray[np.int64]
    """(some rows,) ascending places in the table."""

    token_counts: NDArray[np.int64]
    """(some rows,) of the prompt and what is left of the response."""

    response_tokens: NDArray[np.int64]
    """(some rows,) left of the response."""

    features: Mapping[str, Values]
    """By feature id, (some rows, layers, heads, width(k))."""

    token_statistics: NDArray[np.float64] | None = None
    """(some rows, statistics) of the log-probabilities of what is left of the response; None where nobody kept them."""

    def take(self, rows: NDArray[Any], count: int) -> Prefix:
        """The prefixes of some rows of a table of `count` rows, by index or by mask."""
        place = np.full(count, -1, dtype=np.int64)
        place[self.rows] = np.arange(len(self.rows))
        taken = place[rows]  # -1 where there is none
        own = taken[taken >= 0]
        return Prefix(
            rows=np.flatnonzero(taken >= 0).astype(np.int64),
            token_counts=self.token_counts[own],
            response_tokens=self.response_tokens[own],
            features={name: FeatureRows.of(values).take(own) for name, values in self.features.items()},
            token_statistics=None if self.token_statistics is None else self.token_statistics[own],
        )


def response_cut(fraction: float, response_tokens: int) -> int:
    """How many tokens of a response are its first `fraction`: rounded up, in decimals as they are written."""
    return math.ceil(Fraction(str(fraction)) * response_tokens)  # .07 of 100 are 7; in floats they would be 8
