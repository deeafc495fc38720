"""A probe on another store, told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from report_fakes import ALLOWED, HOSTILE, Page, estimate, full_metrics, in_ascii, parsed
from training_fakes import LAPLACIAN
from typer.testing import CliRunner

from lapwing_training.cli.evaluate import evaluate
from lapwing_training.evaluation import transfer
from lapwing_training.report import (
    html_transfer_report,
    transfer_report,
)


def test_a_transfer_says_what_changed() -> None:
    metrics = full_metrics()
    result = {
        "probe": "mine",
        "revision": "0" * 12,
        "store": HOSTILE[0],
        "seen_groups_left_out": 3,
        **{key: metrics[key] for key in ("test", "comparison", "strata", "thresholds", "paired")},
        "log_probability_missing": 2,
    }
    assert "What changed" not in transfer_report(result)
    shift = {"slope": 1.0, "intercept": 0.5}
    result["drift"] = {
        "base_rate": {"before": 0.4, "here": 0.2},
        "auroc": {"before": estimate(0.78), "here": estimate(0.7), "change": estimate(-0.08)},
        "length": {"distance": 0.4, "p_value": 1e-9, "median_before": 12.0, "median_here": 30.0},
        "calibration": {"before": shift, "here": shift, "ece_before": estimate(0.1), "ece_here": None},
        "heads": {
            "tested": 5,
            "drifted": 2,
            "list": [
                {"feature": LAPLACIAN, "layer": 3, "head": 1, "distance": 0.5, "p_value": 1e-12, "q_value": 5e-12}
            ],
        },
    }
    page = Page(html_transfer_report(result))
    assert page.tags <= ALLOWED
    for text in (in_ascii(page), parsed(transfer_report(result)).text):
        for finding in (
            "AUROC .780 (.750 to .810) before, .700 (.670 to .730) here: -.080 (-.110 to -.050).",
            "Hallucinated: 40.0% before, 20.0% here.",
            "median 12 tokens before, 30 here",
            "Of 5 numbers that the probe reads of its heads, 2 are distributed otherwise here",
            "layer 3 head 1, Laplacian eigenvalues",
            "2 rows have no log-probability",
            HOSTILE[0],
        ):
            assert finding in text, finding


def transferred(**changes: Any) -> dict[str, Any]:
    """What `evaluate_probe` gives, without drift."""
    metrics = full_metrics()
    kept = {key: metrics[key] for key in ("test", "comparison", "strata", "thresholds", "paired")}
    about = {"probe": "mine", "revision": "0" * 12, "store": "other", "seen_groups_left_out": 3, "notes": []}
    return {**about, **kept, "log_probability_missing": 2} | changes


def test_evaluate_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def judged(*arguments: object, **options: object) -> dict[str, Any]:
        asked.append(arguments)
        return transferred()

    monkeypatch.setattr(transfer, "evaluate_probe", judged)
    app = typer.Typer()
    app.command()(evaluate)
    path = tmp_path / "new" / "page.html"
    plain = CliRunner().invoke(app, ["probe", "store", "--out", str(path)])
    assert (plain.exit_code, plain.stdout.splitlines()[-1]) == (0, f"page in {path}")
    assert path.read_text(encoding="utf-8") == html_transfer_report(transferred())
    told = CliRunner().invoke(app, ["probe", "store", "--out", str(path), "--json"])
    assert json.loads(told.stdout) == transferred()
    assert list(path.parent.iterdir()) == [path]
    refused = CliRunner().invoke(app, ["probe", "store", "--out", str(tmp_path)])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{tmp_path} is a directory" in refused.stderr
    assert len(asked) == 2  # it is refused before anything is judged
