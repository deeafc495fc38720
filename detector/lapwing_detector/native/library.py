"""The shared library that `attention.c` was built into: found, loaded, called."""

from __future__ import annotations

import ctypes
import struct
import sys
import warnings
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lapwing_detector.native.build import KINDS, digest, here, library_path

BUILD = f"{Path(sys.executable).name} -m lapwing_detector.native"

Address = int
"""Of a tensor's first number."""


class Rows(NamedTuple):
    """What the library is told of many rows: `struct rows` in the source, which says what each field is."""

    query: Address
    keys: Address
    values: Address
    starts: Address
    counted: Address
    output: Address
    diagonal: Address
    received: Address
    scratch: Address
    query_batch: int
    query_head: int
    query_row: int
    starts_batch: int
    output_batch: int
    output_row: int
    diagonal_batch: int
    diagonal_head: int
    batch: int
    shared: int
    group: int
    rows: int
    first: int
    columns: int
    width: int
    value_width: int
    panels: int
    value_panels: int
    shares: int
    block_rows: int
    threads: int
    scratch_each: int
    scale: float


class Row(NamedTuple):
    """What the library is told of one row: `struct row` in the source."""

    query: Address
    keys: Address
    values: Address
    starts: Address
    counted: Address
    read: Address
    output: Address
    diagonal: Address
    received: Address
    scratch: Address
    query_batch: int
    query_head: int
    key_batch: int
    key_head: int
    key_row: int
    value_batch: int
    value_head: int
    value_row: int
    starts_batch: int
    diagonal_batch: int
    diagonal_head: int
    received_batch: int
    received_head: int
    batch: int
    shared: int
    group: int
    columns: int
    width: int
    value_width: int
    reads: int
    dtype: int
    threads: int
    scratch_each: int
    scale: float


LAYOUTS = {Rows: struct.Struct("@9P22lf2l"), Row: struct.Struct("@10P23lf2l")}
"""In memory: addresses, whole numbers and the scale; behind them two numbers by which the threads divide the work."""

MEMORY = {job: ctypes.c_char * layout.size for job, layout in LAYOUTS.items()}


class NativeMissing(UserWarning):
    """Attention could be captured faster on this CPU."""


class Missing(Exception):
    """A library can't be used; the text says why."""


@dataclass(frozen=True, eq=False)
class Library:
    """A build for the instructions of one kind of CPU."""

    lanes: int
    """Floats of a register."""

    rows: int
    """Rows that are multiplied at once."""

    tile: int
    """Columns of a tile."""

    stride: int
    """Floats from row to row of a tile's weights."""

    heads: int
    """Heads that are multiplied at once for one row."""

    many_rows: Any
    one_row: Any
    """Functions of the library."""

    team: Any
    """Starts a function in all of torch's threads."""

    @cached_property
    def panel(self) -> int:
        """Columns of keys, or of values, that are laid side by side."""
        return 2 * self.lanes

    def floats_for_block(self, rows: int, columns: int, width: int, value_width: int) -> int:
        """That one thread needs for a block of as many rows of the query, those of all heads counted."""
        tiles = -(-columns // self.tile)
        each = width + _up(value_width, self.panel) + 2 + tiles * (self.stride + 1)
        return _up(_up(rows, self.rows) * each + 16, 16)

    def run(self, job: Rows | Row) -> None:
        """Does a job with the threads that it names, those of torch's other operations."""
        # A Structure would look each field up in its class: slow for every layer of every step of decoding.
        memory = MEMORY[type(job)]()
        LAYOUTS[type(job)].pack_into(memory, 0, *job, 0, 0)
        self.team(self.one_row if type(job) is Row else self.many_rows, memory, job.threads, 0)


@lru_cache(maxsize=16)  # every layer of a step asks
def floats_for_row(built: Library, group: int, columns: int, width: int, value_width: int) -> int:
    """That one thread needs for one row of the heads that share their keys."""
    stride = _up(columns, built.tile) + built.stride - built.tile
    return _up(_up(group, built.heads) * (_up(width, built.lanes) + _up(value_width, built.panel) + stride), 16)


def address(tensor: Tensor | None) -> int:
    """Of its first number, 0 for None; the tensor must outlive its use."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def installed() -> Library | None:
    """The library for this CPU; a warning says once why there is none where there could be."""
    kind = kind_of_cpu()
    try:
        return None if kind is None else load(library_path(kind), KINDS[kind])
    except Missing as error:
        warnings.warn(f"{error}, so torch alone captures attention, more slowly", NativeMissing, stacklevel=2)
        return None


def kind_of_cpu() -> str | None:
    """As `KINDS` calls it; None if there is no library for it."""
    kind = torch.backends.cpu.get_cpu_capability().lower()
    return kind if here() and kind in KINDS else None


def load(path: Path, options: tuple[str, ...]) -> Library:
    """A library that was built with these options.

    Raises:
        Missing: it was not built, or from another source or otherwise, or it or torch's threads can't be used.
    """
    if not path.is_file():
        raise Missing(f"attention in C is not built ({BUILD} does so; it needs gcc 9 or newer, or clang)")
    try:
        library = ctypes.CDLL(str(path))
        if (ctypes.c_char * 64).in_dll(library, "built_from").value.decode() != digest(options):
            raise Missing(f"{path.name} was built from another version of its source ({BUILD} builds it anew)")
        many, one = (ctypes.cast(function, ctypes.c_void_p) for function in (library.attend, library.attend_row))
        # Torch's own OpenMP: threads of another would wait for the cores until torch's stop spinning.
        team = ctypes.CDLL("libtorch_cpu.so").GOMP_parallel
    except (OSError, ValueError, AttributeError) as error:
        raise Missing(f"attention in C can't be used: {error}") from None
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    lanes, rows, tile, stride, heads = (ctypes.c_int * 5).in_dll(library, "sizes")
    return Library(lanes, rows, tile, stride, heads, many, one, team)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
