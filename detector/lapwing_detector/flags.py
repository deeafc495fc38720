"""One flag for each token of some sequences that grow. Knows no attention."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_ROOM = 64
"""Tokens for which room is made at first."""


class Flags:
    """Flags of every token so far, in room that doubles: however many come one by one, few are copied twice."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of each sequence."""

        self._room = torch.empty(0, 0, dtype=torch.bool)

    @property
    def all(self) -> Tensor:
        """(sequences, tokens) bool: a view, which shows what was added until now."""
        return self._room[:, : self.tokens]

    def add(self, flags: Tensor) -> None:
        """The flags of new tokens, (sequences, new tokens) bool; the same sequences every time."""
        start, self.tokens = self.tokens, self.tokens + flags.shape[1]
        if self.tokens > self._room.shape[1]:
            old = self._room[:, :start]
            with torch.inference_mode(False):  # or none could be added outside of it
                self._room = flags.new_empty(len(flags), max(2 * start, self.tokens, LEAST_ROOM))
            if start:
                self._room[:, :start] = old
        self._room[:, start : self.tokens] = flags
