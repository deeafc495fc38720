"""Features of one sequence. Knows arrays only: no model, no tokenizer, no probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.errors import TooShort
from lapwing_detector.summary import AttentionSummary

Array = NDArray[np.float32]

LOG_FLOOR = 1e-12
"""Self-attention below this counts as this, so that a masked-out diagonal has a finite logarithm."""


def attention_scores(summary: AttentionSummary) -> Array:
    """Mean log self-attention of each head (AttnScore): per head, not summed over heads, not negated.

    Args:
        summary: attention of one sequence.

    Returns:
        (layers, heads), in [log 1e-12, 0].

    Raises:
        TooShort: the sequence is empty.

    References:
        Sriramanan et al., LLM-Check, NeurIPS 2024; kept per head as in Binkowski et al., EMNLP 2025.
    """
    if summary.token_count < 1:
        raise TooShort(summary.token_count, 1)
    return np.asarray(log_diagonal(summary).mean(axis=-1, dtype=np.float64), dtype=np.float32)


def attention_eigenvalues(summary: AttentionSummary, k: int) -> Array:
    """The k largest eigenvalues of each head's attention map: its largest diagonal entries.

    Args:
        summary: attention of one sequence.
        k: how many; at most `summary.token_count`.

    Returns:
        (layers, heads, k) in [0, 1], descending.

    Raises:
        TooShort: the sequence has fewer than k tokens.

    References:
        Binkowski et al., EMNLP 2025 (AttnEigvals).
    """
    return largest(summary.diagonal, k)


def laplacian_eigenvalues(summary: AttentionSummary, k: int) -> Array:
    """The k largest eigenvalues of each head's attention Laplacian.

    Args:
        summary: attention of one sequence.
        k: how many; at most `summary.token_count`.

    Returns:
        (layers, heads, k) in [-1, 1], descending.

    Raises:
        TooShort: the sequence has fewer than k tokens.

    References:
        Binkowski et al., EMNLP 2025, Eq. 1-3 (LapEigvals).
    """
    return largest(laplacian_diagonal(summary), k)


def sink_scores(summary: AttentionSummary, k: int) -> Array:
    """The k largest mean attentions that a token of each head receives from the rows that can see it.

    Args:
        summary: attention of one sequence.
        k: how many; at most `summary.token_count`.

    Returns:
        (layers, heads, k) in [0, 1], descending.

    Raises:
        TooShort: the sequence has fewer than k tokens.

    References:
        Binkowski et al., SinkProbe, ICML 2026.
    """
    return largest(mean_received(summary), k)


def log_diagonal(summary: AttentionSummary) -> Array:
    """log a_ii with the floor; (layers, heads, tokens)."""
    return np.log(np.maximum(summary.diagonal, np.float32(LOG_FLOOR)))


def mean_received(summary: AttentionSummary) -> Array:
    """s_i = r_i / (T - i): the out-degree of token i in the attention graph; (layers, heads, tokens)."""
    rows_that_see = np.arange(summary.token_count, 0, -1, dtype=np.float32)  # (tokens,): T - i
    return summary.received / rows_that_see


def laplacian_diagonal(summary: AttentionSummary) -> Array:
    """lambda_i = s_i - a_ii: every eigenvalue of L = D - A, in token order; (layers, heads, tokens)."""
    return mean_received(summary) - summary.diagonal


def largest(values: Array, k: int) -> Array:
    """The k largest entries along the last axis, descending.

    Raises:
        TooShort: there are fewer than k.
        ValueError: k is not positive.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    tokens = values.shape[-1]
    if tokens < k:
        raise TooShort(tokens, k)
    top = np.partition(values, tokens - k, axis=-1)[..., tokens - k :]
    return np.ascontiguousarray(np.sort(top, axis=-1)[..., ::-1], dtype=np.float32)


@dataclass(frozen=True)
class Feature:
    """One feature by its versioned id, as it is written into every artifact."""

    id: str
    title: str
    """How people call it, for the headings of pictures."""

    token_values: Callable[[AttentionSummary], Array]
    """The number of each token from which the feature is made; (layers, heads, tokens)."""

    ranked: bool
    """True: the k largest token values, descending. False: their mean, one number."""

    def width(self, k: int) -> int:
        """Numbers per head."""
        return k if self.ranked else 1

    def needed(self, k: int) -> int:
        """Least number of tokens of a sequence that has this feature."""
        return self.width(k)

    def compute(self, summary: AttentionSummary, k: int) -> Array:
        """(layers, heads, width(k)).

        Raises:
            TooShort: the sequence has fewer than `needed(k)` tokens.
        """
        if self.ranked:
            return largest(self.token_values(summary), k)
        return attention_scores(summary)[..., None]


FEATURES: dict[str, Feature] = {
    feature.id: feature
    for feature in (
        Feature("attention_score.v1", "AttnScore", log_diagonal, ranked=False),
        Feature("attention_eigenvalues.v1", "Attention eigenvalues", lambda summary: summary.diagonal, ranked=True),
        Feature("laplacian_eigenvalues.v1", "Laplacian eigenvalues", laplacian_diagonal, ranked=True),
        Feature("sink_scores.v1", "Sink scores", mean_received, ranked=True),
    )
}
