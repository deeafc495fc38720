"""How a long computation says that it goes on: it calls `advance` after every unit of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Advance = Callable[[], object]


def silent() -> None:
    """For callers who don't look."""


def waiting(items: Sequence[T], doing: str = "tokenise") -> Iterable[T]:
    """The items, with a bar once it takes longer than a person waits without one."""
    bar: Iterable[T] = tqdm(items, desc=doing, unit="item", delay=2.0, leave=False)
    return bar
