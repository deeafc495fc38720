"""The verb `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lapwing_training.cli.common import AsJson, failures, tell


def merge(
    stores: Annotated[list[Path], typer.Argument(help="Finished feature stores of the same model and features.")],
    out: Annotated[Path, typer.Option(help="Directory of the store that holds the items of all.")],
    as_json: AsJson = False,
) -> None:
    """Put feature stores of several machines together; goes on where it was killed.

    They must come from the same model, with the same features, k and stages, and share no item.

    Next: lapwing inspect, lapwing train.

    Example: lapwing merge store-1 store-2 store-3 --out store
    """
    from lapwing_training.store.merge import merge_stores

    with failures("merge"):
        result = merge_stores(stores, out)
        tell(result, as_json, f"{result['items']} items of {result['stores']} stores in {out}")
