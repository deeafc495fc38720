"""Attention with its sums for CPUs, in C: one pass over tiles that fit the cache, faster than torch's attention alone.

What it computes is what `lapwing_detector.attention.attend` computes. It is built when the package is installed, where
there is a C compiler, for Linux on x86-64; `available` says whether it can be called. There are no gradients.
"""

from __future__ import annotations

import warnings
from functools import cache
from math import ceil, e, log2
from typing import Any

import torch
from torch import Tensor

from lapwing_detector.native.library import Job, Library, Missing, address, fitting, load
from lapwing_detector.native.packing import CPU, packed_keys, packed_values, take
from lapwing_detector.scratch import Scratch
from lapwing_detector.strips import parts

LEAST_ROWS = 16
"""Rows from which on it pays to lay out all keys and values anew."""

BLOCK_ROWS = 48
"""Rows of a block, those of all heads that share their keys counted: a multiple of what the registers take."""

WEIGHTS_BYTES = 24 * 2**20
"""Most that the weights of all threads take while the denominators of their rows are not known, if one row's fit."""

TOGETHER_BYTES = 24 * 2**20
"""Most that keys, values and what is rounded take in float32, if one key-value head's fit."""

UNITS = 4
"""Pieces of work for each thread, so that none waits long for the last."""


class NativeMissing(UserWarning):
    """Attention could be captured faster on this CPU."""


@cache
def available() -> bool:
    """Whether `attend` can be called; a warning says why not, once, where something can be done about it."""
    return _library() is not None


@cache
def _library() -> Library | None:
    kind = fitting()
    try:
        return None if kind is None else load(kind)
    except Missing as error:
        warnings.warn(f"{error}, so torch alone captures attention, more slowly", NativeMissing, stacklevel=2)
        return None


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 itself: twice as fast as in float32, or else far slower."""
    known: Any = torch.ops.mkldnn
    return bool(known._is_mkldnn_bf16_supported())


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
    library = _library()
    return (
        library is not None
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.device == CPU
        and key.shape[3] >= library.lanes
        and value.shape[3] >= library.panel
        and query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        and 2 * key.shape[0] * key.shape[1] >= torch.get_num_threads()  # a head's row is one thread's
        and not torch.is_grad_enabled()
        and available()
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None,
    first: int,
    counted: Tensor | None,
    scaling: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of some rows of the map, with the sums of these rows.

    Args:
        query: (batch, heads, rows, width).
        key: (batch, key-value heads, columns, width); each serves heads / key-value heads consecutive heads.
        value: (batch, key-value heads, columns, value width).
        starts: (batch or 1, rows) int32, the first column that each row sees; it sees those from there to its own, and
            none if it starts behind its own: its output is then zero. None: every row sees all to its own.
        first: column of the first row's own token; row j is column first + j, and the last row is the last column.
        counted: (batch, rows) bool, the rows that take part in `received`; None: all.
        scaling: of the scores.
        scratch: memory to be used again from call to call.

    Returns:
        output (batch, rows, heads, value width) in the dtype of `value`; diagonal (batch, heads, rows) and
        received (batch, heads, columns), float32.
    """
    batch, heads, rows, width = query.shape
    shared, columns, value_width = value.shape[1:]
    group = heads // shared
    output = value.new_empty(batch, rows, heads, value_width)
    diagonal = query.new_empty(batch, heads, rows, dtype=torch.float32)
    received = query.new_empty(batch, heads, columns, dtype=torch.float32)
    starts = None if starts is None else starts.int().contiguous().expand(batch, rows)
    numbers = (columns + rows * group) * (width + value_width)
    for sequences, served in parts(batch, shared, TOGETHER_BYTES // (4 * numbers)):
        of_group = slice(served.start * group, served.stop * group)
        found = _attend(
            query[sequences, of_group],
            key[sequences, served],
            value[sequences, served],
            None if starts is None else starts[sequences],
            first,
            None if counted is None else counted[sequences].contiguous(),
            scaling,
            scratch,
            output[sequences, :, of_group],
            diagonal[sequences, of_group],
        )
        received[sequences, of_group] = found
    return output, diagonal, received


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    first: int,
    counted: Tensor | None,
    scaling: float,
    scratch: Scratch,
    output: Tensor,
    diagonal: Tensor,
) -> Tensor:
    """Received; writes output and diagonal."""
    library, threads = _library(), torch.get_num_threads()
    assert library is not None
    batch, heads, rows, width = query.shape
    shared, columns, value_width = value.shape[1:]
    keys, values = packed_keys(key, library.panel, scratch), packed_values(value, library.panel, scratch)
    if query.dtype != torch.float32 or query.stride(3) != 1:
        query = take(scratch, "query", *query.shape).copy_(query)
    exact = output if output.dtype == torch.float32 else take(scratch, "output", *output.shape)
    block_rows = max(1, min(BLOCK_ROWS, WEIGHTS_BYTES // (4 * threads * columns)) * shared // heads)
    shares = min(ceil(rows / block_rows), ceil(UNITS * threads / (batch * shared)))
    received = take(scratch, "received", shares, batch, heads, columns).zero_()
    each = library.scratch_floats(block_rows * heads // shared, columns, width, value_width)
    library.run(
        library.many_rows,
        Job(
            query=address(query),
            query_batch=query.stride(0),
            query_head=query.stride(1),
            query_row=query.stride(2),
            keys=address(keys),
            panels=keys.shape[2],
            values=address(values),
            value_panels=values.shape[2],
            starts=address(starts),
            starts_batch=0 if starts is None else starts.stride(0),
            counted=address(counted),
            output=address(exact),
            output_batch=exact.stride(0),
            output_row=exact.stride(1),
            diagonal=address(diagonal),
            diagonal_batch=diagonal.stride(0),
            diagonal_head=diagonal.stride(1),
            received=address(received),
            batch=batch,
            shared=shared,
            group=heads // shared,
            rows=rows,
            first=first,
            columns=columns,
            width=width,
            value_width=value_width,
            shares=shares,
            block_rows=block_rows,
            threads=threads,
            scratch=address(_room(scratch, threads * each)),
            scratch_each=each,
            scale=scaling * log2(e),
        ),
    )
    if exact is not output:
        output.copy_(exact)
    return received.sum(0)


def _room(scratch: Scratch, size: int) -> Tensor:
    return scratch.room("native weights", size, torch.float32, CPU)


def attend_row(
    query: Tensor, key: Tensor, value: Tensor, *, counted: Tensor | None, scaling: float, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the newest token, which sees all: as `attend`, but keys and values are read where they lie.

    Args:
        query: (batch, heads, 1, width), float32, as key and value.
        key: (batch, key-value heads, columns, width), at least a register wide.
        value: (batch, key-value heads, columns, value width), at least a panel wide.
        counted: (batch, 1) bool, as for `attend`.
        scaling: of the scores.
        scratch: memory to be used again from call to call.

    Returns:
        output (batch, 1, heads, value width); diagonal (batch, heads, 1) and received (batch, heads, columns).
    """
    library, threads = _library(), torch.get_num_threads()
    assert library is not None
    batch, heads, _, width = query.shape
    shared, columns, value_width = value.shape[1:]
    output = query.new_empty(batch, 1, heads, value_width)
    diagonal, received = query.new_empty(batch, heads, 1), query.new_empty(batch, heads, columns)
    each = library.scratch_floats(heads // shared, columns, width, value_width)
    library.run(
        library.one_row,
        Job(
            query=address(query),
            query_batch=query.stride(0),
            query_head=query.stride(1),
            keys=address(key),
            key_batch=key.stride(0),
            key_head=key.stride(1),
            key_row=key.stride(2),
            values=address(value),
            value_batch=value.stride(0),
            value_head=value.stride(1),
            value_row=value.stride(2),
            counted=address(counted),
            output=address(output),
            output_batch=output.stride(0),
            diagonal=address(diagonal),
            diagonal_batch=heads,
            diagonal_head=1,
            received=address(received),
            batch=batch,
            shared=shared,
            group=heads // shared,
            columns=columns,
            width=width,
            value_width=value_width,
            threads=threads,
            scratch=address(_room(scratch, threads * each)),
            scratch_each=each,
            scale=scaling * log2(e),
        ),
    )
    return output, diagonal, received
