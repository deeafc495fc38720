"""Options and rows that a probe is trained with in no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer
from training_fakes import LAPLACIAN, make_table
from typer.testing import CliRunner, Result

from lapwing_training.probe.train import TrainOptions
from lapwing_training.store.table import Table

NESTED = TrainOptions(features=(LAPLACIAN,), resamples=50)
SHARE = 0.35
FAST = replace(NESTED, test_share=SHARE)


def rows_of_the_store() -> Table:
    return make_table(rows=400, planted=(2, 9), strength=0.8, per_group=2)


def predictions(trained: Path) -> dict[str, dict[str, object]]:
    lines = (trained / "predictions.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def run(verb: Callable[..., None], *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
