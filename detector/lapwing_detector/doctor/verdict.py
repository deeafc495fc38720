"""What a check of the doctor comes to, and how far two readings of one text may lie apart. Knows arrays only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from lapwing_detector.errors import CaptureError
from lapwing_detector.summary import AttentionSummary

State = Literal["ok", "failed", "skipped", "measured"]
"""`measured` is of what no limit is set for: time differs from machine to machine, and decides nothing."""

FLOAT32_AT_MOST = 1e-4
"""Two ways through a model sum in another order; seen of Atlas 3e-6, of tiny random models of every family 1e-5."""

HALF_AT_MOST_EPS = 6
"""In units of the dtype's precision, of the median over the tokens, in the head where it is largest.

There eager attention itself rounds every number of its maps to the dtype, as each layer does its output, and the
routers of experts choose others: single tokens may differ by all they have, which says nothing. Seen of Atlas 0.4, of
tiny random models 0.4 to 5 (a random Mixtral in float16 9). With scores wrong by a tenth these are at 2 to 35 in
bfloat16, at 18 to 220 in float16: what is only slightly wrong is for float32 to see.
"""


class Skipped(Exception):
    """A check that can't be made of this model; its text says why."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    state: State
    said: str
    """For people, in one line."""

    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The same and more for programs; JSON values, but that floats may be infinite."""

    note: str = ""
    """A warning for people that fails nothing; mostly empty."""


@dataclass(frozen=True)
class Difference:
    """Between two summaries of the same tokens.

    Absolute for the diagonal; for what is received, which grows with the length, relative where it is above 1.
    """

    largest: float
    """Of all layers, heads and tokens; infinite where one is not finite."""

    median: float
    """Over the tokens, in the head where it is largest."""

    layer: int
    """Where the largest one is."""

    head: int


@dataclass(frozen=True)
class Tolerance:
    """How large one kind of difference may be."""

    kind: Literal["largest", "median"]
    at_most: float
    logits_at_most: float
    """Of logits, relative to the largest: what is more is no rounding. Seen in half precision up to 5 in its units."""

    def worst(self, differences: Iterable[Difference]) -> Difference:
        """The one that decides."""
        return max(differences, key=lambda one: (np.isinf(one.largest), float(getattr(one, self.kind))))

    def allows(self, difference: Difference) -> bool:
        """Whether it is small enough, and finite."""
        return bool(np.isfinite(difference.largest) and getattr(difference, self.kind) <= self.at_most)


def tolerance(dtype: torch.dtype) -> Tolerance:
    """For models that compute in this dtype."""
    eps = torch.finfo(dtype).eps
    if eps > torch.finfo(torch.float32).eps:
        return Tolerance("median", HALF_AT_MOST_EPS * eps, logits_at_most=2 * HALF_AT_MOST_EPS * eps)
    return Tolerance("largest", FLOAT32_AT_MOST, logits_at_most=10 * FLOAT32_AT_MOST)


def difference(one: AttentionSummary, other: AttentionSummary) -> Difference:
    """How far two summaries are apart.

    Args:
        one: either precision.
        other: of the same layers, heads and tokens; the one that is believed.

    Raises:
        CaptureError: their shapes differ.
    """
    if one.layers != other.layers or one.diagonal.shape != other.diagonal.shape:
        raise CaptureError(
            f"{one.diagonal.shape[1:]} heads and tokens of layers {list(one.layers)} against "
            f"{other.diagonal.shape[1:]} of layers {list(other.layers)}; both must be of the same"
        )
    diagonal = np.abs(one.diagonal.astype(np.float64) - other.diagonal)
    received = np.abs(one.received.astype(np.float64) - other.received) / np.maximum(1.0, np.abs(other.received))
    errors = np.maximum(diagonal, received)  # (layers, heads, tokens)
    errors[~np.isfinite(errors)] = np.inf
    layer, head, _ = np.unravel_index(int(errors.argmax()), errors.shape)
    return Difference(float(errors.max()), float(np.median(errors, axis=-1).max()), one.layers[int(layer)], int(head))


def compared(
    name: str, where: str, differences: Mapping[str, Difference], limit: Tolerance, numbers: Mapping[str, Any]
) -> Check:
    """The check that all of several differences are small enough.

    Args:
        name: of the check.
        where: what was compared, in words.
        differences: by what they are called.
        limit: of each.
        numbers: to be kept beside them.
    """
    worst = limit.worst(differences.values())
    parts = ", ".join(f"{what} {getattr(one, limit.kind):.1e}" for what, one in differences.items())
    kind = "largest difference" if limit.kind == "largest" else "median difference of a head"
    place = f"layer {worst.layer}, head {worst.head}"
    place = place if limit.kind == "largest" else f"largest of a token {worst.largest:.1e}, {place}"
    said = f"{where}: {kind} {parts}; at most {limit.at_most:.0e} ({place})"
    found = {
        "differences": {what: {"largest": one.largest, "median": one.median} for what, one in differences.items()},
        "decides": limit.kind,
        "at_most": limit.at_most,
        "worst": {"layer": worst.layer, "head": worst.head},
    }
    return Check(name, "ok" if all(map(limit.allows, differences.values())) else "failed", said, {**found, **numbers})
