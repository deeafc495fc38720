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

Transformers {{version}} calls {{every}} classes a causal language model. {{captured}} of them are captured as they are,
{{by_fallback}} by a fallback that must be asked for, and {{refused}} are refused with the reason. The other {{odd}}
could not be built tiny; nothing is known of them.

**Written by the test run**, which fails when this file is not what it finds; to write it anew:
`{WRITE}=1 python -m pytest tests/detector/test_architectures.py`.

Each is built tiny and random from its configuration, in float32, and read under capture. *Captured* means that

- both sums of every map are those of the model's own eager maps, reduced in float64, within {SAME:g} (above 1: of the
  value), past the edge of a window or chunk;
- its logits are those without capture, within {SAME:g} of the largest, with the attention that transformers chooses
  for it (its rival: SDPA, or eager where SDPA is not supported);
- each mechanism of its attention was switched off once, and the comparison then failed.

*Over a cache*: a batch padded on the left is generated past the window's edge, and a text is fed in chunks and single
tokens. The sums of both are, within {SAME:g}, those of the model's own eager maps of the very same steps over such a
cache. *As in one forward* where they are those of one forward over the same text as well; where they are not, the
model attends otherwise over its cache or behind padding, eagerly too.
"""

CAPTURED = """
## Captured

| family | class | attention | rival | over a cache |
|---|---|---|---|---|
"""

FALLBACK = f"""
## By the fallback

Refused, unless each layer may run eagerly by itself: `capture_attention(model, fallback="eager")`. Its map is then
reduced at once and dropped, so that no more than one is alive, but it is computed as a whole.

Here what is captured and what it is held against are the same eager map. So what is tested is that the map is reduced
rightly, within {SAME:g}, that padding is left out, that rows and columns lie where they belong over a cache, and that
the logits are those without capture. How a layer attends is not tested, and no mechanism is switched off: whatever
its map says is taken as it is.

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

Nothing is known of these: no tiny model of them was made here, so they were neither captured nor refused.

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
    not_built = [row(*one) for one in sorted(odd)]
    rows = {"captured": captured, "by_fallback": by_fallback, "refused": refused, "odd": not_built}
    counts = {name: len(one) for name, one in rows.items()}
    head = HEAD.format(version=transformers.__version__, every=sum(counts.values()), **counts)
    return "".join([head, CAPTURED, *captured, FALLBACK, *by_fallback, REFUSED, *refused, ODD, *not_built])


RIVALS = {"sdpa": "SDPA", "eager": "eager"}


def over_cache(finding: Finding) -> str:
    notes = []
    for run, outcome in finding.over_cache.items():
        if isinstance(outcome, str):
            notes.append(f"{run}: {brief(outcome)}")
        elif outcome.eager > SAME:
            notes.append(f"{run}: not its eager maps")
        elif outcome.forward > SAME:
            notes.append(f"{run}: as its eager maps, not as in one forward")
    if all(isinstance(outcome, str) for outcome in finding.over_cache.values()):
        notes.insert(0, "**in one forward only**")
    return ". ".join(notes) or "as in one forward"


def brief(message: str) -> str:
    """Without the mend, which is behind the semicolon."""
    return message.split("; ")[0]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
