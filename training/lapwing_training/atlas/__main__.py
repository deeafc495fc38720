"""`python -m lapwing_training.atlas`: makes Atlas again; `lapwing demo --rebuild` calls it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    into: Annotated[Path, typer.Option(help="Where everything is written; a build that was killed goes on.")] = Path(
        "lapwing-atlas"
    ),
    until: Annotated[str, typer.Option(help="Last stage: model, generations, store or probe.")] = "probe",
) -> None:
    """Make the embedded model, its generations and its probe again from nothing (about half an hour on 2 cores)."""
    try:
        from lapwing_training.atlas.build import STAGES, RatesOff, build
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed; pip install 'lapwing[atlas]'", file=sys.stderr)
        raise typer.Exit(1) from error
    if until not in STAGES:
        raise typer.BadParameter(f"is {until!r}; stages are {', '.join(STAGES)}", param_hint="--until")
    try:
        build(into, until=until)
    except RatesOff as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
