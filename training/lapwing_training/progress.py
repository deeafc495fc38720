"""How a long computation says that it goes on: it calls `advance` after every unit of work."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[], object]


def silent() -> None:
    """For callers who don't look."""
