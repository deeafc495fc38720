"""Sequences that one model reads on together: one row each, padded on the left. Knows no probe and no text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lapwing_detector.errors import CaptureError, UnsupportedGeneration
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.sequences import Part, Sequences, gathered
from lapwing_detector.summary import AttentionSummary


@dataclass(eq=False)
class Batch:
    """A cache, the sums of the attention so far, and where the padding is."""

    model: LanguageModel
    heads: Mapping[int, Collection[int]] | None
    """The heads that are captured, by layer; None: all."""

    pads: list[int]
    """By row: its columns of padding."""

    sums: Sequences
    cache: Any
    tokens: int = 0
    """Columns, padding included."""

    @classmethod
    def read(
        cls, model: LanguageModel, heads: Mapping[int, Collection[int]] | None, prompts: Sequence[Sequence[int]]
    ) -> tuple[Batch, Tensor]:
        """Read prompts in one forward.

        Args:
            model: whose caches must be `plain` where there are several prompts of different lengths.
            heads: to be captured.
            prompts: token ids, at least one in each.

        Returns:
            The batch, and (rows, vocabulary) logits of what comes next.
        """
        columns = max(map(len, prompts))
        new = cls(model, heads, [columns - len(prompt) for prompt in prompts], Sequences(()), None)
        ids = [[model.pad_id] * pad + list(prompt) for pad, prompt in zip(new.pads, prompts, strict=True)]
        return new, new._forward(ids)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of each row; (rows, vocabulary) logits of what comes next."""
        return self._forward([[token] for token in tokens])

    def _forward(self, ids: list[list[int]]) -> Tensor:
        model, past = self.model, self.tokens
        captured = model.capture(self.heads)
        # The capture is left between the steps, so that others may use the model.
        with captured.resume(), torch.inference_mode():
            try:
                if self.cache is not None:
                    captured.take_over(self.sums, self.cache)
                output = model.forward(
                    model.tensor(ids), past_key_values=self.cache, use_cache=True, **self._places(past, len(ids[0]))
                )
                self.sums, self.cache = captured.sums, getattr(output, "past_key_values", None)
            finally:
                captured.forget()
            if self.cache is None:
                raise UnsupportedGeneration(
                    f"{type(model.model).__name__} returns no cache, beginning anew with every token; score the "
                    "finished text in one forward"
                )
            logits: Tensor = output.logits[:, -1].cpu()
        self.tokens = self.sums.tokens
        return logits

    def _places(self, past: int, new: int) -> dict[str, Tensor]:
        """Where the padding is and which position each token has; nothing where they are as models take them to be."""
        if not any(self.pads):
            return {}
        columns = torch.arange(past + new, device=self.model.model.device)
        positions = columns - self._starts  # (rows, columns), negative for padding
        return {"attention_mask": (positions >= 0).long(), "position_ids": positions[:, past:].clamp(min=0)}

    @cached_property
    def _starts(self) -> Tensor:
        """(rows, 1) the column of the first token."""
        return self.model.tensor([self.pads]).T

    @property
    def plain(self) -> bool:
        """Whether the cache holds every token's keys in the column of the token, so that rows can be moved."""
        return (
            type(self.cache) is DynamicCache
            and not self.cache.offloading
            and all(type(layer) is DynamicLayer and layer.is_initialized for layer in self.cache.layers)
        )

    def apart(self) -> list[Batch]:
        """Each row as a batch of its own, to be fed the token again with which a forward failed; of a plain cache.

        The caches are as they were before it; the sums keep what some layers added, which is not added again.

        Raises:
            CaptureError: the forward went too far to be undone.
        """
        if self.sums.tokens != self.tokens:
            raise CaptureError("the forward failed after it had been summed up; start again from the prompt")
        for layer in self.cache.layers:  # some of which may have taken the new token in
            layer.keys, layer.values = (part[:, :, : self.tokens] for part in (layer.keys, layer.values))
        return [Batch.gather([(self, [row])]) for row in range(len(self.pads))]

    def summary(self, row: int) -> AttentionSummary:
        """The attention of one sequence."""
        return self.sums.summary(row)

    @classmethod
    def gather(cls, parts: Sequence[tuple[Batch, Sequence[int]]]) -> Batch:
        """Some rows of some batches as a batch of their own, with no more padding than it needs.

        Args:
            parts: batches with plain caches, of the same model and heads, and their rows; none is changed.
        """
        some = [Part(batch.sums, list(rows), min(batch.pads[row] for row in rows)) for batch, rows in parts]
        sums = gathered(some)
        lengths = [batch.tokens - batch.pads[row] for batch, rows in parts for row in rows]
        caches = [batch.cache for batch, _ in parts]
        first = parts[0][0]
        pads = [sums.tokens - length for length in lengths]
        return cls(first.model, first.heads, pads, sums, _gathered(some, caches, sums.tokens), sums.tokens)


@torch.inference_mode()
def _gathered(parts: list[Part], caches: list[Cache], tokens: int) -> DynamicCache:
    new = DynamicCache()
    for place in range(len(caches[0].layers)):
        layers: list[Any] = [cache.layers[place] for cache in caches]
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.lazy_initialization(layers[0].keys, layers[0].values)
        for name in ("keys", "values"):
            olds = [getattr(one, name) for one in layers]
            setattr(layer, name, _beside(parts, olds, tokens))
        new.layers.append(layer)
    return new


def _beside(parts: list[Part], olds: list[Tensor], tokens: int) -> Tensor:
    """(rows, heads, tokens, width) of all parts, with zeros for padding."""
    _, heads, _, width = olds[0].shape
    joint = olds[0].new_zeros(sum(len(part.rows) for part in parts), heads, tokens, width)
    start = 0
    for part, old in zip(parts, olds, strict=True):
        moved = old[part.rows, :, part.first :]
        joint[start : start + len(part.rows), :, tokens - moved.shape[2] :] = moved
        start += len(part.rows)
    return joint
