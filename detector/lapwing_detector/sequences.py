"""What has been summed up of one batch of sequences. Knows tensors and layers, no model and no generation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lapwing_detector.errors import CaptureError
from lapwing_detector.flags import Flags
from lapwing_detector.layers import AttentionLayer, require_heads
from lapwing_detector.summary import AttentionSummary

LEAST_ROOM, MOST_ROOM = 64, 1024
"""Tokens for which room is made at a time."""

PIECE_BYTES = 16 * 2**20
"""Most of the diagonals, or of the column sums, that lie side by side, unless those of one layer are more: while room
is made they are there twice."""


@dataclass
class Sums:
    """Diagonal and column sums of some heads, with room for more tokens."""

    diagonal: Tensor
    """(batch, heads, capacity) float32."""

    received: Tensor
    """(batch, heads, capacity) float32."""

    @property
    def capacity(self) -> int:
        """Tokens for which there is room in both, of which one may have been moved before memory ran out."""
        return min(self.diagonal.shape[2], self.received.shape[2])

    def add(self, diagonal: Tensor, received: Tensor, tokens: int) -> None:
        """Add the rows of new tokens.

        Args:
            diagonal: (batch, heads, rows) of the new tokens.
            received: (batch, heads, columns) of their rows; the last column is the last new token.
            tokens: sequence length with the new tokens.
        """
        self.diagonal[:, :, tokens - diagonal.shape[2] : tokens] = diagonal
        self.received[:, :, tokens - received.shape[2] : tokens].add_(received)  # `+=` would copy them as well


@dataclass
class Sequences:
    """The newest batch that the model works on."""

    layers: tuple[AttentionLayer, ...]
    """Those that are captured."""

    kept: Mapping[int, Collection[int]] | None = None
    """Layer index -> heads that are kept; None: all of them."""

    tokens: int = 0
    """Length so far, padding and finished rows included; the same for every sequence of the batch."""

    reach: int = 0
    """Highest position so far, plus 1: less than `tokens` with padding on the left."""

    ends: Tensor | None = None
    """(batch,) column from which on what is fed is no longer of the sequence; None: none has ended."""

    visible: Flags = field(default_factory=Flags)
    """(batch, tokens): the token is no padding."""

    counted: Flags = field(default_factory=Flags)
    """(batch, tokens): the row counts, being no padding and not of a finished sequence."""

    heads: dict[int, int] = field(default_factory=dict)
    """By layer index: how many heads it has, kept or not."""

    sums: dict[int, Sums] = field(default_factory=dict)
    """By layer index, of the kept heads; views of those in `joint` once there are any."""

    _selections: dict[int, Tensor | None] = field(default_factory=dict)
    """By layer index, as far as they were asked for; see `_selection`."""

    summed: set[int] = field(default_factory=set)
    """Of a forward that is not over, or failed: indices of the layers whose sums have its rows. They stay, and are not
    added again when the same tokens are fed anew."""

    joint: list[Sums] = field(default_factory=list)
    """The sums of layers on one device side by side, in the order of the layers; empty during the first forward, and
    where there was no memory to move them all."""

    moves: int = 0
    """How often they were moved: then others may lie side by side."""

    @property
    def any_ended(self) -> bool:
        """Whether some sequence was fed what is no longer of it."""
        return self.ends is not None and bool((self.ends < self.tokens).any())

    @property
    def batch(self) -> int | None:
        """Sequences; None before the first forward."""
        return len(self.counted.all) if self.counted.tokens else None

    def keeps(self, layer: AttentionLayer) -> bool:
        """Whether the rows of this layer are summed up."""
        return self.kept is None or layer.index in self.kept

    def kept_of(self, layer: AttentionLayer, heads: int) -> list[int] | None:
        """Those of the layer's heads that are kept; None for all of them.

        Raises:
            InvalidInput: one that it does not have.
        """
        if self.kept is None:
            return None
        kept = list(self.kept.get(layer.index, ()))
        require_heads(layer, kept, heads)
        return kept

    def add(self, layer: AttentionLayer, diagonal: Tensor, received: Tensor, tokens: int) -> None:
        """Add the rows of new tokens in one layer, of the heads that are kept.

        Args:
            layer: any layer; one that is not kept is passed over.
            diagonal: (batch, heads, rows) of the new tokens.
            received: (batch, heads, columns) of their rows; the last column is the last new token.
            tokens: sequence length with the new tokens.
        """
        if not self.keeps(layer):
            return
        heads = diagonal.shape[1]
        selection = self._selection(layer, heads, diagonal.device)
        if selection is not None:
            diagonal, received = diagonal.index_select(1, selection), received.index_select(1, selection)
        self.add_kept(layer, heads, diagonal, received, tokens)

    def _selection(self, layer: AttentionLayer, heads: int, device: torch.device) -> Tensor | None:
        """(kept heads,) those of the layer; None for all of them. Made once: every token asks for it."""
        if self.kept is not None and layer.index not in self._selections:
            kept = self.kept_of(layer, heads)
            every = kept == list(range(heads))
            with torch.inference_mode(False):  # or it could not be used outside of it
                self._selections[layer.index] = None if every else torch.tensor(kept, dtype=torch.long, device=device)
        return self._selections.get(layer.index)

    def add_kept(self, layer: AttentionLayer, heads: int, diagonal: Tensor, received: Tensor, tokens: int) -> None:
        """The same with (batch, kept heads, ...) of a layer that has so many heads in all."""
        self.heads[layer.index] = heads
        known = self.room(layer, tokens)
        if known is None:
            self.sums[layer.index] = Sums(diagonal, received)
        elif layer.index not in self.summed:
            known.add(diagonal, received, tokens)
        self.summed.add(layer.index)

    def open_row(self, layer: AttentionLayer, tokens: int) -> Sums | None:
        """The sums of a layer that is kept, for whoever adds the row of one new token to them without `add`.

        When that is done, the layer is to be put into `summed`.

        Args:
            layer: whose row it is.
            tokens: sequence length with the new token.

        Returns:
            None before the layer's first rows, and where they have this one already: then it is for `add`, which keeps
            the former and passes over the latter.
        """
        return None if layer.index in self.summed else self.room(layer, tokens)

    def close(self) -> None:
        """The forward is over."""
        self.summed.clear()

    def room(self, layer: AttentionLayer, tokens: int) -> Sums | None:
        """The sums of a layer so far, with room for so many tokens; None before its first rows."""
        known = self.sums.get(layer.index)
        if known is not None and tokens > known.capacity:
            self.join(max(tokens, with_room(known.capacity)))
        return known

    def join(self, capacity: int) -> None:
        """Move the sums of all layers into few pieces of memory, with room for so many tokens, one after the other.

        Where that fails for want of memory, nothing is lost, and it can be tried again.
        """
        capacity = max(capacity, *(max(one.diagonal.shape[2], one.received.shape[2]) for one in self.sums.values()))
        self.joint = []
        self.moves += 1
        self.joint = [_moved([self.sums[index] for index in piece], capacity) for piece in self._pieces(capacity)]

    def _pieces(self, capacity: int) -> list[list[int]]:
        """Layers whose sums are to lie side by side, by index."""
        pieces: list[list[int]] = []
        before: torch.device | None = None
        size = 0
        for layer in self.layers:
            shape, device = self.sums[layer.index].diagonal.shape, self.sums[layer.index].diagonal.device
            each = 4 * shape[0] * shape[1] * capacity
            if device != before or size + each > PIECE_BYTES:
                pieces.append([])
                size = 0
            pieces[-1].append(layer.index)
            before, size = device, size + each
        return pieces

    def summaries(self) -> list[AttentionSummary]:
        """One for each sequence, of its counted tokens only.

        Raises:
            CaptureError: nothing was captured, or the layers differ in their number of heads.
        """
        return self._summaries(slice(None))

    def summary(self, sequence: int) -> AttentionSummary:
        """That of one sequence by its place in the batch; raises like `summaries`."""
        [one] = self._summaries(slice(sequence, sequence + 1))
        return one

    def _require_one_shape(self) -> None:
        if not self.counted.tokens:
            raise CaptureError(
                "nothing was captured; run the model inside the context: with capture_attention(model) as captured: ..."
            )
        if len(set(self.heads.values())) > 1:
            raise CaptureError(
                f"layers differ in their number of heads, so no (layers, heads) array holds them: {self.heads}; "
                "use a model with the same number in every layer"
            )

    def _summaries(self, rows: slice) -> list[AttentionSummary]:
        self._require_one_shape()
        sums = [self.sums[layer.index] for layer in self.layers]
        diagonal = _arrays([one.diagonal[rows, :, : self.tokens] for one in sums])
        received = _arrays([one.received[rows, :, : self.tokens] for one in sums])
        layers = tuple(layer.index for layer in self.layers)
        return [
            AttentionSummary(self._gathered(diagonal, row, columns), self._gathered(received, row, columns), layers)
            for row, columns in enumerate(map(_places, self.counted.all[rows].cpu().numpy()))
        ]

    def _gathered(
        self, parts: Sequence[NDArray[np.float32]], row: int, columns: NDArray[np.intp] | slice
    ) -> NDArray[np.float32]:
        """(layers, heads, counted tokens) of one sequence; NaN, never zero, for a head that was not looked at."""
        heads = next(iter(self.heads.values()))
        gathered = np.full((len(parts), heads, parts[0][row][:1, columns].shape[1]), np.nan, np.float32)
        for place, (layer, part) in enumerate(zip(self.layers, parts, strict=True)):
            kept = slice(None) if self.kept is None else list(self.kept[layer.index])
            gathered[place, kept] = part[row][:, columns]
        return gathered


@dataclass(frozen=True)
class Part:
    """Some sequences of a batch."""

    of: Sequences
    rows: list[int]
    first: int
    """Column before which they have padding only."""


def gathered(parts: list[Part]) -> Sequences:
    """Sequences of several batches of one capture as one batch, in which all end in the last column.

    Args:
        parts: of batches in which all sequences end in the last column, too: padding is on the left only.
    """
    one, tokens = parts[0].of, max(part.of.tokens - part.first for part in parts)
    if any(part.of.summed != one.summed for part in parts):
        raise CaptureError("some of the sequences are amid a forward that failed; let these go on by themselves first")
    new = Sequences(one.layers, one.kept, tokens, max(part.of.reach for part in parts), heads=dict(one.heads))
    new.summed = set(one.summed)
    more = min(len(one.summed), 1)  # the token of the forward that failed
    rows = sum(len(part.rows) for part in parts)
    for index, old in one.sums.items():
        new.sums[index] = Sums(*(whole.new_zeros(rows, whole.shape[1], 0) for whole in (old.diagonal, old.received)))
    new.join(with_room(tokens))
    for index, joint in new.sums.items():
        start = 0
        for part in parts:
            mine, theirs = slice(start, start + len(part.rows)), part.of.sums[index]
            columns, until = slice(tokens - (part.of.tokens - part.first), tokens + more), part.of.tokens + more
            joint.diagonal[mine, :, columns] = theirs.diagonal[part.rows, :, part.first : until]
            joint.received[mine, :, columns] = theirs.received[part.rows, :, part.first : until]
            start = mine.stop
    for name in ("visible", "counted"):
        flags = [getattr(part.of, name).all[part.rows, part.first :] for part in parts]
        getattr(new, name).add(torch.cat([F.pad(one, (tokens - one.shape[1], 0)) for one in flags]))
    return new


def with_room(tokens: int) -> int:
    """Of sums of so many tokens the capacity with which they can grow.

    More than one token at a time, or decoding would be quadratic; not many, since they may never come.
    """
    return tokens + min(max(tokens, LEAST_ROOM), MOST_ROOM)


def _moved(sums: list[Sums], capacity: int) -> Sums:
    """The memory into which they were moved, side by side, and of which they are views now."""
    return Sums(_beside(sums, "diagonal", capacity), _beside(sums, "received", capacity))


def _beside(sums: list[Sums], name: str, capacity: int) -> Tensor:
    parts = [getattr(one, name) for one in sums]
    sizes, (rows, _, _) = [part.shape[1] for part in parts], parts[0].shape
    with torch.inference_mode(False):  # later steps may add to them outside of it
        whole = torch.zeros(rows, sum(sizes), capacity, dtype=torch.float32, device=parts[0].device)
    for one, old, new in zip(sums, parts, torch.split(whole, sizes, 1), strict=True):
        new[:, :, : old.shape[2]] = old
        setattr(one, name, new)
    return whole


def _arrays(parts: list[Tensor]) -> list[NDArray[np.float32]]:
    """The parts (sequences, heads, tokens) with one transfer for all of them where they are on one other device."""
    devices = {part.device for part in parts}
    if len(devices) > 1 or devices == {torch.device("cpu")}:
        return [part.cpu().numpy() for part in parts]
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    return np.split(torch.cat(parts, 1).cpu().numpy(), ends, axis=1)


def _places(flags: NDArray[np.bool_]) -> NDArray[np.intp] | slice:
    """Where the flags are set: a slice where they are in one piece, as with padding on one side."""
    places = np.flatnonzero(flags)
    first, count = (int(places[0]), len(places)) if len(places) else (0, 0)
    return slice(first, first + count) if flags[first : first + count].all() else places
