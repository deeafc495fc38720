"""One forward of the model while it is running: which rows and columns of the map each attention call computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lapwing_detector import kernels, native
from lapwing_detector.errors import CaptureError
from lapwing_detector.layers import AttentionLayer

HARMLESS = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "tokenizer",
        "use_cache",
    }
)
"""Arguments of attention functions that change nothing here: the mask holds the window, the rest is for others."""

MASK_ROWS = 256
"""Rows of a mask that are looked at together: a copy of the whole would be large."""


@dataclass(frozen=True)
class Place:
    """Where the rows of one attention call lie."""

    first: int
    """Column of the first row's own token."""

    columns: int
    """Columns in use: a static cache has more, a sliding one starts behind the first token."""

    tokens: int
    """Length of the sequences with the new rows."""

    mask: Tensor | None
    """(batch or 1, heads or 1, rows, columns) bool; None: every row sees all columns up to its own."""

    starts: Tensor | None
    """(batch or 1, rows) first column that each row sees, where all from there up to its own are seen; or None."""

    counted: Tensor | None
    """(batch, rows) bool; None: every row counts."""


@dataclass(frozen=True)
class Mask:
    """A mask that was checked."""

    mask: Tensor | None
    keys: int
    place: Place
    """Of the rows of every layer that has this mask and as many keys."""


@dataclass
class Forward:
    """An open forward; every layer must report to it exactly once."""

    past: int
    """Tokens before this forward."""

    batch: int | None
    """Sequences, when there were forwards before."""

    ends: Tensor | None
    """(batch,) columns, see Sequences."""

    rows: int | None = None
    reported: set[int] = field(default_factory=set)
    visible: Tensor | None = None
    """(batch, rows) bool: no padding."""

    _seen: list[Mask] = field(default_factory=list)
    """Masks that were checked: the layers share them."""

    _counted: tuple[Tensor | None] | None = None

    @property
    def tokens(self) -> int:
        """Length of the sequences with the tokens of this forward."""
        return self.past + (self.rows or 0)

    @property
    def counted(self) -> Tensor:
        """(batch, rows) bool: no padding, and not behind the end of the sequence."""
        assert self.visible is not None
        if self.ends is None:
            return self.visible
        columns = torch.arange(self.past, self.tokens, device=self.visible.device)
        return self.visible & (columns < self.ends[:, None].to(columns))

    def report(self, layer: AttentionLayer, query: Tensor, key: Tensor, mask: Tensor | None) -> Place:
        """A layer computes attention.

        Raises:
            CaptureError: twice, of another shape than the others, not causal, or with a mask that can't be read.
        """
        if layer.index in self.reported:
            raise CaptureError(f"{layer.name} computed attention twice in one forward; its map has one row per token")
        self.reported.add(layer.index)
        batch, _, rows, _ = query.shape
        self._agree(layer, batch, rows)
        keys = key.shape[2]
        for known in self._seen:
            if known.mask is mask and known.keys == keys:
                return known.place
        place = self._place(layer, mask, batch, rows, keys)
        self._seen.append(Mask(mask, keys, place))
        return place

    def _agree(self, layer: AttentionLayer, batch: int, rows: int) -> None:
        if (self.batch or batch, self.rows or rows) != (batch, rows):
            raise CaptureError(
                f"{layer.name} has {batch} sequences of {rows} new tokens, {self.batch} of {self.rows or rows} were "
                "expected; the batch must stay as it started"
            )
        self.batch, self.rows = batch, rows

    def _place(self, layer: AttentionLayer, mask: Tensor | None, batch: int, rows: int, keys: int) -> Place:
        columns = min(keys, self.tokens)
        first = self.past - (self.tokens - columns)
        if first < 0:
            raise CaptureError(
                f"{layer.name} has {rows} queries, but only {keys} keys; every token must keep its own key: "
                "leave out what shortens or shares the cache, or score the text in one forward with use_cache=False"
            )
        starts = self._checked(layer, mask, batch, rows, keys, first)
        if self._counted is None:
            every = (mask is None and self.ends is None) or bool(self.counted.all())
            self._counted = (None if every else self.counted,)
        # Padding on the right: every row that counts sees all up to its own token, so that no mask is needed.
        if starts is not None and not bool(starts.any()):
            mask = starts = None
        cropped = mask if mask is None or columns == keys else mask[..., :columns]
        return Place(first, columns, self.tokens, cropped, starts, self._counted[0])

    def _checked(
        self, layer: AttentionLayer, mask: Tensor | None, batch: int, rows: int, keys: int, first: int
    ) -> Tensor | None:
        """The first column that each row sees, as `first_seen`; takes note of which tokens are no padding."""
        if mask is None:
            visible, starts = self._all_visible(layer, batch, rows, keys), None
        else:
            _require_readable(layer, mask, rows, keys)
            _require_causal(layer, mask, first)
            own = mask.diagonal(offset=first, dim1=-2, dim2=-1).any(dim=1)  # (batch or 1, rows)
            visible, starts = own.expand(batch, rows), first_seen(mask, own, first)
        if self.visible is None:
            self.visible = visible
        elif self.visible is not visible and not torch.equal(self.visible, visible.to(self.visible.device)):
            raise CaptureError(
                f"{layer.name} has padding in other places than the layers before it; give one attention_mask "
                "in which each token sees itself in every layer or in none"
            )
        return starts

    def _all_visible(self, layer: AttentionLayer, batch: int, rows: int, keys: int) -> Tensor:
        if rows == 1 and keys > self.tokens:  # a static cache has more keys, but a mask that hides them
            raise CaptureError(
                f"{layer.name} has a query that sees {keys} keys, where {self.tokens} tokens are known of: its cache "
                "does not tell how many it holds; score the text in one forward with use_cache=False"
            )
        if rows > 1 and self.past > 0:
            raise CaptureError(
                f"{layer.name} has {rows} queries behind {self.past} tokens and no mask: it is not known which keys "
                "each of them sees"
            )
        device = next(layer.module.parameters()).device
        return torch.ones(batch, rows, dtype=torch.bool, device=device)


def require_plain(
    layer: AttentionLayer, dropout: float, is_causal: bool | None, others: Mapping[str, Any], causal: set[int]
) -> None:
    """The call must be causal attention without anything that is not known here.

    Args:
        causal: indices of the layers whose marks were looked at before; added to. Looking them up in a config takes as
            long as a part of a small layer.

    Raises:
        CaptureError: it is not; names the argument.
    """
    if (is_causal is not None and not is_causal) or (layer.index not in causal and not _may_be_causal(layer.module)):
        raise CaptureError(f"{layer.name} is not causal, so its map is not triangular and has other eigenvalues")
    causal.add(layer.index)
    if dropout:
        raise CaptureError(f"{layer.name} drops out attention ({dropout}); call model.eval() first")
    if others.get("output_attentions"):
        raise CaptureError("output_attentions=True, but the maps do not exist while they are summed up; leave it out")
    if HARMLESS.issuperset(others):  # nearly always, and faster than to look at each
        return
    for name, value in others.items():
        if value is not None and name not in HARMLESS:
            raise CaptureError(
                f"{layer.name} gives its attention {name}={type(value).__name__}, which is not known here and could "
                "change it; leave it out, or use another model family"
            )


def _may_be_causal(module: nn.Module) -> bool:
    marks = [getattr(marked, "is_causal", None) for marked in (module, module.config)]
    return all(mark is None or mark for mark in marks)


def dropping(model: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    """The modules whose training mode would drop something out, by name: the model itself and every dropout in it."""
    return tuple(
        (name or type(module).__name__, module)
        for name, module in model.named_modules()
        if module is model or (isinstance(module, nn.Dropout) and module.p > 0)
    )


def require_evaluation(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """None of the modules that `dropping` found may be in training mode.

    Raises:
        CaptureError: one is; names it.
    """
    for name, module in modules:
        if module.training:
            raise CaptureError(
                f"{name} is in training mode, where dropout draws other numbers every time; call model.eval() first"
            )


def require_unpacked(inputs: Mapping[str, Any]) -> None:
    """Every row of the batch must be one sequence.

    Raises:
        CaptureError: position ids jump without a mask, so several sequences are packed into one row.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or positions.shape[-1] < 2:
        return
    if bool((torch.diff(positions, dim=-1) != 1).any()):
        raise CaptureError(
            "position_ids jump within a row and there is no attention_mask: several sequences packed into one; "
            "give each its own row, with padding"
        )


def _require_readable(layer: AttentionLayer, mask: Tensor, rows: int, keys: int) -> None:
    if mask.dtype != torch.bool:
        raise CaptureError(
            f"{layer.name} has a mask of {str(mask.dtype).removeprefix('torch.')}, whose numbers could be any bias; "
            "give a bool mask, True where a row sees a column"
        )
    if mask.ndim != 4 or tuple(mask.shape[-2:]) != (rows, keys):
        raise CaptureError(
            f"{layer.name} has a mask of shape {tuple(mask.shape)}; (batch, 1, {rows}, {keys}) was expected"
        )


def _require_causal(layer: AttentionLayer, mask: Tensor, first: int) -> None:
    for start in range(0, mask.shape[-2], MASK_ROWS):
        later = mask[..., start : start + MASK_ROWS, :].triu(first + start + 1)
        if bool(later.any()):
            raise CaptureError(
                f"the mask of {layer.name} lets a token see later ones; only causal attention has a triangular map"
            )


def first_seen(mask: Tensor, own: Tensor, first: int) -> Tensor | None:
    """The first column that each row of a causal mask sees, if it sees all from there up to its own.

    Args:
        mask: (batch or 1, heads or 1, rows, columns) bool, already found causal.
        own: (batch or 1, rows) bool, whether the row sees its own column; the others are padding and not looked at.
        first: column of the first row's own token.

    Returns:
        (batch or 1, rows) int32, 0 for padding; None for masks of another kind, and where it is of no use: for one
        row where there are neither kernels nor attention in C, and where heads have masks of their own.
    """
    by_torch = not (kernels.available(mask.device) or (mask.device == native.CPU and native.available()))
    if (mask.shape[-2] == 1 and by_torch) or mask.shape[1] > 1:
        return None
    parts = []
    for start in range(0, mask.shape[-2], MASK_ROWS):
        part, seen = mask[:, 0, start : start + MASK_ROWS].to(torch.int8), own[:, start : start + MASK_ROWS]
        starts = part.argmax(-1)  # of several largest the first
        columns = torch.arange(first + start, first + start + part.shape[1], device=mask.device)
        if bool((seen & (part.sum(-1) != columns - starts + 1)).any()):
            return None
        parts.append(torch.where(seen, starts, 0).int())
    return torch.cat(parts, dim=1)
