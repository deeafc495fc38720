"""Room for the sums of the heads that are read, which grows with the sequence. Knows arrays only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lapwing_server.attention_slices import Numbers, Sums

DIAGONAL, RECEIVED = np.dtype(np.float32), np.dtype(np.float64)
"""A diagonal is kept as it came; the column sums grow by small numbers, many times."""

TOKEN_BYTES = DIAGONAL.itemsize + RECEIVED.itemsize
"""What one token of one head takes."""


class HeldSums:
    """Diagonal and column sums of some heads.

    Args:
        heads: how many.
        most_tokens: that will ever come.
        most_bytes: that they may take.
        declared: tokens that will come, where that is known; room is made for them at once.
        hold: asked before so many bytes are taken in all; raises where that is too much.
    """

    def __init__(
        self, heads: int, most_tokens: int, most_bytes: int, declared: int | None, hold: Callable[[int], None]
    ) -> None:
        self.heads = heads
        self.most_tokens = min(most_tokens, most_bytes // max(1, heads * TOKEN_BYTES))
        """Tokens for which there can be room."""

        self._declared = declared
        self._hold = hold
        self._diagonal = np.zeros((heads, 0), DIAGONAL)
        self._received = np.zeros((heads, 0), RECEIVED)

    @property
    def nbytes(self) -> int:
        """Bytes that are taken now; none before the first rows. While they grow, they are there twice for a moment."""
        return self._diagonal.nbytes + self._received.nbytes

    def add(self, heads: NDArray[np.intp], first_token: int, sums: Sums, unsound: NDArray[np.bool_]) -> None:
        """Adds the rows of new tokens.

        Args:
            heads: (heads of `sums`,) which ones they are.
            first_token: of the first row.
            sums: what the rows add.
            unsound: (heads of `sums`,) whose numbers can't be of a map: these heads are NaN from now on.
        """
        tokens = sums.received.shape[1]
        self._make_room(tokens)
        self._diagonal[heads, first_token:tokens] = sums.diagonal
        self._received[heads, :tokens] += sums.received
        self._received[heads[unsound]] = np.nan

    def take(self, heads: NDArray[np.intp], tokens: int) -> tuple[Numbers, Numbers]:
        """Diagonal and column sums of these heads, (heads, tokens)."""
        return self._diagonal[heads, :tokens], self._received[heads, :tokens]

    def _make_room(self, tokens: int) -> None:
        capacity = self._diagonal.shape[1]
        if tokens <= capacity:
            return
        wider = self._declared or min(max(tokens, 2 * capacity), self.most_tokens)
        self._hold(self.heads * wider * TOKEN_BYTES)
        self._diagonal, self._received = widened(self._diagonal, wider), widened(self._received, wider)


def widened(array: Numbers, columns: int) -> Numbers:
    """The array with so many columns, the new ones 0."""
    wider = np.zeros((len(array), columns), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
