"""Attention with its sums for CPUs, in C: one pass over tiles that fit the caches, about as fast as torch's attention.

What it computes is what `lapwing_detector.attention.attend` computes. It is built when the package is installed, where
there is a C compiler, for Linux on x86-64; `available` says whether it can be called. There are no gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lapwing_detector.native import library
from lapwing_detector.native.attending import ROW_DTYPES, attend, attend_row
from lapwing_detector.native.library import NativeMissing
from lapwing_detector.native.packing import CPU

__all__ = ["CPU", "NativeMissing", "attend", "attend_row", "available", "supports", "supports_row"]

LEAST_ROWS = 16
"""Rows from which on it pays to lay out all keys and values anew."""


def available() -> bool:
    """Whether this CPU has a library; a warning says once why not where there could be one."""
    return library.installed() is not None


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these tensors, shaped as it says."""
    return (
        query.device == CPU
        and query.shape[2] >= LEAST_ROWS
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and not (query.dtype == torch.bfloat16 and multiplies_bfloat16())  # then torch is faster than float32
        and not torch.is_grad_enabled()
        and available()
    )


def supports_row(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_row` takes these tensors, shaped as it says."""
    built = library.installed() if query.is_cpu and available() else None
    batch, shared, _, width = key.shape
    return (
        built is not None
        and query.dtype in ROW_DTYPES  # bfloat16 on every CPU: for one row it is read, not multiplied, that takes long
        and query.dtype == key.dtype == value.dtype
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and width >= built.lanes
        and value.shape[3] >= built.panel
        and 2 * batch * shared >= torch.get_num_threads()  # a head's row is one thread's
        and not torch.is_grad_enabled()
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 itself: twice as fast as in float32, or else far slower."""
    known: Any = torch.ops.mkldnn
    return bool(known._is_mkldnn_bf16_supported())
