"""Sizes of the blocks that a program of each kernel works on, by GPU, data type and head width.

Chosen from a table and not by autotuning, which would time dozens of variants at the first text of every new length.
Knows no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Blocks of one kernel."""

    rows: int
    columns: int
    warps: int
    stages: int
    """Blocks in flight: the next are fetched while one is worked on."""


@dataclass(frozen=True)
class Tiles:
    """Blocks of all kernels."""

    sums: Tile
    """Column sums of many rows."""

    forward: Tile
    """Attention of many rows."""

    row: Tile
    """Both, of one row; `rows` is of no account."""


def tiles_for(query: Tensor) -> Tiles:
    """For these queries (batch, heads, rows, width), on their device."""
    return choose(_capability(query.device), query.element_size(), block_width(query.shape[-1]))


def block_width(width: int) -> int:
    """The power of two that holds a width; tensor cores take at least 16."""
    return max(16, 1 << (width - 1).bit_length())


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def choose(capability: tuple[int, int], itemsize: int, width: int) -> Tiles:
    """For a GPU, a data type of `itemsize` bytes, and a head width that is a power of two.

    Chosen for full multiprocessors without spilled registers, by what the compiler reports.
    """
    if itemsize == 4:  # a product in three parts keeps three times the operands in registers
        tile = Tile(32, 32, 8 if width > 64 else 4, 2)
        return Tiles(tile, tile, Tile(16, 32, 4, 2))
    warpgroups = capability[0] in (9, 10)  # Hopper and Blackwell for data centres; the others multiply warp by warp
    row = Tile(16, 64 if width > 128 else 128, 4, 2)
    if width > 128:
        # GPUs for desktops have 99 KB of shared memory, and one block of 64 rows with two of 64 columns is more.
        narrow = not warpgroups and capability != (8, 0)
        return Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2) if narrow else Tile(64, 64, 8, 2), row)
    if not warpgroups:
        # Each warp reads all keys of its block from shared memory: with 32 rows a warp, half as often as with 16.
        return Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2) if width > 64 else Tile(128, 64, 8, 2), row)
    # At width 128, a block of 64 x 128 takes a Hopper's tensor cores 512 clocks, and its exp2 another 512. Within a
    # program one waits for the other, so two programs must share a multiprocessor: 4 warps and 64 KB each.
    return Tiles(Tile(64, 128, 4, 2), Tile(128, 64, 8, 3) if width > 64 else Tile(128, 128, 8, 2), row)
