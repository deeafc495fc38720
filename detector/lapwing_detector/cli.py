"""The detector's verbs: `lapwing heatmap`, `lapwing doctor`; nothing heavy is loaded before one is called."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lapwing_detector.doctor.examination import Diagnosis
    from lapwing_detector.head_map import HeadMap
    from lapwing_detector.language_model import LanguageModel

IN_PYTHON = 'capture_attention(model, fallback="eager")'
"""How a refused model is told of the fallback."""


def heatmap(
    probe: Annotated[str, typer.Option(help="Probe directory or Hub id; the embedded probe without it.")] = "",
    statistic: Annotated[
        str, typer.Option(help="P_VALUE, Q_VALUE, AUROC, EFFECT_SIZE, HEAD_PROBE, WEIGHT or SELECTED.")
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


def doctor(
    model: Annotated[str, typer.Argument(help="Hub id or directory; the embedded Atlas without it.")] = "",
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; as stored without it, but float32 for float16 on a CPU."),
    ] = "",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    fallback: Annotated[
        str, typer.Option(help="eager: let layers make whole maps where they can't be captured otherwise.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Measure no time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Check a model before anyone relies on what is captured of its attention.

    Which layers are captured; whether that is what the model's own eager attention gives, alone, in a padded batch
    and while generating; whether one BOS token stands in front; what memory and time long texts will take; and what
    capturing costs on this machine. Time differs from run to run and decides nothing.

    Exit code 1 if something is wrong, or the model can't be loaded or captured.

    Example: lapwing doctor meta-llama/Llama-3.1-8B --device cuda --dtype bfloat16
    """
    from lapwing_detector.doctor.report import as_json as to_json
    from lapwing_detector.doctor.report import table
    from lapwing_detector.errors import DetectorError
    from lapwing_detector.language_model import DTYPES, LanguageModel

    if dtype and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is {dtype!r}; known are {', '.join(DTYPES)}")
    if fallback not in ("", "eager"):
        raise typer.BadParameter(f"--fallback is {fallback!r}; known is eager")
    require_device(device)
    try:
        loaded = LanguageModel.load(model or None, dtype=dtype or None, device=device)
    except DetectorError as error:
        print(f"lapwing doctor: {error}", file=sys.stderr)
        if as_json:
            print(json.dumps({"ok": False, "skipped": [], "model": {"name": model}, "error": str(error), "checks": {}}))
        raise typer.Exit(1) from error
    diagnosis = in_the_shell(diagnosed(loaded, eager=bool(fallback), quick=quick), model)
    print(to_json(diagnosis) if as_json else table(diagnosis))
    if diagnosis.wrong:
        raise typer.Exit(1)


def require_device(device: str) -> None:
    """Misuse where this machine has no such device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        said = (str(error).splitlines() or [""])[0]
        raise typer.BadParameter(f"--device is {device!r}, which can't be used here: {said}") from error


def diagnosed(loaded: LanguageModel, *, eager: bool, quick: bool) -> Diagnosis:
    """With a bar once it takes longer than a person waits without one."""
    from tqdm import tqdm

    from lapwing_detector.doctor.examination import examine, looks

    # It counts what is finished, and hears of what begins: so from -1.
    with tqdm(total=len(looks(quick)), initial=-1, desc="doctor", unit="check", delay=2.0, leave=False) as progress:

        def begin(name: str) -> None:
            progress.set_postfix_str(name, refresh=False)
            progress.update()

        return examine(loaded, fallback="eager" if eager else None, quick=quick, begin=begin)


def in_the_shell(diagnosis: Diagnosis, model: str) -> Diagnosis:
    """What a refusal tells those who write Python to do, for those who type commands."""
    typed = " ".join(["lapwing doctor", *([shlex.quote(model)] if model else []), "--fallback eager"])
    checks = tuple(replace(check, said=check.said.replace(IN_PYTHON, typed)) for check in diagnosis.checks)
    return replace(diagnosis, checks=checks)


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
