"""Reports as Markdown. Foreign text is escaped, so that it stays text; pictures are left to the page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lapwing_training.report import tables
from lapwing_training.report.blocks import Block, Bullets, Code, Examples, Notes, Section, Table, Text
from lapwing_training.report.words import number, one_line, signed, visible

SPECIAL = re.compile(r"[\\`*_\[\]~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)")
"""What Markdown, or HTML within it, would not show as it is."""

NAMED = {"<": "&lt;", "&": "&amp;"}
STRONGEST = 3
"""Tokens that are named for an example."""


def document(heading: str, sections: tuple[Section, ...]) -> str:
    """A whole document."""
    parts = [f"# {plain(heading)}"]
    for section in sections:
        blocks = [text for block in section.blocks if (text := block_text(block))]
        if blocks:
            parts += [f"## {plain(section.title)}", *blocks]
    return "\n\n".join(parts) + "\n"


def comparison_table(metrics: Mapping[str, Any]) -> str:
    """One row for the probe and each thing beside it."""
    return table_text(tables.comparisons(metrics))


def block_text(block: Block) -> str:
    """One block; empty for pictures."""
    match block:
        case Text():
            return plain(block.text)
        case Notes():
            return "\n".join(f"> {plain(line)}" for line in block.lines)
        case Bullets():
            listed = "\n".join(f"- {plain(line)}" for line in block.lines)
            return f"**{plain(block.title)}**\n\n{listed}" if block.title else listed
        case Table():
            return table_text(block)
        case Code():
            return f"    {visible(' '.join(block.text.splitlines()))}"
        case Examples():
            return "\n".join([f"### {plain(block.title)}", "", plain(block.caption), "", *_examples(block)])
        case _:
            return ""


def table_text(table: Table) -> str:
    """A table, numbers to the right."""
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    for row in table.own:
        rows[row][0] = f"**{rows[row][0]}**"
    lines = [[_cell(name) for name in table.head], [":--", *["--:"] * (len(table.head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plain(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return SPECIAL.sub(lambda found: NAMED.get(found[0], f"\\{found[0]}"), " ".join(visible(text).split()))


def _cell(text: str) -> str:
    return plain(text).replace("|", "&#124;")


def _examples(block: Examples) -> Iterator[str]:
    for entry in block.entries:
        yield f"- {number(entry['probability'])} said of `{_code(str(entry['id']))}`"
        yield f"  - prompt: {plain(one_line(entry['prompt'], 300))}"
        yield f"  - response: {plain(one_line(entry['response'], 300))}"
        if entry.get("tokens") and entry.get("contributions"):
            yield f"  - strongest tokens: {', '.join(_strongest(entry['tokens'], entry['contributions']))}"


def _strongest(tokens: list[str], contributions: list[float]) -> Iterator[str]:
    pairs = sorted(zip(tokens, contributions, strict=True), key=lambda pair: -abs(pair[1]))
    for token, share in pairs[:STRONGEST]:
        yield f"“{plain(one_line(token, 40))}” {signed(share)}"


def _code(text: str) -> str:
    """Inside backticks nothing but a backtick means anything."""
    return one_line(text, 80).replace("`", "'")
