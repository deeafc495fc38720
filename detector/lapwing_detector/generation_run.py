"""One call of `generate` while it runs: where each of its sequences ends. Knows no attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

OPEN = torch.iinfo(torch.long).max
"""End of a sequence that has not ended."""


class Endings(StoppingCriteriaList):
    """The stopping criteria of a generation, which note what they decide."""

    ends: Tensor | None = None
    """(batch,) column behind the last token of each sequence's content, OPEN while it goes on."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        stops = [criterion.eos_token_id for criterion in self if hasattr(criterion, "eos_token_id")]
        self._pads = bool(stops)  # only then does `generate` feed padding to those that have ended
        self._stop_ids = [
            int(one) for ids in stops if ids is not None for one in torch.as_tensor(ids).reshape(-1).tolist()
        ]

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """(batch,) bool: which sequences are to end at the newest token of `input_ids`, (batch, tokens)."""
        ended = super().__call__(input_ids, scores, **others)
        tokens = input_ids.shape[1]
        ends = input_ids.new_full(input_ids.shape[:1], OPEN) if self.ends is None else self.ends
        if self._pads:
            stop_ids = torch.tensor(self._stop_ids, dtype=torch.long, device=input_ids.device)
            # The token that other criteria end a sequence at is content, a stop token is not.
            end = tokens - torch.isin(input_ids[:, -1], stop_ids).to(ends)
            ends = torch.where(ended & (ends == OPEN), end, ends)
        self.ends = ends
        return ended


@dataclass
class Run:
    """One call of `generate`."""

    endings: Endings | None = None
    """None until `generate` has made its stopping criteria."""

    cache: Cache | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Per-token inputs of its newest forward, for the step after the last one."""


@dataclass(frozen=True)
class Pending:
    """The newest token of each sequence, which was generated but never fed, so that it has no row yet."""

    run: Run
    tokens: Tensor
    """(batch,) ids."""
