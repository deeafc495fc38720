"""The features of one sequence that grows, in torch on the device of its sums. Knows no probe and no capture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lapwing_detector.features import LOG_FLOOR
from lapwing_detector.scratch import Scratch

CHUNK = 64
"""Tokens whose largest value is looked at first; of 32, 64 and 128 the fastest for the 10 largest of 4,096."""


class Workspace:
    """What the features of all sequences share, of heads whose sums lie side by side.

    It is memory for the numbers that change with every token.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.precise = torch.float32 if device.type == "mps" else torch.float64  # of long sums; MPS has no float64
        self._scratch = Scratch()
        self._ramp = torch.empty(0, device=device)

    def reciprocals(self, tokens: int) -> Tensor:
        """(tokens,): 1 / (T - i), the last one 1."""
        if len(self._ramp) < tokens:
            self._ramp = torch.arange(2 * tokens, 0, -1, dtype=torch.float32, device=self.device).reciprocal()
        return self._ramp[len(self._ramp) - tokens :]

    def chunks(self, heads: int, tokens: int) -> Tensor:
        """(heads, chunks, CHUNK) float32 with room for one number per token; what is left over is -infinity."""
        shape = (heads, -(-tokens // CHUNK), CHUNK)
        chunks = self._scratch.take("chunks", shape, torch.float32, self.device)
        chunks.view(heads, -1)[:, tokens:] = -math.inf
        return chunks


class RunningFeature(Protocol):
    """One feature of one sequence, in some heads. A NaN or infinity in the attention that it reads stays in it."""

    def add(self, diagonal: Tensor) -> None:
        """Take the diagonal of new tokens, (heads, new tokens)."""

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        """(heads, width), as `Feature.compute`.

        Args:
            diagonal: (heads, tokens) of all tokens; there are as many as the feature needs.
            received: (heads, tokens).
        """


@dataclass
class MeanLog:
    """AttnScore: what is on the diagonal stays there, so the logs are summed up once."""

    total: Tensor
    """(heads,) sum of the logs."""

    tokens: int = 0

    def add(self, diagonal: Tensor) -> None:
        """Add their logs."""
        self.total += diagonal.clamp(min=LOG_FLOOR).log().sum(dim=-1, dtype=self.total.dtype)
        self.tokens += diagonal.shape[1]

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        """(heads, 1)."""
        return (self.total / self.tokens)[:, None]


@dataclass
class LargestDiagonal:
    """AttnEigvals: a token is among the k largest when it comes, or never will be."""

    k: int
    best: Tensor
    """(heads, at most k), descending."""

    def add(self, diagonal: Tensor) -> None:
        """Keep the largest of both."""
        both = torch.cat([self.best, diagonal], dim=-1)
        self.best = both.topk(min(self.k, both.shape[1])).values

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        """(heads, k)."""
        return self.best


@dataclass
class LargestReceived:
    """LapEigvals and SinkProbe: every number changes with every token, since its denominator T - i does."""

    k: int
    laplacian: bool
    """Take the diagonal off: lambda_i = s_i - a_ii. False: s_i alone."""

    workspace: Workspace

    def add(self, diagonal: Tensor) -> None:
        """Nothing of it can be kept."""

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        """(heads, k)."""
        heads, tokens = received.shape
        chunks = self.workspace.chunks(heads, tokens)
        values = chunks.view(heads, -1)[:, :tokens]
        torch.mul(received, self.workspace.reciprocals(tokens), out=values)
        if self.laplacian:
            values -= diagonal
        return largest(chunks, self.k)


def largest(chunks: Tensor, k: int) -> Tensor:
    """The k largest numbers of each head, descending. NaN is larger than all, so it is not overlooked.

    Args:
        chunks: (heads, chunks, size), contiguous.
        k: at most chunks * size.

    Returns:
        (heads, k).
    """
    heads, count, size = chunks.shape
    if count > k:
        places = candidates(chunks, k) + torch.arange(0, heads * count, count, device=chunks.device)[:, None]
        # (heads * k, size): whole rows are copied, which `gather` does number by number in 7 times the time.
        chunks = chunks.view(-1, size).index_select(0, places.view(-1))
    return chunks.view(heads, -1).topk(k).values


def candidates(chunks: Tensor, k: int) -> Tensor:
    """(heads, k) places of the chunks with the largest maxima: the k largest numbers of a head lie in these."""
    return chunks.amax(dim=-1).topk(k, sorted=False).indices


STARTS: dict[str, Callable[[int, int, Workspace], RunningFeature]] = {
    "attention_score.v1": lambda k, heads, space: MeanLog(torch.zeros(heads, dtype=space.precise, device=space.device)),
    "attention_eigenvalues.v1": lambda k, heads, space: LargestDiagonal(k, torch.empty(heads, 0, device=space.device)),
    "laplacian_eigenvalues.v1": lambda k, heads, space: LargestReceived(k, True, space),
    "sink_scores.v1": lambda k, heads, space: LargestReceived(k, False, space),
}
"""Each feature of no tokens yet, by its id: made from k, the number of heads and the workspace of their device."""
