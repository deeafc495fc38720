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
        held, size = self._memory.get(name), math.prod(shape)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            with torch.inference_mode(False):  # or it could not be written outside of it
                held = self._memory[name] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)

    def clear(self) -> None:
        """Gives the memory back."""
        self._memory.clear()
