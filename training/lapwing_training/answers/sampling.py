"""Sampling in which every item draws from its own seed: its answer doesn't depend on who shares its batch.

Knows logits, not what they are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lapwing_training.files import digest


class OwnDraws(LogitsProcessor):
    """Leaves one token a row, drawn from the row's softmax.

    The token is the argument of the largest logit + Gumbel noise, which is distributed as the softmax, and which the
    last bits that padding changes in the logits hardly ever move.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the same shape, (batch, vocabulary): 0 for the token drawn, -inf for all others."""
        # float32 has too few numbers near 0 for a vocabulary of 100,000.
        waits = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)  # (batch, vocabulary)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        drawn = (scores.double() - waits.log()).argmax(dim=-1, keepdim=True)  # (batch, 1)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


def own_draws(
    temperature: float, top_p: float, seed: int, device: torch.device | str, ids: Sequence[str]
) -> LogitsProcessorList:
    """What greedy decoding needs to sample each item of a batch with the seed of its own; nothing at temperature 0."""
    if temperature == 0.0:
        return LogitsProcessorList()
    own = OwnDraws([seed_of(id, seed) for id in ids], device)
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), own])


def seed_of(id: str, seed: int) -> int:
    """A seed of its own for every item and run, below 2**63."""
    return int(digest(f"{seed} {id}".encode())[:16], 16) >> 1
