"""Attention of many rows with its log-sum-exp, for what torch's fused attention does not do or gives no sums of:
windows, padding on the left, rows behind a cache, soft-caps, sinks, float32.
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
    row_offsets,
    tl,
)
from lapwing_detector.kernels.rows import Rows
from lapwing_detector.kernels.tiles import Tile, block_width


def forward(query: Tensor, key: Tensor, value: Tensor, rows: Rows, tile: Tile) -> tuple[Tensor, Tensor]:
    """The softmax in one pass over the columns.

    Args:
        query: (batch, heads, rows, width).
        key: (batch, key-value heads, columns, width).
        value: (batch, key-value heads, columns, value width).

    Returns:
        output (batch, rows, heads, value width) in the dtype of `value`; log-sum-exp (batch, heads, rows) float32,
        with the sink in it, +inf for a row that sees nothing: its every weight is then 0, and so is its output.
    """
    batch, heads, count, width = query.shape
    output = value.new_empty(batch, count, heads, value.shape[-1])
    lse = query.new_empty(batch, heads, count, dtype=torch.float32)
    factor, cap = log2_scale(rows.scaling, rows.softcap)
    with on_device(query):
        _forward[(heads, -(-count // tile.rows), batch)](
            *(query, key, value, rows.sinks, rows.starts, output, lse),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
            *(count, rows.first, factor, cap),
            GROUP=heads // key.shape[1],
            WIDTH=width,
            BLOCK_WIDTH=block_width(width),
            VALUE_WIDTH=value.shape[-1],
            BLOCK_VALUE=block_width(value.shape[-1]),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            PRECISION=precision_of(query),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return output, lse


@kernel(do_not_specialize=["rows", "first"])
def _forward(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    sinks: tl.tensor,
    starts: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_column: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_column: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    VALUE_WIDTH: constexpr,
    BLOCK_VALUE: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    heads = tl.num_programs(0)
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the last rows see most and start first
    at = row + tl.arange(0, ROWS)
    own = first + at
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // GROUP * key_head
    value += batch * value_batch + head // GROUP * value_head
    queries = load_block(query, query_row, row, rows, ROWS, WIDTH, BLOCK_WIDTH, WHOLE=False)

    # Columns from `left` on are seen by some row, from `clear` to `right` by all, and up to `end` by some.
    end = first + tl.minimum(row + ROWS, rows)
    left = 0
    edge = 0
    start = tl.zeros([ROWS], tl.int32)
    if starts is not None:
        start = tl.load(starts + batch * rows + at, mask=at < rows, other=0)
        left = tl.min(tl.where((start <= own) & (at < rows), start, end))
        edge = tl.cdiv(tl.max(tl.where(start <= own, start, 0)) - left, COLUMNS)
        edge = tl.maximum(edge, 0)
    clear = left + edge * COLUMNS
    right = clear + tl.maximum(first + row + 1 - clear, 0) // COLUMNS * COLUMNS
    rest = tl.cdiv(tl.maximum(end - right, 0), COLUMNS)

    # A sink is one more column, whose value is zero: the running softmax starts with it.
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        largest = tl.zeros([ROWS], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    mixed = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for column in tl.range(clear, right, COLUMNS):
        keys = load_block(key, key_column, column, end, COLUMNS, WIDTH, BLOCK_WIDTH, WHOLE=True)
        scores = in_log2(product(queries, tl.trans(keys), PRECISION), factor, cap)
        values = load_block(value, value_column, column, end, COLUMNS, VALUE_WIDTH, BLOCK_VALUE, WHOLE=True)
        mixed, largest, total = _absorb(scores, values, mixed, largest, total, PRECISION)
    for step in tl.range(0, edge + rest, num_stages=1):
        column = tl.where(step < edge, left + step * COLUMNS, right + (step - edge) * COLUMNS)
        columns = column + tl.arange(0, COLUMNS)
        keys = load_block(key, key_column, column, end, COLUMNS, WIDTH, BLOCK_WIDTH, WHOLE=False)
        scores = in_log2(product(queries, tl.trans(keys), PRECISION), factor, cap)
        sees = (columns[None, :] <= own[:, None]) & (columns[None, :] >= start[:, None]) & (columns < end)[None, :]
        scores = tl.where(sees, scores, float("-inf"))
        values = load_block(value, value_column, column, end, COLUMNS, VALUE_WIDTH, BLOCK_VALUE, WHOLE=False)
        mixed, largest, total = _absorb(scores, values, mixed, largest, total, PRECISION)

    sighted = (start <= own) & (total > 0)
    mixed = tl.where(sighted[:, None], mixed / tl.where(sighted, total, 1.0)[:, None], 0.0)
    tl.store(
        lse + (batch * heads + head) * rows + at,
        tl.where(sighted, (largest + tl.log2(tl.where(sighted, total, 1.0))) / LOG2_E, float("inf")),
        mask=at < rows,
    )
    places = output + ((batch * rows + row) * heads + head) * VALUE_WIDTH
    places += row_offsets(heads * VALUE_WIDTH, ROWS, BLOCK_VALUE)
    inside = (at < rows)[:, None] & (tl.arange(0, BLOCK_VALUE) < VALUE_WIDTH)[None, :]
    tl.store(places, mixed.to(output.dtype.element_ty), mask=inside)


@kernel
def _absorb(
    scores: tl.tensor, values: tl.tensor, mixed: tl.tensor, largest: tl.tensor, total: tl.tensor, PRECISION: constexpr
) -> tl.tensor:
    """The running softmax with one more block of columns."""
    grown = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    level = tl.where(grown == float("-inf"), 0.0, grown)
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(largest - level)
    mixed = mixed * shrink[:, None] + product(weights.to(values.dtype), values, PRECISION)
    return mixed, grown, total * shrink + tl.sum(weights, 1)
