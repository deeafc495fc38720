"""Numbers, names and foreign texts as people read them. Knows neither Markdown nor HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lapwing_detector.features import FEATURES

TITLES = {
    "token_count": "length only (token count)",
    "log_probability": "mean token log-probability",
    "summed_attention_score": "AttnScore summed over heads",
    "log_probability+attention": "log-probability + attention",
    "token_statistics": "log-probability statistics alone",
    "random_heads": "random heads, same number",
    "all_heads": "all heads, no selection",
    "shuffled_labels": "shuffled labels (must be .5)",
}

UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff0-\ufffb\ufffe\uffff]"
)
"""Characters that can't be seen, turn the order of others, or can't be written as UTF-8."""


def title(name: str) -> str:
    """A comparison's name for people."""
    recipe, _, features = name.partition("/")
    if not features:
        return TITLES.get(name, name)
    read = [feature_title(feature) for feature in features.split("+")]
    return f"{recipe}: {' + '.join([*read, 'log-probabilities'] if recipe == 'combined' else read)}"


def feature_title(feature: str) -> str:
    """A feature's name for people; its id where it is not known."""
    known = FEATURES.get(feature)
    return known.title if known else feature


def interval(estimate: Mapping[str, float | None]) -> str:
    """A value with its interval, such as `.712 (.690 to .733)`."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return number(value) if low is None or high is None else f"{number(value)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three digits, the leading zero left out."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def signed(value: float) -> str:
    """Three digits, the sign always there."""
    return ("+" if value >= 0 else "") + number(value)


def percent(value: float | None) -> str:
    """A share with one digit, such as `4.7%`."""
    return "-" if value is None else f"{value:.1%}"


def percent_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A share with its interval, such as `4.7% (3.9% to 5.6%)`."""
    known = value is not None and low is not None and high is not None
    return f"{percent(value)} ({percent(low)} to {percent(high)})" if known else percent(value)


def about(sample: Mapping[str, Any]) -> str:
    """How many rows and groups."""
    return f"{sample['rows']:,} rows of {sample['groups']:,} groups, {sample['base_rate']:.1%} hallucinated"


def visible(text: str) -> str:
    """The same text with every character that can't be seen, or that turns the order of others, as its escape."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str, limit: int = 200) -> str:
    """Visible text on one line, cut to the limit."""
    return cut(" ".join(visible(text).split()), limit)


def cut(text: str, limit: int) -> str:
    """At most so many characters, the last an ellipsis where some are missing."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
