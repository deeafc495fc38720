"""What one slice of attention holds, checked number by number. Knows arrays and their messages, no stream.

What a map of a causal model must be: every weight in [0, 1], none after the row's own token, every row adding up to 1
(to at most 1 where the model has attention sinks). Sums over rows must keep what follows from it. The numbers are taken
as they are: nothing is clipped or brought back to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Rules:
    """What rows must keep to."""

    sinks: bool
    """Rows add up to at most 1 instead of 1."""

    model_dtype: str
    """Type in which the model computes; the coarsest one where it is none of `ROUNDING`."""

    def tolerance(self, columns: int, dtype: Any = np.float32) -> float:
        """How far from 1 a row may add up, and how far over 1 a weight may be.

        Sums over rows are rounded by up to 2^-24 of them with each row that is added, and those of a head are together
        as large as it has columns. Rows that are sent in float16 are rounded on the way by up to 2^-11 of a weight, or
        by 2^-25 where it is below 2^-14; twice that.
        """
        relative, by_column = ROUNDING.get(self.model_dtype, max(ROUNDING.values())), 2.0**-24
        if np.dtype(dtype).itemsize == 2:
            relative, by_column = relative + 2.0**-10, 2 * by_column
        return relative + columns * by_column


@dataclass(frozen=True)
class Sums:
    """What the rows of a slice add to some heads."""

    diagonal: Numbers
    """(heads, rows)."""

    received: Numbers
    """(heads, columns) float64."""


@dataclass(frozen=True)
class Doubt:
    """A rule, and where it is broken."""

    broken: NDArray[np.bool_]
    """(heads, ...)."""

    field: str
    reason: str
    message: str


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
        raise invalid(f"{field}.dtype", f"is number {tensor.dtype}; give {known}")
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


def summary_sums(diagonal: Numbers, received: Numbers) -> Sums:
    """The sums of a summary slice; (heads, rows) and (heads, columns)."""
    return Sums(diagonal, received.astype(np.float64))


def summary_doubts(sums: Sums, first_token: int, rules: Rules) -> Iterator[Doubt]:
    """All that can be told from sums over rows, rule by rule."""
    rows, columns = sums.diagonal.shape[1], sums.received.shape[1]
    one, field = rules.tolerance(columns), "summary.received"
    seen = np.minimum(rows, np.arange(columns, 0, -1))  # (columns,): rows that see each token
    yield not_finite(sums.diagonal, "summary.diagonal")
    yield not_finite(sums.received, field)
    yield outside(sums.diagonal, one, "summary.diagonal")
    yield Doubt(
        (sums.received < -seen * one) | (sums.received > seen * (1 + one)),
        field,
        "NOT_ATTENTION",
        "a token receives at least 0, and at most 1 from each row that sees it",
    )
    yield Doubt(
        sums.received[:, first_token:] < sums.diagonal - seen[first_token:] * one,
        field,
        "NOT_ATTENTION",
        "what a token receives holds its attention to itself, and can't be less",
    )
    yield unlike_one(sums.received.sum(axis=-1), rows, rows * one, rules.sinks, field)
    if first_token == 0:
        yield unlike_one(sums.diagonal[:, 0], 1, one, rules.sinks, "summary.diagonal")


def rows_sums(weights: Numbers, diagonal: Numbers | None, first_token: int) -> Sums:
    """The sums of a slice of rows.

    Args:
        weights: (heads, rows, columns).
        diagonal: (heads, rows), where it is sent apart.
        first_token: of the first row.
    """
    within = np.diagonal(weights, offset=first_token, axis1=1, axis2=2)
    return Sums(within if diagonal is None else diagonal, weights.sum(axis=1, dtype=np.float64))


def rows_doubts(weights: Numbers, diagonal: Numbers | None, first_token: int, rules: Rules) -> Iterator[Doubt]:
    """All that can be told from whole rows, rule by rule; arguments as for `rows_sums`."""
    tolerance = rules.tolerance(weights.shape[2], weights.dtype)
    yield not_finite(weights, "rows.weights")
    yield outside(weights, tolerance, "rows.weights")
    later = np.triu(np.ones(weights.shape[1:], bool), first_token + 1)  # (rows, columns)
    yield Doubt((weights != 0) & later, "rows.weights", "NOT_ATTENTION", "a row must be 0 after its own token")
    yield unlike_one(weights.sum(axis=2, dtype=np.float64), 1, tolerance, rules.sinks, "rows.weights")
    if diagonal is not None:
        yield not_finite(diagonal, "rows.diagonal")
        yield outside(diagonal, tolerance, "rows.diagonal")
        apart = np.abs(diagonal - np.diagonal(weights, first_token, 1, 2).astype(np.float32)) > tolerance
        yield Doubt(apart, "rows.diagonal", "NOT_ATTENTION", f"is not that of the weights within {tolerance:.2g}")


def not_finite(values: Numbers, field: str) -> Doubt:
    """Every number must be finite."""
    message = "is not finite; load the model in float32 or bfloat16"
    return Doubt(~np.isfinite(values), field, "NON_FINITE", message)


def outside(values: Numbers, tolerance: float, field: str) -> Doubt:
    """Every weight must lie in [0, 1]."""
    message = f"must lie in [0, 1], up to {tolerance:.2g} above"
    return Doubt((values < 0) | (values > 1 + tolerance), field, "NOT_ATTENTION", message)


def unlike_one(values: Numbers, expected: int, tolerance: float, sinks: bool, field: str) -> Doubt:
    """Rows must add up to 1 each, or to at most 1 with sinks."""
    least = 0 if sinks else expected
    broken = (values < least - tolerance) | (values > expected + tolerance)
    message = (
        f"adds up to more than {expected}, beyond {tolerance:.2g}"
        if sinks
        else f"does not add up to {expected} within {tolerance:.2g}; of a model with attention sinks the header says so"
    )
    return Doubt(broken, field, "NOT_ATTENTION", message)
