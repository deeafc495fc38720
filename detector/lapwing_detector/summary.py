"""What is kept of the attention of one sequence: two numbers per layer, head and token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AttentionSummary:
    """Diagonal and column sums of every attention map of one sequence.

    A causal attention map A is lower triangular, so the eigenvalues of its Laplacian L = D - A are the
    diagonal of L, and these two arrays are all that any feature needs.
    """

    diagonal: NDArray[np.float32]
    """(layers, heads, tokens) in [0, 1]: attention of each token to itself, a_ii."""

    received: NDArray[np.float32]
    """(layers, heads, tokens): sum over rows u >= i of a_ui, the self term included; at most tokens - i."""

    layers: tuple[int, ...]
    """Index in the model of each row of the arrays; layers without attention are absent."""

    def __post_init__(self) -> None:
        if self.diagonal.ndim != 3 or self.diagonal.shape != self.received.shape:
            raise ValueError(
                f"diagonal {self.diagonal.shape} and received {self.received.shape}: both are (layers, heads, tokens)"
            )
        if len(self.layers) != self.diagonal.shape[0]:
            raise ValueError(f"{len(self.layers)} layer indices for {self.diagonal.shape[0]} layers")

    @property
    def token_count(self) -> int:
        """Tokens of the sequence, T."""
        return int(self.diagonal.shape[2])
