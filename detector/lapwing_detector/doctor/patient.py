"""The model that the doctor looks at, with a short text: what is captured of it, and its logits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.doctor.verdict import Tolerance, tolerance
from lapwing_detector.errors import InvalidInput
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.layers import eager_layers
from lapwing_detector.rotary import switching_points
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import build_ids

TEXT = (
    "The lapwing is a bird of wet meadows and ploughed fields. It nests on open ground, and when a fox or a dog comes "
    "near, it drops a wing as if it were broken and runs, crying, away from its eggs. The pursuer follows, is led far "
    "across the field, and loses both. In 1486 a list of names for companies of birds called a flock of them a deceit. "
    "Half a millennium later people still argue about whether the bird knows what it is doing."
)

TOKENS = 96
"""Of the text that is looked at."""

FEWEST = 16
"""With fewer there is nothing to tell apart."""

NEW_TOKENS = 12
"""That are generated."""


@dataclass(frozen=True)
class Reading:
    """What one forward gave."""

    summaries: list[AttentionSummary]
    logits: Tensor
    """(sequences, vocabulary) float32, behind the last token of each."""


@dataclass(frozen=True)
class Patient:
    """A model, how it is captured, and a text for it."""

    language_model: LanguageModel
    fallback: Literal["eager"] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """As transformers knows it."""
        return self.language_model.model

    @property
    def tolerance(self) -> Tolerance:
        """How far two readings may be apart."""
        return tolerance(self.model.dtype)

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The text, with room behind it for what is generated.

        Raises:
            InvalidInput: the tokenizer does not make enough tokens of it, or such as the model does not know.
        """
        switching = switching_points(self.model.config.get_text_config(decoder=True))
        room = min([self.language_model.max_tokens, *switching.values()]) - NEW_TOKENS
        ids = build_ids(self.language_model.tokenizer, TEXT).prompt_ids[: min(TOKENS, room)]
        if len(ids) < FEWEST:
            raise InvalidInput(
                "model",
                f"has room for {room} tokens of a text, of which its tokenizer makes {len(ids)}; {FEWEST} needed",
            )
        if max(ids) >= self.language_model.vocabulary:
            raise InvalidInput(
                "tokenizer",
                f"makes id {max(ids)}, the model has {self.language_model.vocabulary}; "
                "use the tokenizer that belongs to the model",
            )
        return ids

    def tokens(self, count: int) -> Tensor:
        """The text over and over; (1, count)."""
        return self.language_model.tensor([[self.ids[index % len(self.ids)] for index in range(count)]])

    def capture(self) -> Captured:
        """A new capture of the model."""
        return capture_attention(self.model, fallback=self.fallback)

    def read(self, sequences: Sequence[Sequence[int]]) -> Reading:
        """What is captured of token ids in one forward, padded on the right as where texts are scored."""
        lengths = [len(ids) for ids in sequences]
        rows = [[*ids, *[self.language_model.pad_id] * (max(lengths) - len(ids))] for ids in sequences]
        visible = [[1] * length + [0] * (max(lengths) - length) for length in lengths]
        tensor = self.language_model.tensor
        with torch.inference_mode(), self.capture() as captured:
            output: Any = self.model(input_ids=tensor(rows), attention_mask=tensor(visible), use_cache=False)
        return Reading(captured.summaries(), last_logits(output.logits, lengths))

    @cached_property
    def makes_maps(self) -> bool:
        """Whether it is read by its own whole maps, layer by layer."""
        return self.fallback is not None and eager_layers(self.model) is not None

    @property
    def takes_positions(self) -> bool:
        """Whether the model can be told at which positions its tokens stand."""
        return "position_ids" in inspect.signature(self.model.forward).parameters


def last_logits(logits: Tensor, lengths: Sequence[int]) -> Tensor:
    """Those behind the last token of each sequence.

    Args:
        logits: (sequences, tokens, vocabulary), padded on the right.

    Returns:
        (sequences, vocabulary) float32.
    """
    return torch.stack([row[length - 1] for row, length in zip(logits, lengths, strict=True)]).float()


def logits_changed(ours: Tensor, theirs: Tensor, kind: Literal["largest", "median"]) -> float:
    """Of the tokens' differences the one that decides; infinite where one is not finite.

    The median lets a few tokens off, for which a router chooses another expert in half precision.

    Args:
        ours: logits (tokens, vocabulary).
        theirs: the same, and believed; each token's difference is relative to its largest.
    """
    ours, theirs = ours.float(), theirs.float()
    apart = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1).clamp(min=1)  # (tokens,)
    if not bool(apart.isfinite().all()):
        return float("inf")
    return float(apart.median() if kind == "median" else apart.max())


def logits_apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest logit; infinite where one is not finite."""
    apart = float((one - other).abs().max() / other.abs().max().clamp(min=1))
    return apart if np.isfinite(apart) else float("inf")
