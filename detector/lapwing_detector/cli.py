"""The detector's verbs: `lapwing heatmap`. Loads no model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lapwing_detector.head_map import HeadMap


def heatmap(
    probe: Annotated[str, typer.Option(help="Probe directory or Hub id; the embedded probe without it.")] = "",
    statistic: Annotated[
        str, typer.Option(help="P_VALUE, Q_VALUE, AUROC, EFFECT_SIZE, WEIGHT or SELECTED.")
    ] = "P_VALUE",
    feature: Annotated[
        str,
        typer.Option(help="Such as laplacian_eigenvalues; without it AttnScore and Laplacian side by side."),
    ] = "",
    out: Annotated[Path, typer.Option(help="Picture to write; .png or .svg.")] = Path("heatmap.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrices as JSON instead of drawing.")] = False,
) -> None:
    """Draw a layers x heads map of what the training found.

    A low p-value marks a head that separates made-up answers from right ones; the bright cells of a p-value map
    are the heads without signal.

    Example: lapwing heatmap --probe my-probe --statistic AUROC --out auroc.png
    """
    from lapwing_detector import embedded
    from lapwing_detector.errors import DetectorError
    from lapwing_detector.head_map import STATISTICS, figure_bytes
    from lapwing_detector.pictures import PAIR, draw
    from lapwing_detector.probe import Probe

    name, format = statistic.upper(), out.suffix.lstrip(".").lower()
    if name not in STATISTICS:
        raise typer.BadParameter(f"{statistic!r} is not known; known are {', '.join(STATISTICS)}")
    if format not in ("png", "svg") and not as_json:
        raise typer.BadParameter(f"--out is {str(out)!r}; its name must end in .png or .svg")
    shown = [full_name(feature)] if feature else list(PAIR)
    try:
        loaded = Probe.from_pretrained(probe or embedded.probe_path())
        if as_json:
            print(json.dumps([described(loaded.head_map(id, name)) for id in shown]))
            return
        picture = figure_bytes(draw(loaded, name, shown), format)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
    except (DetectorError, ValueError, OSError) as error:
        print(f"lapwing heatmap: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"wrote {out}", file=sys.stderr)


def full_name(feature: str) -> str:
    """A feature's id also for those who leave out the version."""
    return feature if "." in feature else f"{feature}.v1"


def described(head_map: HeadMap) -> dict[str, Any]:
    """A map as JSON values."""
    return {
        "feature": head_map.feature,
        "statistic": head_map.statistic,
        "layers": list(head_map.layers),
        "values": head_map.values.tolist(),
    }
