"""What a report consists of, before it becomes Markdown or HTML: plain text everywhere, no markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notes:
    """Warnings, each on a line of its own."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Cells, the first column a heading and the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    own: frozenset[int] = frozenset()
    """Rows that stand out: the probe's own."""

    folded: str = ""
    """Heading under which a page that has a picture of it hides the table."""

    wide: bool = False
    """Cells hold sentences, which may be broken, instead of numbers."""


@dataclass(frozen=True)
class Picture:
    """One drawing; nothing is drawn before a page asks for it."""

    name: str
    """Letters and dashes; once in a page."""

    alt: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (4.4, 3.6)
    """Width and height in inches; text is 9 points high."""

    margins: tuple[float, float, float, float] = (0.62, 0.1, 0.5, 0.15)
    """Left, right, bottom and top in inches, so that pictures side by side are in line."""

    title: tuple[str, ...] = ()
    """Lines above it; they are the page's, so that they break where it is narrow."""


@dataclass(frozen=True)
class Pictures:
    """Drawings side by side, with one line that says how to read them."""

    pictures: tuple[Picture, ...]
    caption: str
    title: str = ""


@dataclass(frozen=True)
class Code:
    """Something to be copied, as it is."""

    text: str


@dataclass(frozen=True)
class Examples:
    """Prompts with their responses, and the share of each token in the score."""

    title: str
    caption: str
    entries: tuple[Mapping[str, Any], ...]
    """As they stand in the metrics: id, prompt, response, label, probability, tokens and contributions."""


Block = Text | Notes | Bullets | Table | Pictures | Code | Examples


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]
