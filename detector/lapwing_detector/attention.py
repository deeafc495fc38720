"""Attention with, in the same pass, the two sums that are kept of each map: in C where that can be, else in strips.

Knows tensors only: no model, no cache, no generation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from lapwing_detector import native
from lapwing_detector.scratch import Scratch
from lapwing_detector.strips import Strip, strips

WORTH_TURNING = 32
"""Rows from which on keys are laid out as they are read: a CPU multiplies by a matrix that lies the other way a fifth
slower."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    first: int,
    counted: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: Tensor | None = None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of some rows of the map, with the sums of these rows.

    Args:
        query: (batch, heads, rows, width).
        key: (batch, key-value heads, columns, width); each serves heads / key-value heads consecutive heads.
        value: (batch, key-value heads, columns, value width).
        mask: (batch or 1, heads or 1, rows, columns) bool, True where a row sees a column, nowhere later than the
            row itself; None: every row sees all columns up to its own.
        first: column of the first row's own token; row j is column first + j, and the last row is the last column.
        counted: (batch, rows) bool, the rows that take part in `received`; None: all of them.
        scaling: of the scores, before the soft-cap.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sinks: (heads,) learned logits that take part in the denominator and are dropped from the map.
        starts: (batch or 1, rows) with a mask: the first column of each row, if every row that counts sees all
            columns from there up to its own; None: not known. What the others see is then not looked up in the mask,
            and their output is not that of another route.
        scratch: memory to be used again from call to call.

    Returns:
        output (batch, rows, heads, value width) in the dtype of `value`; diagonal (batch, heads, rows) and
        received (batch, heads, columns), float32.
    """
    with _summing_exactly(query.device.type):
        if query.shape[2] == 1:
            return _attend_row(query, key, value, mask, counted, scaling, softcap, sinks)
        plain = softcap is None and sinks is None and (mask is None or starts is not None)
        if plain and native.supports(query, key, value):
            return native.attend(
                query,
                key,
                value,
                starts=starts,
                first=first,
                counted=counted,
                scaling=scaling,
                scratch=scratch or Scratch(),
            )
        layer = _Layer(
            query,
            mask,
            counted,
            scaling,
            softcap,
            sinks,
            torch.promote_types(key.dtype, torch.float32),
            None if torch.is_grad_enabled() else scratch or Scratch(),
        )
        batch, heads, rows, _ = query.shape
        output = value.new_empty(batch, rows, heads, value.shape[-1])
        diagonal = key.new_empty(batch, heads, rows, dtype=torch.float32)
        received = key.new_zeros(batch, heads, key.shape[2], dtype=torch.float32)
        plan = strips(
            batch,
            heads,
            key.shape[1],
            rows,
            first=first,
            starts=None if starts is None else starts.cpu(),
            clean=mask is None,
            cached=query.device.type == "cpu",
        )
        for (sequences, shared), part in groupby(plan, key=lambda strip: (strip.batch, strip.shared)):
            keys, values = layer.keys(key[sequences, shared]), layer.values(value[sequences, shared])
            for strip in part:
                attended, own, added = layer.attend(strip, keys, values)
                output[strip.batch, strip.rows, strip.heads] = attended
                diagonal[strip.batch, strip.heads, strip.rows] = own
                received[strip.batch, strip.heads, strip.columns].add_(added)
        return output, diagonal, received


def _summing_exactly(device: str) -> AbstractContextManager[None]:
    """Without autocast, which would sum in bfloat16; to leave it alone where it is off saves a step of decoding 1 %."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    counted: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the newest token alone, as often as a model writes one: with as few operations as can be."""
    batch, heads, _, width = query.shape
    key, columns = key.to(torch.promote_types(key.dtype, torch.float32)), key.shape[2]
    folded = query.to(key.dtype).reshape(-1, heads // key.shape[1], width)
    products = torch.baddbmm(
        key.new_empty(1, 1, 1), folded, key.flatten(0, 1).transpose(1, 2), beta=0, alpha=_scale(scaling, softcap)
    )
    scores = products.view(batch, heads, columns)
    if softcap is not None:
        scores = scores.tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights = weights * torch.sigmoid(scores.logsumexp(-1) - sinks.to(scores))[..., None]
    spread = weights.to(value.dtype).view(-1, heads // key.shape[1], columns)
    output = torch.bmm(spread, value.flatten(0, 1)).view(batch, 1, heads, value.shape[-1])
    attention = weights.detach() if weights.dtype == torch.float32 else weights.detach().float()
    received = attention if counted is None else attention * counted[:, :, None]
    return output, attention[..., -1:], received


@dataclass(frozen=True)
class _Layer:
    """What one layer attends with, but for keys and values, of which each part comes with its strips; see `attend`."""

    query: Tensor
    mask: Tensor | None
    counted: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    dtype: torch.dtype
    """Of the maps and their sums, at least float32."""

    scratch: Scratch | None
    """None while gradients are recorded, which need every number later."""

    def keys(self, part: Tensor) -> Tensor:
        """Of some heads, to be read again and again; (sequences * key-value heads, width, columns)."""
        if self.scratch is None or self.query.shape[2] < WORTH_TURNING or part.device.type != "cpu":
            return self._exact("keys", part).transpose(1, 2)
        turned = part.transpose(2, 3)
        return self._take("keys", tuple(turned.shape), self.dtype).copy_(turned).flatten(0, 1)

    def values(self, part: Tensor) -> Tensor:
        """Of some heads, to be read again and again; (sequences * key-value heads, columns, value width)."""
        if self.scratch is not None and _multiplies(part.dtype, part.device):
            return part.flatten(0, 1)  # the output is of this dtype, and no sum of the map comes from it
        return self._exact("values", part)

    def _exact(self, name: str, part: Tensor) -> Tensor:
        if self.scratch is None or (part.dtype == self.dtype and part.is_contiguous()):
            return part.to(self.dtype).flatten(0, 1)
        return self._take(name, tuple(part.shape), self.dtype).copy_(part).flatten(0, 1)

    def attend(self, strip: Strip, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output (batch, rows, heads, value width), diagonal (batch, heads, rows), and the column sums of the rows.

        Args:
            strip: which rows of which heads.
            keys: (sequences * key-value heads, width, columns).
            values: (sequences * key-value heads, columns, value width).
        """
        scores = self._scores(self._query(strip), keys[:, :, strip.columns], strip)
        most = None if self.sinks is None else scores.amax(-1)
        # In place where no gradients are recorded: half the memory, which then stays in the cache.
        weights = torch.softmax(scores, -1, out=None if self.scratch is None else scores)
        share = None if most is None else self._share(strip, most, weights)
        output = self._attended(weights, values[:, strip.columns])
        output = output.view(-1, strip.head_count, strip.row_count, output.shape[-1])
        maps = weights.detach().view(-1, strip.head_count, strip.row_count, weights.shape[-1])
        diagonal = maps.diagonal(offset=maps.shape[-1] - strip.row_count, dim1=-2, dim2=-1)
        if share is not None:
            output, share = output * share[..., None], share.detach()
            diagonal = diagonal * share
        return output.transpose(1, 2), diagonal, self._sums(strip, maps, share)

    def _query(self, strip: Strip) -> Tensor:
        part = self.query[strip.batch, strip.heads, strip.rows]
        # The queries that share a key-value head are laid one below the other: keys are never repeated.
        shape = (-1, part.shape[1] // (strip.shared.stop - strip.shared.start) * part.shape[2], part.shape[3])
        if self.scratch is None:
            return part.to(self.dtype).reshape(shape)
        return self._take("query", tuple(part.shape), self.dtype).copy_(part).view(shape)

    def _scores(self, query: Tensor, keys: Tensor, strip: Strip) -> Tensor:
        scores = _product(query, keys, self._out("scores", query, keys, self.dtype), _scale(self.scaling, self.softcap))
        if self.softcap is not None:
            scores = scores.tanh_().mul_(self.softcap) if self.scratch else scores.tanh() * self.softcap
        self._hide(scores.view(-1, strip.head_count, strip.row_count, scores.shape[2]), strip)
        return scores

    def _hide(self, scores: Tensor, strip: Strip) -> None:
        # The lowest finite number and not -inf: a row that sees nothing (padding) must not become NaN, since NaN
        # times an attention of zero would spread to the rows that count.
        if self.mask is not None and strip.low < strip.clean:
            sequences = strip.batch if self.mask.shape[0] > 1 else slice(None)
            heads = strip.heads if self.mask.shape[1] > 1 else slice(None)
            hidden = ~self.mask[sequences, heads, strip.rows, strip.low : strip.clean]
            scores[..., : strip.clean - strip.low].masked_fill_(hidden, torch.finfo(scores.dtype).min)
        if strip.row_count > 1 and strip.clean < strip.stop:
            # Seven times as fast as filling by a mask, and the last strip's triangle is a good part of a short text.
            ceiling = _ceiling(strip.row_count, scores.dtype, scores.device)
            scores[..., strip.own - strip.low :].clamp_(max=ceiling)

    def _share(self, strip: Strip, most: Tensor, weights: Tensor) -> Tensor:
        """Of the columns in the denominator, beside the sinks; (sequences, heads, rows)."""
        # log-sum-exp from where softmax has its maximum: cheaper than to take exp once more
        total = (most - weights.amax(-1).log()).view(-1, strip.head_count, strip.row_count)
        assert self.sinks is not None
        return torch.sigmoid(total - self.sinks[strip.heads].to(total)[:, None])

    def _attended(self, weights: Tensor, values: Tensor) -> Tensor:
        """(sequences * key-value heads, group * rows, value width)."""
        if values.dtype != weights.dtype:
            weights = self._take("rounded", tuple(weights.shape), values.dtype).copy_(weights)
        return _product(weights, values, self._out("attended", weights, values, values.dtype))

    def _sums(self, strip: Strip, maps: Tensor, share: Tensor | None) -> Tensor:
        """Of the columns over the rows that count; (sequences, heads, columns)."""
        sequences, heads, rows, columns = maps.shape
        counts = _ones(sequences, heads, rows, maps.dtype, maps.device) if share is None else share
        if self.counted is not None:
            counts = counts * self.counted[strip.batch, None, strip.rows]
        return torch.bmm(counts.view(-1, 1, rows), maps.view(-1, rows, columns)).view(sequences, heads, columns)

    def _out(self, name: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor | None:
        shape = (left.shape[0], left.shape[1], right.shape[2])
        return None if self.scratch is None else self._take(name, shape, dtype)

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self.scratch is not None
        return self.scratch.take(name, shape, dtype, self.query.device)


@lru_cache(maxsize=64)
def _ceiling(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, rows): the lowest finite number above the diagonal, infinity on it and below."""
    with torch.inference_mode(False):  # or gradients could not flow past it
        later = torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)
        return torch.full((rows, rows), torch.inf, dtype=dtype, device=device).masked_fill_(
            later, torch.finfo(dtype).min
        )


@lru_cache(maxsize=64)
def _ones(sequences: int, heads: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(sequences, heads, rows, dtype=dtype, device=device)


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of this kind are multiplied as they are at full speed, without a copy in float32."""
    return dtype == torch.bfloat16 and device.type == "cpu" and native.multiplies_bfloat16()


def _product(left: Tensor, right: Tensor, out: Tensor | None, factor: float = 1.0) -> Tensor:
    """Factor times (batch, rows, inner) times (batch, inner, columns)."""
    if out is None:
        return torch.bmm(left * factor, right)
    if len(left) > 1:
        return out.baddbmm_(left, right, beta=0, alpha=factor)
    # A batch of one is given to one thread alone; a plain product is shared by all.
    out[0].addmm_(left[0], right[0], beta=0, alpha=factor)
    return out


def _scale(scaling: float, softcap: float | None) -> float:
    return scaling if softcap is None else scaling / softcap
