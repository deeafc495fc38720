"""Tensors that are written over again and again, so that blocks and layers do not each ask for memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named tensors of any shape that share their memory with the one of that name before.

    What is taken lasts until the same name is taken again. Not for several threads.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        return self.room(name, size, dtype, device)[:size].view(shape)

    def room(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory itself, flat: at least so many numbers."""
        held = self._memory.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            with torch.inference_mode(False):  # or it could not be written outside of it
                held = self._memory[name] = torch.empty(size, dtype=dtype, device=device)
        return held

    def clear(self) -> None:
        """Gives the memory back."""
        self._memory.clear()
