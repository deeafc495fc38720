"""What has been summed up of one batch of sequences. Knows tensors and layers, no model and no generation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lapwing_detector.errors import CaptureError
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.summary import AttentionSummary


@dataclass
class LayerSums:
    """Diagonal and column sums of one layer, in buffers that double, so that decoding is not quadratic."""

    diagonal: Tensor
    """(batch, heads, capacity) float32."""

    received: Tensor
    """(batch, heads, capacity) float32."""

    @classmethod
    def empty(cls, like: Tensor) -> LayerSums:
        """No token yet, for the batch, heads and device of this (batch, heads, any) tensor."""
        nothing = torch.zeros(*like.shape[:2], 0, dtype=torch.float32, device=like.device)
        return cls(nothing, nothing.clone())

    def add(self, diagonal: Tensor, received: Tensor, tokens: int) -> None:
        """Add the rows of new tokens.

        Args:
            diagonal: (batch, heads, rows) of the new tokens.
            received: (batch, heads, columns) of their rows; the last column is the last new token.
            tokens: sequence length with the new tokens.
        """
        self._reserve(tokens)
        self.diagonal[..., tokens - diagonal.shape[-1] : tokens] = diagonal
        self.received[..., tokens - received.shape[-1] : tokens] += received

    def _reserve(self, tokens: int) -> None:
        capacity = self.diagonal.shape[-1]
        if tokens > capacity:
            # A prompt gets what it needs, decoding doubles.
            more = (tokens if capacity == 0 else max(tokens, 2 * capacity)) - capacity
            self.diagonal = torch.nn.functional.pad(self.diagonal, (0, more))
            self.received = torch.nn.functional.pad(self.received, (0, more))


@dataclass
class Sequences:
    """The newest batch that the model works on."""

    layers: tuple[AttentionLayer, ...]
    tokens: int = 0
    """Length so far, padding and finished rows included; the same for every sequence of the batch."""

    reach: int = 0
    """Highest position so far, plus 1: less than `tokens` with padding on the left."""

    ends: Tensor | None = None
    """(batch,) column from which on what is fed is no longer of the sequence; None: none has ended."""

    visible: list[Tensor] = field(default_factory=list)
    """(batch, rows) bool, one for each forward: the token is no padding."""

    counted: list[Tensor] = field(default_factory=list)
    """(batch, rows) bool, one for each forward: the row counts, being no padding and not of a finished sequence."""

    sums: dict[int, LayerSums] = field(default_factory=dict)
    """By layer index."""

    @property
    def any_ended(self) -> bool:
        """Whether some sequence was fed what is no longer of it."""
        return self.ends is not None and bool((self.ends < self.tokens).any())

    @property
    def batch(self) -> int | None:
        """Sequences; None before the first forward."""
        return int(self.counted[0].shape[0]) if self.counted else None

    def summaries(self) -> list[AttentionSummary]:
        """One for each sequence, of its counted tokens only.

        Raises:
            CaptureError: nothing was captured, or the layers differ in their number of heads.
        """
        if not self.counted:
            raise CaptureError(
                "nothing was captured; run the model inside the context: with capture_attention(model) as captured: ..."
            )
        heads = {layer.index: self.sums[layer.index].diagonal.shape[1] for layer in self.layers}
        if len(set(heads.values())) > 1:
            raise CaptureError(
                f"layers differ in their number of heads, so no (layers, heads) array holds them: {heads}; "
                "use a model with the same number in every layer"
            )
        return [self._summary(row, counted) for row, counted in enumerate(torch.cat(self.counted, dim=1).cpu())]

    def _summary(self, row: int, counted: Tensor) -> AttentionSummary:
        def gather(name: str) -> Tensor:
            parts = [getattr(self.sums[layer.index], name)[row, :, : self.tokens].cpu() for layer in self.layers]
            return torch.stack(parts)[..., counted]  # (layers, heads, tokens)

        return AttentionSummary(
            diagonal=gather("diagonal").numpy(),
            received=gather("received").numpy(),
            layers=tuple(layer.index for layer in self.layers),
        )
