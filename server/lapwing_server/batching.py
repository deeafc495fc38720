"""Which sequences share a forward. Knows lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SHORT: Final = 128
"""Tokens up to which padding costs less than a further forward."""


def cut(lengths: Sequence[int], tokens: int, items: int) -> list[list[int]]:
    """Places of the sequences that share a forward: those that are about as long, so that little of it is padding.

    Args:
        lengths: tokens of each sequence.
        tokens: most of one forward, padding counted; a longer sequence has one of its own.
        items: most sequences of one forward.

    Returns:
        Every place once. The forward comes first in which the earliest sequence is.
    """
    shared: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        size = len(shared[-1]) if shared else 0
        alike = longest <= max(SHORT, 2 * lengths[place])
        if size and alike and size < items and (size + 1) * longest <= tokens:
            shared[-1].append(place)
        else:
            longest = lengths[place]
            shared.append([place])
    return sorted((sorted(places) for places in shared), key=lambda places: places[0])
