"""Divides a layer into jobs for the library, such that little memory is taken and no thread waits long."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, e, log2

import torch
from torch import Tensor

from lapwing_detector.native import library
from lapwing_detector.native.library import Library, Row, Rows, address, floats_for_row
from lapwing_detector.native.packing import CPU, packed_keys, packed_values, take
from lapwing_detector.scratch import Scratch
from lapwing_detector.strips import parts

BLOCK_ROWS = 48
"""Rows of a block, those of all heads that share their keys counted: a multiple of what the registers take."""

UNITS = 4
"""Pieces of work for each thread, so that none waits long for the last."""

PACKED_BYTES = 20 * 2**20
"""Most that keys and values take in the order in which they are read, if those of one key-value head do."""

ROUNDED_BYTES = 4 * 2**20
"""Most that queries and outputs of many rows in half precision take in float32, if those of one row do."""

WEIGHTS_BYTES = 20 * 2**20
"""Most that the weights of all threads take while the denominators of their rows are not known; fewer threads work
where each has too many columns."""

SUMS_BYTES = 4 * 2**20
"""Most that the sums of columns take before those of all pieces of work are added up, if those of one do."""

ROW_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What `attend_row` reads, as `enum dtype` in the source numbers it."""


@dataclass(frozen=True)
class Plan:
    """How a part of a layer is divided; see `struct rows`."""

    block_rows: int
    threads: int
    each: int
    """Floats of scratch for each thread."""

    shares: int


def plan(
    built: Library, threads: int, pairs: int, group: int, rows: int, columns: int, width: int, value_width: int
) -> Plan:
    """Divides the rows of some key-value heads, `pairs` of them in all sequences.

    Args:
        built: that is to do it.
        threads: at most.
        pairs: key-value heads of all sequences.
        group: heads that share a key-value head.
        rows: of each head.
        columns: that they see at most.
        width: of keys.
        value_width: of values.
    """

    def floats(block_rows: int) -> int:
        return built.floats_for_block(block_rows * group, columns, width, value_width)

    block_rows = max(1, BLOCK_ROWS // group)
    while block_rows > 1 and 4 * threads * floats(block_rows) > WEIGHTS_BYTES:
        block_rows -= 1
    each = floats(block_rows)
    threads = max(1, min(threads, WEIGHTS_BYTES // (4 * each)))
    fitting = max(1, SUMS_BYTES // (4 * pairs * group * columns))
    shares = min(ceil(rows / block_rows), ceil(UNITS * threads / pairs), fitting)
    return Plan(block_rows, threads, each, shares)


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
    group, panel = heads // shared, _library().panel
    output = value.new_empty(batch, rows, heads, value_width)
    diagonal = query.new_empty(batch, heads, rows, dtype=torch.float32)
    received = query.new_zeros(batch, heads, columns, dtype=torch.float32)
    starts = None if starts is None else starts.int().contiguous().expand(batch, rows)
    for sequences, served in parts(batch, shared, PACKED_BYTES // (4 * columns * (width + value_width))):
        of_group = slice(served.start * group, served.stop * group)
        keys = packed_keys(key[sequences, served], panel, scratch)
        values = packed_values(value[sequences, served], panel, scratch)
        for part in _rows_together(query[sequences, of_group], value_width):
            received[sequences, of_group] += _attend(
                query[sequences, of_group, part],
                keys,
                values,
                None if starts is None else starts[sequences, part],
                first + part.start,
                None if counted is None else counted[sequences, part].contiguous(),
                scaling,
                scratch,
                output[sequences, part, of_group],
                diagonal[sequences, of_group, part],
                columns,
            )
    return output, diagonal, received


def _rows_together(query: Tensor, value_width: int) -> list[slice]:
    batch, heads, rows, width = query.shape
    fitting = rows if query.dtype == torch.float32 else ROUNDED_BYTES // (4 * batch * heads * (width + value_width))
    return [slice(start, min(start + max(1, fitting), rows)) for start in range(0, rows, max(1, fitting))]


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    first: int,
    counted: Tensor | None,
    scaling: float,
    scratch: Scratch,
    output: Tensor,
    diagonal: Tensor,
    columns: int,
) -> Tensor:
    """Received, (batch, heads, columns); writes output and diagonal."""
    batch, heads, rows, width = query.shape
    shared, group, value_width = keys.shape[1], heads // keys.shape[1], output.shape[3]
    built = _library()
    how = plan(built, torch.get_num_threads(), batch * shared, group, rows, columns, width, value_width)
    if query.dtype != torch.float32 or query.stride(3) != 1:
        query = take(scratch, "query", *query.shape).copy_(query)
    exact = output if output.dtype == torch.float32 else take(scratch, "output", *output.shape)
    received = take(scratch, "received", how.shares, batch, heads, columns).zero_()
    built.run(
        Rows(
            query=address(query),
            keys=address(keys),
            values=address(values),
            starts=address(starts),
            counted=address(counted),
            output=address(exact),
            diagonal=address(diagonal),
            received=address(received),
            scratch=address(_room(scratch, how.threads * how.each)),
            query_batch=query.stride(0),
            query_head=query.stride(1),
            query_row=query.stride(2),
            starts_batch=0 if starts is None else starts.stride(0),
            output_batch=exact.stride(0),
            output_row=exact.stride(1),
            diagonal_batch=diagonal.stride(0),
            diagonal_head=diagonal.stride(1),
            batch=batch,
            shared=shared,
            group=group,
            rows=rows,
            first=first,
            columns=columns,
            width=width,
            value_width=value_width,
            panels=keys.shape[2],
            value_panels=values.shape[2],
            shares=how.shares,
            block_rows=how.block_rows,
            threads=how.threads,
            scratch_each=how.each,
            scale=scaling * log2(e),
        )
    )
    if exact is not output:
        output.copy_(exact)
    return received.sum(0)


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    diagonal: Tensor,
    received: Tensor,
    tokens: int,
    starts: Tensor | None,
    counted: Tensor | None,
    scaling: float,
    heads: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """Attention of the newest token, whose row is added to sums; keys and values are read where they lie.

    Args:
        query: (batch, heads, 1, width), of a dtype in `ROW_DTYPES`, as key and value.
        key: (batch, key-value heads, columns, width), at least a register wide.
        value: (batch, key-value heads, columns, value width), at least a panel wide.
        diagonal: (batch, heads read, tokens or more) float32, in which the newest token's is written.
        received: (batch, heads read, tokens or more) float32, to whose columns up to the newest token its row is added;
            the last stride of both is 1.
        tokens: sequence length with the newest token, as many as columns or more: the keys are those of the last ones.
        starts: (batch or 1, 1) int32 and counted: (batch, 1) bool, as for `attend`.
        scaling: of the scores.
        heads: (heads read,) int32, those whose rows are wanted; None: all.
        scratch: memory to be used again from call to call.

    Returns:
        output (batch, 1, heads, value width) in the same dtype; what is between is float32.
    """
    batch, all_heads, _, width = query.shape
    shared, columns, value_width = value.shape[1:]
    built, threads = _library(), min(torch.get_num_threads(), batch * shared)
    output = query.new_empty(batch, 1, all_heads, value_width)
    starts = None if starts is None else starts.int()
    counted = None if counted is None else counted.contiguous()
    each = floats_for_row(built, all_heads // shared, columns, width, value_width)
    query_strides, key_strides, value_strides = query.stride(), key.stride(), value.stride()
    diagonal_strides, received_strides = diagonal.stride(), received.stride()
    built.run(
        Row(
            query=query.data_ptr(),
            keys=key.data_ptr(),
            values=value.data_ptr(),
            starts=address(starts),
            counted=address(counted),
            read=address(heads),
            output=output.data_ptr(),
            diagonal=diagonal.data_ptr() + 4 * (tokens - 1),
            received=received.data_ptr() + 4 * (tokens - columns),
            scratch=_room(scratch, threads * each).data_ptr(),
            query_batch=query_strides[0],
            query_head=query_strides[1],
            key_batch=key_strides[0],
            key_head=key_strides[1],
            key_row=key_strides[2],
            value_batch=value_strides[0],
            value_head=value_strides[1],
            value_row=value_strides[2],
            starts_batch=0 if starts is None or len(starts) == 1 else starts.stride(0),
            diagonal_batch=diagonal_strides[0],
            diagonal_head=diagonal_strides[1],
            received_batch=received_strides[0],
            received_head=received_strides[1],
            batch=batch,
            shared=shared,
            group=all_heads // shared,
            columns=columns,
            width=width,
            value_width=value_width,
            reads=0 if heads is None else len(heads),
            dtype=ROW_DTYPES[query.dtype],
            threads=threads,
            scratch_each=each,
            scale=scaling * log2(e),
        )
    )
    return output


def _room(scratch: Scratch, size: int) -> Tensor:
    return scratch.room("native weights", size, torch.float32, CPU)


def _library() -> Library:
    found = library.installed()
    assert found is not None
    return found
