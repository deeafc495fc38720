"""Attention, block by block of query rows: its output and, in the same pass, the two sums that are kept of each map.

Knows tensors only: no model, no cache, no generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Largest size of the scores of one block of rows, in bytes; the T x T map never exists."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    first: int,
    counted: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of some rows of the map, with the sums of these rows.

    Args:
        query: (batch, heads, rows, width).
        key: (batch, key-value heads, columns, width); each serves heads / key-value heads consecutive heads.
        value: (batch, key-value heads, columns, value width).
        mask: (batch or 1, heads or 1, rows, columns) bool, True where a row sees a column, nowhere later than the
            row itself; None: every row sees all columns up to its own.
        first: column of the first row's own token; row j is column first + j, and the last row is the last column.
        counted: (batch, rows) bool, the rows that take part in `received`.
        scaling: of the scores, before the soft-cap.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sinks: (heads,) learned logits that take part in the denominator and are dropped from the map.

    Returns:
        output (batch, rows, heads, value width) in the dtype of `value`; diagonal (batch, heads, rows) and
        received (batch, heads, columns), float32.
    """
    batch, heads, rows, _ = query.shape
    key = key.to(_at_least_float32(key))
    blocks = _blocks(rows, bytes_per_row=4 * batch * heads * key.shape[2])
    if len(blocks) > 1:  # or every product would make its own copy of them
        key, value = key.contiguous(), value.contiguous()
    output = value.new_empty(batch, rows, heads, value.shape[-1])
    diagonal = key.new_empty(batch, heads, rows, dtype=torch.float32)
    received = key.new_zeros(batch, heads, key.shape[2], dtype=torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # which would sum in bfloat16
        # From the widest block to the narrowest: each fits where the last one was, and the heap does not creep up.
        for start, stop in reversed(blocks):
            columns = first + stop  # no row of this block sees further
            scores = _scores(query[:, :, start:stop], key[:, :, :columns], scaling, softcap)
            scores = _hide(scores, None if mask is None else mask[..., start:stop, :columns], first + start)
            weights = _softmax(scores, sinks)  # (batch, heads, block, columns)
            del scores  # two blocks of this size at a time, not three
            output[:, start:stop] = _weighted(weights, value[:, :, :columns]).transpose(1, 2)
            attention = weights.detach().float()
            diagonal[..., start:stop] = attention.diagonal(offset=first + start, dim1=-2, dim2=-1)
            counts = counted[:, None, None, start:stop].to(attention)  # (batch, 1, 1, block)
            received[..., :columns] += (counts @ attention).squeeze(-2)
    return output, diagonal, received


def _blocks(rows: int, bytes_per_row: int) -> list[tuple[int, int]]:
    block = max(1, BLOCK_BYTES // max(1, bytes_per_row))
    return [(start, min(start + block, rows)) for start in range(0, rows, block)]


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """(batch, heads, rows, columns), at least float32."""
    batch, heads, rows, width = query.shape
    shared = key.shape[1]
    query = query.to(key.dtype) * (scaling if softcap is None else scaling / softcap)
    # The queries that share a key-value head are laid one below the other: keys are never repeated.
    query = query.reshape(batch, shared, heads // shared * rows, width)
    scores = query @ key.transpose(-1, -2)  # (batch, key-value heads, heads / key-value heads * rows, columns)
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    return scores.view(batch, heads, rows, -1)


def _hide(scores: Tensor, mask: Tensor | None, first: int) -> Tensor:
    # The lowest finite number and not -inf: a row that sees nothing (padding) must not become NaN, since NaN
    # times an attention of zero would spread to the rows that count.
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        return scores.masked_fill_(~mask, lowest)
    rows = scores.shape[-2]
    if rows > 1:
        later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., first:].masked_fill_(later, lowest)
    return scores


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    weights = scores.softmax(dim=-1)
    if sinks is None:
        return weights
    # Share of the columns in a denominator that holds the sink as well.
    share = torch.sigmoid(scores.logsumexp(dim=-1) - sinks.to(scores)[:, None])  # (batch, heads, rows)
    return weights * share[..., None]


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """(batch, heads, rows, value width)."""
    batch, heads, rows, columns = weights.shape
    shared = value.shape[1]
    folded = weights.to(value.dtype).view(batch, shared, heads // shared * rows, columns)
    return (folded @ value).view(batch, heads, rows, -1)
