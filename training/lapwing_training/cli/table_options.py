"""What the verbs that read other people's tables share."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str, typer.Option(help="Configuration of a data set that has several.")]
SplitName = Annotated[str, typer.Option(help="Split of a data set that has several.")]


def column_names(text: str) -> tuple[str, ...]:
    """Names from a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
