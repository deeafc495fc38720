"""What one slice of attention holds, and how exact it can be. Knows arrays and their messages, no stream.

The numbers are taken as they are: nothing is clipped or brought back to 1. What they must keep to is in
`attention_doubts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lapwing.v1 import tensor_pb2
from lapwing_server.refusal import invalid

Numbers = NDArray[Any]

DTYPES: Final[dict[int, np.dtype[Any]]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
}

ROUNDING: Final = {"float32": 2**-12, "float16": 2**-10, "bfloat16": 2**-8}
"""By the type of the model: how far from 1 a row may add up. A model whose weights leave the softmax in half precision
rounds each by up to 2^-11 (float16) or 2^-9 (bfloat16) of it before anybody sees it; twice that. In float32 a softmax
is some 2^-18 off at most; there is room for ways of computing it that we have not seen."""

BY_ROW: Final = 2.0**-24
"""What a float32 loses of itself at most with each number that is added to it."""


@dataclass(frozen=True)
class Rules:
    """What rows must keep to."""

    sinks: bool
    """Rows add up to at most 1 instead of 1."""

    model_dtype: str
    """Type in which the model computes; the coarsest one where it is none of `ROUNDING`."""

    def relative(self, dtype: Any = np.float32) -> float:
        """How much of a weight rounding may take or add, by the model and, of rows in float16, on the way."""
        return ROUNDING.get(self.model_dtype, max(ROUNDING.values())) + 2.0**-10 * is_half(dtype)

    def tolerance(self, columns: int, dtype: Any = np.float32) -> float:
        """How far from 1 a row may add up, and how far over 1 a weight may be.

        Sums over rows are rounded by up to 2^-24 of them with each row that is added, and those of a head are together
        as large as it has columns. Rows that are sent in float16 are rounded on the way by up to 2^-11 of a weight, or
        by 2^-25 where it is below 2^-14; twice that.

        What this lets through: of whole rows, what moves no row by more. Sums of R rows may be off by R times it, so
        that one row which is missing in them shows only as long as that is below 1: in up to 2,500 rows at once of a
        model in float32, 950 in float16 and 250 in bfloat16. In fewer rows at a time, or as whole rows, it always
        shows. With attention sinks it never does, for rows that add up to little are then allowed.
        """
        return self.relative(dtype) + columns * BY_ROW * (1 + is_half(dtype))

    def least(self, dtype: Any = np.float32) -> float:
        """Weights below it may have become 0, in a model in float16 or on the way."""
        half = is_half(dtype) or self.model_dtype not in ("float32", "bfloat16")
        return 2.0**-24 if half else 2.0**-126


def is_half(dtype: Any) -> bool:
    """Whether numbers come as float16."""
    return bool(np.dtype(dtype).itemsize == 2)


@dataclass(frozen=True)
class Sums:
    """What the rows of a slice add to some heads."""

    diagonal: Numbers
    """(heads, rows)."""

    received: Numbers
    """(heads, columns) float64."""


def read_tensor(tensor: tensor_pb2.Tensor, axes: int, dtypes: tuple[int, ...], field: str) -> Numbers:
    """The array of a message, without copying it.

    Args:
        tensor: as it came.
        axes: how many it must have.
        dtypes: that it may have, of `DTYPES`.
        field: path of the tensor.

    Raises:
        Refusal: type, shape or length are not right.
    """
    if tensor.dtype not in dtypes:
        known = " or ".join(DTYPES[dtype].name for dtype in dtypes)
        raise invalid(f"{field}.dtype", f"is {name_of(tensor.dtype)}; give {known}")
    if len(tensor.shape) != axes:
        raise invalid(f"{field}.shape", f"has {len(tensor.shape)} axes, {list(tensor.shape)[:8]}; it must have {axes}")
    for axis, length in enumerate(tensor.shape):
        if length < 1:
            raise invalid(f"{field}.shape[{axis}]", f"is {length}; give 1 or more")
    dtype, needed = DTYPES[tensor.dtype], math.prod(tensor.shape)
    if len(tensor.data) != needed * dtype.itemsize:
        raise invalid(
            f"{field}.data",
            f"has {len(tensor.data)} bytes; {needed} numbers of this type take {needed * dtype.itemsize}",
        )
    values: Numbers = np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))
    return values


def name_of(dtype: int) -> str:
    """What a type is called."""
    known = tensor_pb2.DataType.DESCRIPTOR.values_by_number.get(dtype)
    return known.name.removeprefix("DATA_TYPE_").lower() if known else f"number {dtype}"


def summary_sums(diagonal: Numbers, received: Numbers) -> Sums:
    """The sums of a summary slice; (heads, rows) and (heads, columns)."""
    return Sums(diagonal, received.astype(np.float64))


def rows_sums(weights: Numbers, diagonal: Numbers | None, first_token: int) -> Sums:
    """The sums of a slice of rows.

    Args:
        weights: (heads, rows, columns).
        diagonal: (heads, rows), where it is sent apart.
        first_token: of the first row.
    """
    within = np.diagonal(weights, offset=first_token, axis1=1, axis2=2)
    return Sums(within if diagonal is None else diagonal, weights.sum(axis=1, dtype=np.float64))
