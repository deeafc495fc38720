"""The verb `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lapwing_training.cli.common import AsJson, failures, tell


def inspect(
    store: Annotated[Path, typer.Argument(help="Feature store from lapwing extract, generate or merge.")],
    as_json: AsJson = False,
) -> None:
    """Show what a feature store holds: model, features, items, labels, lengths, and whether every file is whole.

    Status 1 when a file is damaged or missing.

    Example: lapwing inspect store
    """
    from lapwing_training.store.inspect import describe, inspect_store

    with failures("inspect"):
        found = inspect_store(store)
        tell(found, as_json, describe(found))
        if not found["whole"]:
            raise typer.Exit(1)
