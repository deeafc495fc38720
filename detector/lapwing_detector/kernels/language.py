"""What the kernels share: Triton's names, typed as Any since Triton has no types, and small device functions.

Importing this module imports triton.
"""

# ruff: noqa: N803 -- arguments in capitals are known when a kernel is compiled, and each value makes another kernel

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    constexpr: TypeAlias = Any

    @overload
    def kernel(function: Callable[..., Any]) -> Any: ...
    @overload
    def kernel(*, do_not_specialize: list[str]) -> Callable[[Callable[..., Any]], Any]: ...
    def kernel(*_: Any, **__: Any) -> Any:
        """A function for the GPU; every value of a number in `do_not_specialize` runs the same code."""
else:
    constexpr = tl.constexpr
    kernel = triton.jit

__all__ = [
    "LOG2_E",
    "constexpr",
    "in_log2",
    "kernel",
    "load_block",
    "load_group",
    "log2_scale",
    "on_device",
    "precision_of",
    "product",
    "row_offsets",
    "tl",
]

LOG2_E = constexpr(math.log2(math.e))
"""Kernels reckon in powers of 2: the GPU has an instruction for exp2 alone, and the factor joins the scaling."""


def log2_scale(scaling: float, softcap: float | None) -> tuple[float, float | None]:
    """The numbers that `in_log2` takes, reckoned once in double precision."""
    if softcap is None:
        return scaling * math.log2(math.e), None
    return 2 * math.log2(math.e) * scaling / softcap, softcap * math.log2(math.e)


@kernel
def in_log2(products: tl.tensor, factor: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """Scores in units of log 2 from the products of queries and keys."""
    # cap * tanh(x), by tanh(x) = 1 - 2 / (1 + exp(2 x)), which neither overflows nor needs a tanh
    return products * factor if cap is None else cap - 2.0 * cap / (1.0 + tl.exp2(products * factor))


@kernel
def product(left: tl.tensor, right: tl.tensor, PRECISION: constexpr) -> tl.tensor:
    """Matrix product, summed in float32."""
    if PRECISION == "widened":
        result = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(left, right, input_precision=PRECISION)
    return result


@kernel
def row_offsets(stride: tl.tensor, SIZE: constexpr, BLOCK_WIDTH: constexpr) -> tl.tensor:
    """(SIZE, BLOCK_WIDTH) places of a block's numbers, counted from its first; small, so 32 bits hold them."""
    return tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, BLOCK_WIDTH)[None, :]


@kernel
def load_block(
    pointer: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    SIZE: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    WHOLE: constexpr,
) -> tl.tensor:
    """(SIZE, BLOCK_WIDTH) rows from `start` on, zero behind row `count` and behind the width.

    A WHOLE block has no rows behind `count`; without a mask its loads are plain copies.
    """
    # 64 bits for the start: a cache of a million tokens has more than 2**31 numbers.
    places = pointer + tl.cast(start, tl.int64) * stride + row_offsets(stride, SIZE, BLOCK_WIDTH)
    inside = (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    if WHOLE:
        block = tl.load(places) if WIDTH == BLOCK_WIDTH else tl.load(places, mask=inside, other=0.0)
    else:
        block = tl.load(places, mask=inside & (start + tl.arange(0, SIZE) < count)[:, None], other=0.0)
    return block


@kernel
def load_group(
    query: tl.tensor,
    query_head: tl.tensor,
    GROUP: constexpr,
    BLOCK_GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
) -> tl.tensor:
    """(BLOCK_GROUP, BLOCK_WIDTH) the queries that share a key-value head."""
    head = tl.program_id(1) * GROUP
    return load_block(query, query_head, head, head + GROUP, BLOCK_GROUP, WIDTH, BLOCK_WIDTH, WHOLE=False)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device, which need not be that of a layer of a model split over GPUs."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def precision_of(tensor: Tensor) -> str:
    """How `product` multiplies these numbers.

    float32 in three parts, since one TF32 product is only good to 3 digits.
    """
    if tensor.dtype == torch.float32:
        return "tf32x3"
    if tensor.dtype == torch.bfloat16 and not isinstance(product, triton.JITFunction):
        return "widened"  # Triton's interpreter keeps bfloat16 as integers, and would multiply those
    return "ieee"
