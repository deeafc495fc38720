"""Column sums of one row: the step of a token that is being written. Every program has some of the columns, and the
heads that share a key-value head work on the keys that were loaded once.
"""

# ruff: noqa: N803 -- arguments in capitals are known when a kernel is compiled, and each value makes another kernel

from __future__ import annotations

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


def add_row(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    rows: Rows,
    heads: Tensor | None,
    diagonal: Tensor,
    received: Tensor,
    tile: Tile,
) -> None:
    """Add one row of each map to its column sums, in place.

    Args:
        lse: (batch, heads, 1) float32 log-sum-exp of the row.
        heads: (heads read,) int32; None: all.
        diagonal: (batch, heads read, 1) float32, written.
        received: (batch, heads read, columns) float32, added to.
    """
    batch, all_heads, _, width = query.shape
    shared, columns = key.shape[1], key.shape[2]
    factor, cap = log2_scale(rows.scaling, rows.softcap)
    with on_device(query):
        _add_row[(-(-columns // tile.columns), shared, batch)](
            *(query, key, lse.contiguous(), rows.counted, rows.starts, heads, diagonal, received),
            *(*query.stride()[:2], *key.stride()[:3], *diagonal.stride()[:2], *received.stride()[:2]),
            *(columns, factor, cap),
            READ=0 if heads is None else len(heads),
            BLOCK_READ=1 if heads is None else block_width(len(heads)),
            GROUP=all_heads // shared,
            BLOCK_GROUP=block_width(all_heads // shared),
            WIDTH=width,
            BLOCK_WIDTH=block_width(width),
            COLUMNS=tile.columns,
            PRECISION=precision_of(query),
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )


# Places within larger buffers, as aligned as chance has it: not worth a kernel of their own each.
PLACES = ["diagonal", "received", "diagonal_batch", "diagonal_head", "received_batch", "received_head"]


@kernel(do_not_specialize=["columns", *PLACES])
def _add_row(
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
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_column: tl.tensor,
    diagonal_batch: tl.tensor,
    diagonal_head: tl.tensor,
    received_batch: tl.tensor,
    received_head: tl.tensor,
    columns: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    READ: constexpr,
    BLOCK_READ: constexpr,
    GROUP: constexpr,
    BLOCK_GROUP: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    left, group, batch = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.arange(0, BLOCK_GROUP)
    head = group * GROUP + slot
    place = tl.where(slot < GROUP, head, -1)  # row of the results, -1 for none
    if read is not None:
        listed = tl.arange(0, BLOCK_READ)
        which = tl.load(read + listed, mask=listed < READ, other=-1)
        found = tl.max(tl.where(which[None, :] == head[:, None], listed[None, :], -1), 1)
        place = tl.where(slot < GROUP, found, -1)
    start = 0
    if starts is not None:
        start = tl.load(starts + batch)
    last = left + COLUMNS >= columns  # this program has the row's own column
    # A block before the window, or of heads that nobody reads, costs nothing.
    if (tl.max(place) >= 0) & ((start < left + COLUMNS) | last):
        queries = load_group(query + batch * query_batch, query_head, GROUP, BLOCK_GROUP, WIDTH, BLOCK_WIDTH)
        key += batch * key_batch + group.to(tl.int64) * key_head
        keys = load_block(key, key_column, left, columns, COLUMNS, WIDTH, BLOCK_WIDTH, WHOLE=False)
        total = tl.load(lse + batch * tl.num_programs(1) * GROUP + head, mask=slot < GROUP, other=float("inf"))
        scores = in_log2(product(queries, tl.trans(keys), PRECISION), factor, cap)
        at = left + tl.arange(0, COLUMNS)
        sees = ((at >= start) & (at < columns))[None, :]
        weights = tl.where(sees, tl.exp2(scores - (total * LOG2_E)[:, None]), 0.0)
        if last:
            itself = tl.sum(tl.where((at == columns - 1)[None, :], weights, 0.0), 1)
            tl.store(diagonal + batch * diagonal_batch + place * diagonal_head, itself, mask=place >= 0)
        counts = True
        if counted is not None:
            counts = tl.load(counted + batch) != 0
        if counts:
            places = received + batch * received_batch + place.to(tl.int64)[:, None] * received_head + at[None, :]
            inside = (place >= 0)[:, None] & (at < columns)[None, :]
            tl.store(places, tl.load(places, mask=inside, other=0.0) + weights, mask=inside)
