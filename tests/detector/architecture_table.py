"""The table of architectures in the documentation, out of what the test run found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers

from tests.detector.architecture_findings import SAME, Finding

PLACE = Path(__file__).parents[2] / "detector" / "ARCHITECTURES.md"

WRITE = "LAPWING_WRITE_ARCHITECTURES"
"""Environment variable: when it is set, the test run writes the table anew."""

HEAD = f"""# Architectures

Every class that transformers {{version}} calls a causal language model. **Written by the test run**, which fails when
this file is not what it finds; to write it anew: `{WRITE}=1 python -m pytest tests/detector/test_architectures.py`.

Each is built tiny and random from its configuration, in float32, and read under capture. *Captured* means that

- both sums of every map are those of the model's own eager maps, reduced in float64, within {SAME:g} (above 1: of the
  value), past the edge of a window or chunk;
- its logits are those without capture, within {SAME:g} of the largest, with the attention that transformers chooses
  for it (its rival: SDPA, or eager where SDPA is not supported);
- each mechanism of its attention was switched off once, and the comparison then failed.

*Over a cache*: whether generating a padded batch past the window's edge, and feeding a text in chunks and single
tokens, give what one forward gives. Where they do not, the model's own logits differ just so without capture.
"""

CAPTURED = """
## Captured

| family | class | attention | rival | over a cache |
|---|---|---|---|---|
"""

FALLBACK = """
## By the fallback

Refused, unless each layer may run eagerly by itself: `capture_attention(model, fallback="eager")`. Its map is then
reduced at once and dropped, so that no more than one is alive, but it is computed as a whole. Held against the same.

| family | class | why not otherwise | over a cache |
|---|---|---|---|
"""

REFUSED = """
## Refused

Before any number is produced, with this reason; with the fallback as well.

| family | class | reason |
|---|---|---|
"""

ODD = """
## Not built

Not known: these can't be made from a configuration alone.

| family | class | why |
|---|---|---|
"""


def table(findings: Iterable[Finding], odd: Iterable[tuple[str, str, str]]) -> str:
    """The whole file.

    Args:
        odd: model type, class and why, of those that were not built.
    """
    found = sorted(findings, key=lambda finding: finding.model_type)
    captured, by_fallback, refused = [], [], []
    for one in found:
        names = one.model_type, one.class_name
        if one.refusal is None:
            captured.append(row(*names, ", ".join(one.mechanisms), RIVALS[one.rival], over_cache(one)))
        elif one.fallback:
            by_fallback.append(row(*names, brief(one.refusal), over_cache(one)))
        else:
            refused.append(row(*names, brief(one.refusal)))
    parts = [HEAD.format(version=transformers.__version__), CAPTURED, *captured, FALLBACK, *by_fallback]
    return "".join([*parts, REFUSED, *refused, ODD, *(row(*one) for one in sorted(odd))])


RIVALS = {"sdpa": "SDPA", "eager": "eager"}


def over_cache(finding: Finding) -> str:
    notes = []
    for run, outcome in finding.over_cache.items():
        if isinstance(outcome, str):
            notes.append(f"{run}: refused, {brief(outcome)}")
        elif outcome > SAME:
            notes.append(f"{run}: its own logits differ")
    return ". ".join(notes) or "as in one forward"


def brief(message: str) -> str:
    """Without the mend, which is behind the semicolon."""
    return message.split("; ")[0]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
