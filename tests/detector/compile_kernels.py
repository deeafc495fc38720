"""Compiles the kernels for a GPU that is not there, and prints what the compiler reports of them, as JSON.

Run by a test in a process of its own, since Triton either compiles or interprets: `compile_kernels.py 9.0`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lapwing_detector.kernels.columns import sum_columns
from lapwing_detector.kernels.forward import forward
from lapwing_detector.kernels.pieces import attend_in_pieces
from lapwing_detector.kernels.row_sums import add_row
from lapwing_detector.kernels.rows import Rows
from lapwing_detector.kernels.tiles import block_width, choose

TOKENS = 256


class Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def reports(capability: tuple[int, int]) -> dict[str, Any]:
    """By kernel: bytes of shared memory, registers, and bytes spilled from registers to memory."""
    found: dict[str, Any] = {}
    label = ""

    def compile_only(self: JITFunction[Any], grid: object) -> Any:
        def launch(*arguments: object, **options: object) -> None:
            found[f"{self.fn.__name__} {label}"] = _report(self.warmup(*arguments, grid=grid, **options))

        return launch

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    driver.set_active(Absent(capability))
    # On Hopper the width of most large models, and float32; elsewhere the widest heads, which need most.
    cases = [(torch.bfloat16, 256, True)]
    if capability == (9, 0):
        cases = [(torch.bfloat16, 128, False), (torch.float32, 80, True)]
    for dtype, width, special in cases:
        label = f"{str(dtype).removeprefix('torch.')}{' special' * special}"
        _launch(capability, dtype, width, special)
    return found


def _launch(capability: tuple[int, int], dtype: torch.dtype, width: int, special: bool) -> None:
    """Each kernel once, with everything that is special or with nothing; the numbers are never looked at."""
    tiles = choose(capability, dtype.itemsize, block_width(width))
    query, key = torch.zeros(1, 8, TOKENS, width, dtype=dtype), torch.zeros(1, 2, TOKENS, width, dtype=dtype)
    lse, heads = torch.zeros(1, 8, TOKENS), torch.tensor([3], dtype=torch.int32)

    def rows(count: int) -> Rows:
        first = TOKENS - count
        if not special:
            return Rows(first, None, None, 0.1, None, None)
        starts, counted = torch.zeros(1, count, dtype=torch.int32), torch.ones(1, count, dtype=torch.bool)
        return Rows(first, starts, counted, 0.1, 50.0, torch.zeros(8, dtype=dtype))

    sum_columns(query, key, lse, rows(TOKENS), heads if special else None, tiles.sums)
    one, sums = query[:, :, :1], torch.zeros(1, 8, TOKENS)
    add_row(one, key, lse[..., :1], rows(1), heads if special else None, sums[..., :1], sums, tiles.row)
    if special:
        forward(query, key, key, rows(TOKENS), tiles.forward)
        attend_in_pieces(one, key, key, rows(1), tiles.row)


def _report(kernel: Any) -> dict[str, int]:
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([reader, "-res-usage", file.name], check=True, capture_output=True, text=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert match is not None
    return {"shared": kernel.metadata.shared, "registers": int(match[1]), "spilled": int(match[2])}


if __name__ == "__main__":
    major, minor = sys.argv[1].split(".")
    print(json.dumps(reports((int(major), int(minor)))))
