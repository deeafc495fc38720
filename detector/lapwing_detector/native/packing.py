"""Lays keys and values out as `attention.c` reads them: panels of columns side by side, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lapwing_detector.scratch import Scratch

CPU = torch.device("cpu")


def packed_keys(key: Tensor, panel: int, scratch: Scratch) -> Tensor:
    """(batch, key-value heads, panels, width, panel) of (batch, key-value heads, columns, width); zeros at the end."""
    batch, shared, columns, width = key.shape
    panels, whole = -(-columns // panel), columns // panel
    packed = take(scratch, "keys", batch, shared, panels, width, panel)
    if whole:
        packed[:, :, :whole].copy_(key[:, :, : whole * panel].view(batch, shared, whole, panel, width).transpose(3, 4))
    if whole < panels:
        rest = columns - whole * panel
        packed[:, :, whole, :, :rest].copy_(key[:, :, whole * panel :].transpose(2, 3))
        packed[:, :, whole, :, rest:].zero_()
    return packed


def packed_values(value: Tensor, panel: int, scratch: Scratch) -> Tensor:
    """(batch, key-value heads, panels, columns, panel) of (batch, key-value heads, columns, value width)."""
    batch, shared, columns, width = value.shape
    panels, whole = -(-width // panel), width // panel
    packed = take(scratch, "values", batch, shared, panels, columns, panel)
    if whole:
        packed[:, :, :whole].copy_(value[..., : whole * panel].view(batch, shared, columns, whole, panel).movedim(3, 2))
    if whole < panels:
        packed[:, :, whole, :, : width - whole * panel].copy_(value[..., whole * panel :])
        packed[:, :, whole, :, width - whole * panel :].zero_()
    return packed


def take(scratch: Scratch, name: str, *shape: int) -> Tensor:
    """A float32 tensor on the CPU that lasts until the next one of that name."""
    return scratch.take(f"native {name}", shape, torch.float32, CPU)
