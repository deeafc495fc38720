"""How results look in a notebook. Everything that came over the wire is escaped."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lapwing_client.results import Detection, Heatmap

STRONGEST = 5
"""Heads that are named."""


def detection(found: Detection) -> str:
    """A detection as a small table."""
    if found.probability is None or found.logit is None:
        return table([("could not score", f"{found.message} ({found.reason})")])
    heads = ", ".join(
        f"layer {head.layer} head {head.head} ({head.contribution:+.3f})" for head in found.strongest_heads[:STRONGEST]
    )
    flagged = {True: "yes", False: "no", None: "the probe has no threshold for it"}[found.flagged]
    rows = [
        ("made up with probability", f"{found.probability:.3f} (logit {found.logit:+.3f})"),
        (f"flagged at {found.false_positive_rate:.1%} false alarms", flagged),
        ("strongest heads", heads),
        ("probe", f"{found.probe_name} {found.probe_revision}"),
        ("tokens", f"{found.prompt_tokens} + {found.response_tokens}"),
    ]
    return table(rows)


def heatmap(found: Heatmap) -> str | None:
    """The picture, if one was asked for; a picture of any kind runs no script in an `img`."""
    kind = "image/png" if found.image.startswith(b"\x89PNG") else "image/svg+xml"
    if not found.image:
        return None
    caption = f"{found.statistic} of {found.feature}, probe {found.probe_name} {found.probe_revision}"
    source = f"data:{kind};base64,{b64encode(found.image).decode()}"
    return f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def table(rows: list[tuple[str, str]]) -> str:
    """Names and values."""
    return (
        f"<table>{''.join(f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)}</table>"
    )
