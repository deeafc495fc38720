"""How many streams are open of those who need not say who they are."""

from __future__ import annotations

from collections import Counter
from typing import Final

from grpc import StatusCode

from lapwing_server.refusal import Refusal

PUSHBACK: Final = 5.0
"""Seconds after which to try again."""


class Visitors:
    """Counts open streams, of all and of each address.

    Args:
        most: of all at the same time.
        each: of one address.
    """

    def __init__(self, most: int, each: int) -> None:
        self._most, self._each = most, each
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    def enter(self, address: str) -> None:
        """Counts a stream that begins.

        Raises:
            Refusal: TOO_MANY_STREAMS.
        """
        for number, most, whose in ((len(self), self._most, ""), (self._open[address], self._each, " of this address")):
            if number >= most:
                message = f"{number} streams{whose} that need no token are open, which is the most; try again"
                raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_after=PUSHBACK)
        self._open[address] += 1

    def leave(self, address: str) -> None:
        """Counts a stream that ended."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]
