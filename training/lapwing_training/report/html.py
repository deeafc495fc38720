"""Reports as one HTML page that needs no network and runs no script.

The markup is in `page/`, where Jinja escapes every text; pictures are the only markup that comes from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lapwing_training.report.blocks import Block, Section
from lapwing_training.report.svg import drawn
from lapwing_training.report.words import cut, number, signed, visible

WITH_INTERVAL = re.compile(r"(\S+) \((\S+ to \S+)\)")
BRACKETED = re.compile(r"(\(\S+) to (\S+\))")
"""An interval in a sentence, which no line should break."""

HYPHEN = re.compile(r"(?<![\w.-])-(?=\.?\d)")
"""Before a number: there it is a minus sign."""

MOST_CHARACTERS, MOST_TOKENS, LONGEST_TOKEN = 2000, 300, 20
"""Of a text, of an example and of a token what is shown: the page stays small whatever the models wrote."""

LEVELS = 5
"""Steps of a token's colour."""


def page(heading: str, about: str, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        heading: of the page.
        about: one line beneath it.
        sections: what follows, each with its place in the contents.
    """
    return _environment().get_template("page.html").render(heading=heading, about=about, sections=sections)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = PackageLoader("lapwing_training.report", "page")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "kind": _kind,
        "drawn": drawn,
        "number": number,
        "shortened": lambda text, most=MOST_CHARACTERS: cut(text, most),
        "apart": _apart,
        "unbroken": lambda text: BRACKETED.sub("\\1\xa0to\xa0\\2", _minus(text)),
        "coloured": _coloured,
    }
    environment.globals["LONGEST_TOKEN"] = LONGEST_TOKEN
    return environment


def _visible(value: Any) -> Any:
    """Texts lose what can't be seen; markup, which has been made of them, stays as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _apart(cell: str) -> tuple[str, str]:
    """A value and its interval, for two lines of a cell; the second is empty where there is none."""
    found = WITH_INTERVAL.fullmatch(cell)
    return (_minus(found[1]), _minus(found[2])) if found else (_minus(cell), "")


def _minus(text: str) -> str:
    return HYPHEN.sub("−", text)


def _coloured(entry: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """Tokens of prompt and response: class, share and text of each; the strongest has the deepest colour."""
    tokens, shares = entry["tokens"][-MOST_TOKENS:], entry["contributions"][-MOST_TOKENS:]
    strongest = max(map(abs, shares), default=0.0) or 1.0
    shown = []
    for token, share in zip(tokens, shares, strict=True):
        level = round(LEVELS * abs(share) / strongest)
        shown.append((f"{'up' if share > 0 else 'down'}{level}" if level else "", signed(share), token))
    start = _response_start(tokens, entry["response"])
    if len(tokens) < len(entry["tokens"]):
        shown.insert(0, ("", "", "… "))
        start += start > 0
    return {"prompt": shown[:start], "response": shown[start:]}


def _response_start(tokens: Sequence[str], response: str) -> int:
    """The first token of the response; 0 where the tokens are none of the prompt, or do not spell it."""
    wanted, tail = "".join(response.split()), ""
    for start in range(len(tokens) - 1, -1, -1):
        tail = "".join(tokens[start].split()) + tail
        if wanted in tail:
            return start
    return 0
