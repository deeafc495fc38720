"""The compiler takes what the interpreter takes: kernels compile for GPUs that are not here, within their means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")  # an extra

SHARED = {"8.9": 99 * 1024, "9.0": 227 * 1024}
"""Shared memory that a program can have, by compute capability: of those with the least and of Hopper."""


def compiled(capability: str, cache: Path) -> dict[str, Any]:
    program = Path(__file__).parent / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(program.parents[2])}
    run = subprocess.run(
        [sys.executable, program, capability], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile(capability: str, tmp_path: Path) -> None:
    reports = compiled(capability, tmp_path)
    kernels = {name.split()[0] for name in reports}
    assert kernels == {"_sum_columns", "_forward", "_attend_piece", "_put_together", "_add_row"}
    assert all(report["shared"] <= SHARED[capability] for report in reports.values()), reports
    # A register that is spilled within the loop costs more than all that is saved elsewhere.
    sums = [report for name, report in reports.items() if name.startswith("_sum_columns bfloat16")]
    assert [report["spilled"] for report in sums] == [0] * len(sums), reports
    if capability == "9.0":
        whole = reports["_sum_columns bfloat16"]
        assert 2 * whole["shared"] <= SHARED[capability]  # two programs share a multiprocessor ...
        assert 2 * 128 * whole["registers"] <= 65536  # ... 4 warps of 32 threads each
