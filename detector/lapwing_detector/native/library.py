"""The shared library that `attention.c` was built into when the package was installed: found, loaded, called."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwing_detector.native.build import BUILDS, digest, here, library_path

BUILD = f"{Path(sys.executable).name} -m lapwing_detector.native"

PANEL_REGISTERS, TILE, STRIDE = 2, 128, 144
"""As in the source: registers to a panel, columns of a tile, and floats from row to row of its weights."""


POINTERS = ("query", "keys", "values", "starts", "counted", "output", "diagonal", "received", "scratch")
STRIDES = (
    *("query_batch", "starts_batch", "output_batch", "diagonal_batch"),
    *("query_head", "query_row", "output_row", "diagonal_head"),
    *("key_batch", "key_head", "key_row", "value_batch", "value_head", "value_row"),
)
SIZES = (
    *("batch", "shared", "group", "rows", "first", "columns", "width", "value_width", "panels", "value_panels"),
    *("shares", "block_rows", "threads", "scratch_each"),
)
COUNTERS = ("joined", "next")


class Missing(Exception):
    """The library can't be used; the text says why."""


class Job(ctypes.Structure):
    """`struct job` of the source, which says what each field is."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_long) for name in STRIDES + SIZES),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_long) for name in COUNTERS),
    )


@dataclass(frozen=True)
class Library:
    """A build for the instructions of one kind of CPU."""

    lanes: int
    """Floats of a register."""

    many_rows: Any
    one_row: Any
    """Functions of the library."""

    team: Any
    """Starts a function in all of torch's threads."""

    @property
    def panel(self) -> int:
        """Columns of keys, or of values, that are laid side by side."""
        return PANEL_REGISTERS * self.lanes

    def scratch_floats(self, rows: int, columns: int, width: int, value_width: int) -> int:
        """What one thread needs for as many rows of the query at once, those of all heads counted."""
        padded, tiles = rows + self.lanes, -(-columns // TILE) + 1
        return 16 + padded * (width + value_width + 2 * self.panel + 2 + tiles * (STRIDE + 1)) // 16 * 16

    def run(self, function: Any, job: Job) -> None:
        """Does the job with the threads that it names, those of torch's other operations."""
        self.team(function, ctypes.addressof(job), job.threads, 0)


def address(tensor: Tensor | None) -> int | None:
    """Of its first number; the tensor must outlive its use."""
    return None if tensor is None else tensor.data_ptr()


def fitting() -> str | None:
    """The kind of CPU that this is, as `BUILDS` calls it; None if there is no library for it."""
    kind = torch.backends.cpu.get_cpu_capability().lower()
    return kind if here() and kind in BUILDS else None


def load(kind: str, path: Path | None = None) -> Library:
    """The library for a kind of CPU.

    Raises:
        Missing: it was not built, or from another source, or torch has other threads than it can use.
    """
    path = path or library_path(kind)
    if not path.is_file():
        raise Missing(f"attention in C is not built ({BUILD} does so; it needs a C compiler)")
    library = ctypes.CDLL(str(path))
    if (ctypes.c_char * 64).in_dll(library, "built_from").value.decode() != digest():
        raise Missing(f"{path.name} was built from another version of its source ({BUILD} builds it anew)")
    # Torch's own OpenMP: threads of another would wait for the cores until torch's stop spinning.
    of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        team = of_torch.GOMP_parallel
    except AttributeError:
        raise Missing("torch was built without OpenMP") from None
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    lanes = ctypes.c_int.in_dll(library, "lanes_of_register").value
    many, one = (ctypes.cast(function, ctypes.c_void_p) for function in (library.attend, library.attend_row))
    return Library(lanes, many, one, team)
