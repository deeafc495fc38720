"""Attention of one row where torch's fused attention won't do: in pieces of the columns, put together afterwards.

Every program reads some of the keys, so that a batch of 1 fills a GPU too, and the heads that share a key-value head
work on the keys that were loaded once.
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
    load_group,
    log2_scale,
    on_device,
    precision_of,
    product,
    tl,
)
from lapwing_detector.kernels.rows import Rows
from lapwing_detector.kernels.tiles import Tile, block_width

PROGRAMS = 512
"""About four for each multiprocessor: more pieces than that only make more to put together."""


def attend_in_pieces(query: Tensor, key: Tensor, value: Tensor, rows: Rows, tile: Tile) -> tuple[Tensor, Tensor]:
    """As `forward`, of one row.

    Returns:
        output (batch, 1, heads, value width) and log-sum-exp (batch, heads, 1).
    """
    batch, heads, _, width = query.shape
    shared, columns, value_width = key.shape[1], key.shape[2], value.shape[-1]
    blocks = -(-columns // tile.columns)
    each = -(-blocks // max(1, PROGRAMS // (batch * shared)))  # blocks of a piece
    pieces = -(-blocks // each)
    mixed = query.new_empty(batch, heads, pieces, value_width, dtype=torch.float32)
    totals = query.new_empty(batch, heads, pieces, dtype=torch.float32)
    output = value.new_empty(batch, 1, heads, value_width)
    lse = query.new_empty(batch, heads, 1, dtype=torch.float32)
    factor, cap = log2_scale(rows.scaling, rows.softcap)
    with on_device(query):
        _attend_piece[(pieces, shared, batch)](
            *(query, key, value, rows.starts, mixed, totals),
            *(*query.stride()[:2], *key.stride()[:3], *value.stride()[:3]),
            *(columns, each, factor, cap),
            GROUP=heads // shared,
            BLOCK_GROUP=block_width(heads // shared),
            WIDTH=width,
            BLOCK_WIDTH=block_width(width),
            VALUE_WIDTH=value_width,
            BLOCK_VALUE=block_width(value_width),
            COLUMNS=tile.columns,
            PRECISION=precision_of(query),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        _put_together[(heads, batch)](
            *(mixed, totals, rows.sinks, output, lse, pieces),
            BLOCK_PIECES=block_width(pieces),
            WIDTH=value_width,
            BLOCK_WIDTH=block_width(value_width),
            num_warps=4,
        )
    return output, lse


@kernel(do_not_specialize=["columns", "each"])
def _attend_piece(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    starts: tl.tensor,
    mixed_out: tl.tensor,
    totals: tl.tensor,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_column: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_column: tl.tensor,
    columns: tl.tensor,
    each: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    GROUP: constexpr,
    BLOCK_GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    VALUE_WIDTH: constexpr,
    BLOCK_VALUE: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    piece, group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pieces, heads = tl.num_programs(0), tl.num_programs(1) * GROUP
    queries = load_group(query + batch * query_batch, query_head, GROUP, BLOCK_GROUP, WIDTH, BLOCK_WIDTH)
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    end = tl.minimum((piece + 1) * each * COLUMNS, columns)
    left = piece * each * COLUMNS
    start = 0
    if starts is not None:
        start = tl.load(starts + batch)
        left = tl.maximum(left, start // COLUMNS * COLUMNS)  # blocks before the window are not read
    largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    for column in tl.range(left, end, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        keys = load_block(key, key_column, column, columns, COLUMNS, WIDTH, BLOCK_WIDTH, WHOLE=False)
        scores = in_log2(product(queries, tl.trans(keys), PRECISION), factor, cap)
        scores = tl.where(((at >= start) & (at < columns))[None, :], scores, float("-inf"))
        values = load_block(value, value_column, column, columns, COLUMNS, VALUE_WIDTH, BLOCK_VALUE, WHOLE=False)
        grown = tl.maximum(largest, tl.max(scores, 1))
        level = tl.where(grown == float("-inf"), 0.0, grown)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(largest - level)
        mixed = mixed * shrink[:, None] + product(weights.to(values.dtype), values, PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = grown
    slot = tl.arange(0, BLOCK_GROUP)
    head = batch * heads + group * GROUP + slot
    seen = total > 0
    mixed = mixed / tl.where(seen, total, 1.0)[:, None]
    lanes = tl.arange(0, BLOCK_VALUE)
    places = mixed_out + (head * pieces + piece)[:, None] * VALUE_WIDTH + lanes[None, :]
    tl.store(places, mixed, mask=(slot < GROUP)[:, None] & (lanes < VALUE_WIDTH)[None, :])
    level = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(totals + head * pieces + piece, level, mask=slot < GROUP)


@kernel(do_not_specialize=["pieces"])
def _put_together(
    mixed: tl.tensor,
    totals: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    pieces: tl.tensor,
    BLOCK_PIECES: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
) -> None:
    """Mixes the pieces by their shares of the row's sum."""
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    piece, lanes = tl.arange(0, BLOCK_PIECES), tl.arange(0, BLOCK_WIDTH)
    level = tl.load(totals + head * pieces + piece, mask=piece < pieces, other=float("-inf"))  # log2
    sighted = tl.max(level) > float("-inf")
    largest = tl.where(sighted, tl.max(level), 0.0)
    if sinks is not None:
        sink = tl.load(sinks + tl.program_id(0)).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    shares = tl.exp2(level - largest)
    total = tl.sum(shares)
    if sinks is not None:
        total += tl.exp2(sink - largest)
    total = tl.where(sighted, total, 1.0)
    inside = (piece < pieces)[:, None] & (lanes < WIDTH)[None, :]
    mixed = tl.load(mixed + (head * pieces + piece)[:, None] * WIDTH + lanes[None, :], mask=inside, other=0.0)
    whole = tl.sum(mixed * shares[:, None], 0) / total
    tl.store(output + head * WIDTH + lanes, whole.to(output.dtype.element_ty), mask=lanes < WIDTH)
    tl.store(lse + head, tl.where(sighted, (largest + tl.log2(total)) / LOG2_E, float("inf")))
