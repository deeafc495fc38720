"""The documents of a probe: report and card as Markdown, report as a page, and the same of a transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapwing_detector.pictures import PAIR
from lapwing_detector.probe import Probe
from lapwing_training.report import html, markdown, sections, summary, tables
from lapwing_training.report.blocks import Notes
from lapwing_training.report.words import about, one_line


def training_report(probe: Probe) -> str:
    """Everything that training found, as Markdown, for a reader who decides whether to use the probe."""
    return markdown.document(_heading(probe), sections.of_probe(probe))


def html_report(probe: Probe) -> str:
    """The same with pictures, as one page that needs no network and runs no script.

    The same probe gives the same text, as long as the libraries are the same.
    """
    return html.page(_heading(probe), _beneath(probe), sections.of_probe(probe))


def transfer_report(result: Mapping[str, Any]) -> str:
    """A probe on another store, as Markdown.

    Args:
        result: of `evaluate_probe`.
    """
    return markdown.document(_transfer_heading(result), sections.of_transfer(result))


def html_transfer_report(result: Mapping[str, Any]) -> str:
    """The same with pictures, as a page like that of `html_report`."""
    return html.page(_transfer_heading(result), about(result["test"]), sections.of_transfer(result))


def model_card(probe: Probe) -> str:
    """README.md of the probe directory: what it is, how it is used, how good it is."""
    metrics, model = probe.metrics, one_line(probe.identity.name)
    notes = tuple(one_line(note, 1000) for note in metrics.get("notes", ()))
    parts = [
        f"# {probe.name}",
        f"A Lapwing probe: how likely it is that a model's answer is made up, read from {_source(probe)}.",
        markdown.plain(summary.described(probe)),
        "## Use",
        "```python\nfrom lapwing_detector import Detector\n\n"
        f'detector = Detector.from_pretrained(model, "path/of/this/directory")  # model: {model}\n'
        'print(detector.score("prompt", "response").probability)\n```',
        f"It scores {markdown.plain(model)} and refuses every other model. A sequence of fewer than "
        f"{probe.needed_tokens} tokens has no score.",
        markdown.block_text(Notes(notes)),
        "## How good it is",
        markdown.table_text(tables.comparisons(metrics)) if "comparison" in metrics else "",
        markdown.table_text(tables.thresholds(metrics)) if "thresholds" in metrics else "",
        "Everything else stands in `report.html` and `report.md` beside this file.",
        "## Which heads",
        "A low p-value marks a head that separates made-up answers from others; bright cells carry no signal.",
        *_pictures(probe),
        markdown.table_text(tables.significance(metrics)) if "significance" in metrics else "",
        "## Limits",
        "The numbers hold for questions like those it was fitted on; measure your own with `lapwing evaluate`. "
        "A high probability is a reason to look, not a proof, and a low one is no proof of truth.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pictures(probe: Probe) -> list[str]:
    """Those that `Probe.save_pretrained` lays beside the card."""
    meanings = {
        "P_VALUE": "p-value of each head: AttnScore left, Laplacian eigenvalues right",
        "AUROC": "AUROC of each head",
        "HEAD_PROBE": "AUROC of each head's own probe",
    }
    lines = [
        f"![{meaning}]({statistic.lower()}.png)"
        for statistic, meaning in meanings.items()
        if all(f"{feature}/{statistic}" in probe.statistics for feature in PAIR)
    ]
    return [*lines, "![Heads that the probe reads](selected.png)"]


def _heading(probe: Probe) -> str:
    return f"Report: {probe.name} (revision {probe.revision})"


def _beneath(probe: Probe) -> str:
    return (
        f"How likely it is that an answer of {one_line(probe.identity.name)} is made up, read from "
        f"{_source(probe, 'its')}."
    )


def _source(probe: Probe, whose: str = "the model's") -> str:
    more = " and from the log-probabilities of its tokens" if probe.reads_log_probabilities else ""
    return f"{whose} own attention{more}"


def _transfer_heading(result: Mapping[str, Any]) -> str:
    return f"{result['probe']} (revision {result['revision']}) on {one_line(str(result['store']))}"
