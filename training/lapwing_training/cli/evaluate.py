"""The verb `evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lapwing_training.cli.common import AsJson, failures, tell


def evaluate(
    probe: Annotated[str, typer.Argument(help="Probe directory from lapwing train, or Hub id.")],
    store: Annotated[Path, typer.Argument(help="Feature store of the same model, with labels.")],
    seen_groups: Annotated[bool, typer.Option(help="Judge on groups, too, that the probe was fitted on.")] = False,
    resamples: Annotated[int, typer.Option(help="Of the group bootstrap behind every interval.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Page to write, such as evaluation.html: the report as HTML.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a probe on another store: new questions, another domain, another temperature.

    It says how good the probe is there, and what moved: heads, lengths, calibration, AUROC. Groups that it was fitted
    on are left out, and a store of another model is refused.

    Example: lapwing evaluate my-probe other-store
    """
    from lapwing_training.errors import InvalidOption
    from lapwing_training.evaluation.transfer import evaluate_probe
    from lapwing_training.files import write_text
    from lapwing_training.report import html_transfer_report, transfer_report

    with failures("evaluate"):
        if out is not None and out.is_dir():
            raise InvalidOption(f"{out} is a directory; give the page to write with --out, such as {out / 'page.html'}")
        result = evaluate_probe(probe, store, resamples=resamples, seed=seed, seen_groups=seen_groups)
        for note in result["notes"]:
            print(f"lapwing evaluate: {note}", file=sys.stderr)
        text = transfer_report(result)
        if out is not None:
            write_text(out, html_transfer_report(result))
            text += f"\npage in {out}"
        tell(result, as_json, text)
