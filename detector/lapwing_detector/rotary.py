"""Rotary embeddings whose frequencies depend on the length of the text, so that a cache may hold other ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapwing_detector.errors import CaptureError

MEND = "score the finished text in one forward"


def switching_points(config: Any) -> dict[str, int]:
    """Kind of rotary embedding -> longest text with the frequencies of short ones; empty where they never change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in parameters.values() if isinstance(value, Mapping)]  # by the kind of the layer
    points = {}
    for one in of_layers or [parameters]:
        kind = one.get("rope_type")
        if kind == "longrope":
            points[kind] = int(one["original_max_position_embeddings"])
        elif kind is not None and "dynamic" in kind:
            points[kind] = int(config.max_position_embeddings)
    return points


def require_same_frequencies(points: Mapping[str, int], before: int, after: int) -> None:
    """A text that goes on with its cache must keep the frequencies that the cache was filled with.

    Args:
        points: see `switching_points`.
        before: length when the cache was filled.
        after: length with the new tokens.

    Raises:
        CaptureError: it does not, so that its attention is not that of one forward over the same tokens.
    """
    for kind, most in points.items():
        kept = before > most and kind == "longrope"  # the others change with every token
        if after > most and not kept:
            raise CaptureError(
                f"{kind} rotary embeddings have other frequencies beyond {most} tokens, and the cache was filled "
                f"at {before}, so going on to {after} is not what one forward computes; {MEND}"
            )


def reach_of(inputs: Mapping[str, Any], past: int) -> int:
    """Highest position of a forward, plus 1."""
    positions = inputs.get("position_ids")
    if positions is not None:
        return int(positions.max()) + 1
    fed = next(value for name in ("input_ids", "inputs_embeds") if (value := inputs.get(name)) is not None)
    return past + int(fed.shape[1])
