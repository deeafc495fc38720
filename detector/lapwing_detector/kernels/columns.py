"""Column sums and diagonal of the maps of many rows: scores are recomputed, a block of columns at a time.

The map is gone once its softmax is summed, but with each row's log-sum-exp every weight is exp(score - log-sum-exp),
whatever the order. So a program owns some columns of one head, holds their keys, and walks down the rows that see
them. Nothing is written by two programs: no atomics, and the same bits each time.
"""

# ruff: noqa: N803 -- arguments in capitals are known when a kernel is compiled, and each value makes another kernel

from __future__ import annotations

import torch
from torch import Tensor

from lapwing_detector.kernels.language import (
    LOG2_E,
    constexpr,
    in_log2,
    kernel,
    load_block,
    log2_scale,
    on_device,
    precision_of,
    product,
    tl,
)
from lapwing_detector.kernels.rows import Rows
from lapwing_detector.kernels.tiles import Tile, block_width

SCAN = 1024
"""Rows whose starts are looked through at a time."""


def sum_columns(
    query: Tensor, key: Tensor, lse: Tensor, rows: Rows, heads: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The two sums of each map.

    Heads that share keys are neighbours among the programs, not one program: by the time that the second asks, the
    keys are in the L2 cache, and they are but one block against all the queries that a program reads. Fewer, longer
    programs would leave multiprocessors idle at the end.

    Args:
        query: (batch, heads, rows, width).
        key: (batch, key-value heads, columns, width).
        lse: (batch, heads, rows) float32 log-sum-exp of each row, +inf where it sees nothing.
        heads: (heads read,) int32; None: all.

    Returns:
        diagonal (batch, heads read, rows) and received (batch, heads read, columns), float32.
    """
    batch, all_heads, count, width = query.shape
    read = all_heads if heads is None else len(heads)
    columns = rows.first + count
    diagonal = query.new_empty(batch, read, count, dtype=torch.float32)
    received = query.new_empty(batch, read, columns, dtype=torch.float32)
    factor, cap = log2_scale(rows.scaling, rows.softcap)
    # The first columns have the longest way to go and start first.
    grid = (read, -(-columns // tile.columns), batch)
    with on_device(query):
        _sum_columns[grid](
            *(query, key, lse.contiguous(), rows.counted, rows.starts, heads, diagonal, received),
            *(*query.stride()[:3], *key.stride()[:3]),
            *(all_heads, count, rows.first, factor, cap),
            GROUP=all_heads // key.shape[1],
            WIDTH=width,
            BLOCK_WIDTH=block_width(width),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            SCAN=SCAN,
            PRECISION=precision_of(query),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return diagonal, received


@kernel(do_not_specialize=["rows", "first"])
def _sum_columns(
    query: tl.tensor,
    key: tl.tensor,
    lse: tl.tensor,
    counted: tl.tensor,
    starts: tl.tensor,
    read: tl.tensor,
    diagonal: tl.tensor,
    received: tl.tensor,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_column: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    SCAN: constexpr,
    PRECISION: constexpr,
) -> None:
    place, left, batch = tl.program_id(0), tl.program_id(1) * COLUMNS, tl.program_id(2).to(tl.int64)
    head = (place if read is None else tl.load(read + place)).to(tl.int64)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // GROUP * key_head
    lse += (batch * heads + head) * rows
    if counted is not None:
        counted += batch * rows
    if starts is not None:
        starts += batch * rows
    out = batch * tl.num_programs(0) + place
    diagonal += out * rows
    received += out * (first + rows)

    keys = load_block(key, key_column, left, first + rows, COLUMNS, WIDTH, BLOCK_WIDTH, WHOLE=False)
    keys = tl.trans(keys)  # (width, columns)
    # Rows from `top` see some of these columns, from `below` on all of them, up to where a window leaves the first.
    top = tl.maximum(left - first, 0)
    edge = tl.cdiv(tl.maximum(tl.minimum(left + COLUMNS - first, rows) - top, 0), ROWS)
    below = top + edge * ROWS
    clear, end = _reach(counted, starts, top, below, rows, left, COLUMNS, SCAN)
    bottom = below + tl.maximum(clear - below, 0) // ROWS * ROWS
    rest = tl.cdiv(tl.maximum(end - bottom, 0), ROWS)

    # Summed elementwise, and over the rows once at the end: between threads it would cost as much as the weights.
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    own = left + tl.arange(0, COLUMNS)
    # The few blocks that need a mask, above the full ones and below; not pipelined, to have registers for the others.
    for step in tl.range(0, edge + rest, num_stages=1):
        row = tl.where(step < edge, top + step * ROWS, bottom + (step - edge) * ROWS)
        at = row + tl.arange(0, ROWS)
        queries = load_block(query, query_row, row, rows, ROWS, WIDTH, BLOCK_WIDTH, WHOLE=False)
        total = tl.load(lse + at, mask=at < rows, other=float("inf")) * LOG2_E
        scores = in_log2(product(queries, keys, PRECISION), factor, cap)
        sees = own[None, :] <= (first + at)[:, None]
        if starts is not None:
            sees &= own[None, :] >= tl.load(starts + at, mask=at < rows, other=0)[:, None]
        weights = tl.where(sees, tl.exp2(scores - total[:, None]), 0.0)
        itself = tl.sum(tl.where(own[None, :] == (first + at)[:, None], weights, 0.0), 1)
        tl.store(diagonal + at, itself, mask=(at < rows) & (first + at >= left) & (first + at < left + COLUMNS))
        if counted is not None:
            weights = tl.where((tl.load(counted + at, mask=at < rows, other=0) != 0)[:, None], weights, 0.0)
        sums += weights
    for row in tl.range(below, bottom, ROWS):
        queries = load_block(query, query_row, row, rows, ROWS, WIDTH, BLOCK_WIDTH, WHOLE=True)
        total = tl.load(lse + row + tl.arange(0, ROWS)) * LOG2_E
        scores = in_log2(product(queries, keys, PRECISION), factor, cap)
        sums += tl.exp2(scores - total[:, None])
    tl.store(received + own, tl.sum(sums, 0), mask=own < first + rows)


@kernel
def _reach(
    counted: tl.tensor,
    starts: tl.tensor,
    top: tl.tensor,
    below: tl.tensor,
    rows: tl.tensor,
    left: tl.tensor,
    COLUMNS: constexpr,
    SCAN: constexpr,
) -> tl.tensor:
    """First row from `below` on that does not see or count all these columns, and the end of those that do any."""
    clear = rows
    end = rows
    if (counted is not None) or (starts is not None):
        end = top
        for row in range(top, rows, SCAN):
            at = row + tl.arange(0, SCAN)
            some = at < rows
            every = at < rows
            if counted is not None:
                counts = tl.load(counted + at, mask=at < rows, other=0) != 0
                some &= counts
                every &= counts
            if starts is not None:
                start = tl.load(starts + at, mask=at < rows, other=0)
                some &= start < left + COLUMNS
                every &= start <= left
            clear = tl.minimum(clear, tl.min(tl.where((at >= below) & (at < rows) & (every == 0), at, rows)))
            end = tl.maximum(end, tl.max(tl.where(some, at + 1, 0)))
    return clear, end
