"""Attention with its sums, put together from the kernels. Importing this module imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from lapwing_detector.errors import CaptureError
from lapwing_detector.kernels import fused
from lapwing_detector.kernels.columns import sum_columns
from lapwing_detector.kernels.forward import forward
from lapwing_detector.kernels.pieces import attend_in_pieces
from lapwing_detector.kernels.row_sums import add_row
from lapwing_detector.kernels.rows import Rows
from lapwing_detector.kernels.tiles import tiles_for


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, heads: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `lapwing_detector.kernels.attend`."""
    batch, all_heads, count, _ = query.shape
    if count == 1:
        read = all_heads if heads is None else len(heads)
        diagonal = query.new_empty(batch, read, 1, dtype=torch.float32)
        received = query.new_zeros(batch, read, key.shape[2], dtype=torch.float32)
        return attend_one_row(query, key, value, rows, heads, diagonal, received), diagonal, received
    query, key, value, rows, heads = _as_read(query, key, value, rows, heads)
    tiles = tiles_for(query)
    # Only where rows and columns are the same does every kernel of torch mean the same by "causal".
    plain = rows.plain and rows.first == 0
    operator = fused.choose(query, key, value, causal=True, scaling=rows.scaling) if plain else None
    if operator is not None:
        output, lse = operator(query, key, value, True, rows.scaling)
        output = output.transpose(1, 2)
    else:
        output, lse = forward(query, key, value, rows, tiles.forward)
    diagonal, received = sum_columns(query, key, lse, rows, heads, tiles.sums)
    return output, diagonal, received


def attend_one_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    heads: Tensor | None,
    diagonal: Tensor,
    received: Tensor,
) -> Tensor:
    """See `lapwing_detector.kernels.attend_row`."""
    query, key, value, rows, heads = _as_read(query, key, value, rows, heads)
    tile = tiles_for(query).row
    operator = fused.choose(query, key, value, causal=False, scaling=rows.scaling) if rows.plain else None
    if operator is not None:
        output, lse = operator(query, key, value, False, rows.scaling)
        output = output.transpose(1, 2)
    else:
        output, lse = attend_in_pieces(query, key, value, rows, tile)
    add_row(query, key, lse, rows, heads, diagonal, received, tile)
    return output


def _as_read(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, heads: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Rows, Tensor | None]:
    """The arguments as kernels read them; nothing is copied that a model makes in the usual way."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise CaptureError("the kernels have no gradients; run the model under torch.no_grad(), or without kernels")
    if rows.first + query.shape[2] != key.shape[2]:
        raise CaptureError(
            f"{query.shape[2]} rows from column {rows.first} on end at {rows.first + query.shape[2]}, but there are "
            f"{key.shape[2]} keys; give the keys up to the last row's own"
        )
    query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
    if heads is not None:
        heads = heads.to(torch.int32).contiguous()
    return query, key, value, rows.packed(query.shape[0], query.shape[2]), heads
