"""The verb `lapwing demo`: the main job from one end to the other, with what is embedded.

It starts the server as its own process and talks to it as any client does; models and arrays stay over there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from lapwing_client import demo_report as report
from lapwing_client.client import Client
from lapwing_client.demo_report import Asked
from lapwing_client.local_server import SELF, ServerFailed, running_server
from lapwing_client.results import Detection, GeneratedToken, Generation, Probe

FALSE_POSITIVE_RATE = 0.10
READY_SECONDS = 120.0


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the heatmaps.")] = Path("lapwing-demo"),
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="First make all of it again from nothing (half an hour).",
        ),
    ] = False,
    into: Annotated[Path, typer.Option(help="Where --rebuild writes; it goes on after a kill.")] = Path(
        "lapwing-atlas"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Watch a small language model being scored while it answers, and look at the heads that give it away.

    Starts a server with the embedded model, asks it twelve questions through Generate, scores given answers through
    Score, prints how good the probe is beside its baselines, and draws the heatmaps. Takes less than a minute.

    Example: lapwing demo --out pictures
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(f"{out} can't be written to")
        atlas = rebuilt(into) if rebuild else None
        asked, given, probe, selected = interview(atlas)
        if as_json:
            print(json.dumps(as_values(asked, given, probe)))
        else:
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # where bars can't be printed
            print(report.answers(asked, given, FALSE_POSITIVE_RATE))
            print(report.quality(probe), flush=True)
        (out / "selected_heads.png").write_bytes(selected)
        source = ["--probe", str(atlas / "probe")] if atlas else []
        run((*SELF, "heatmap", "--statistic", "P_VALUE", "--out", str(out / "p_values.png"), *source), "drawing")
    except (ServerFailed, OSError) as error:
        print(f"lapwing demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if not as_json:
        print("Heatmaps (x = head, y = layer; a low p-value marks a head that tells made-up answers from others):")
        print(f"  {out / 'p_values.png'}\n  {out / 'selected_heads.png'}")


def rebuilt(into: Path) -> Path:
    """Makes Atlas again; where it lies."""
    run((sys.executable, "-m", "lapwing_training.atlas", "--into", str(into)), "making Atlas again")
    return into


def interview(atlas: Path | None) -> tuple[list[Asked], list[Asked], Probe, bytes]:
    """Questions and given answers with their scores, the probe that scored, and the picture of the heads it reads."""
    serve = ["--model", str(atlas / "model"), "--probes", str(atlas / "probe")] if atlas else []
    questions = demo_questions(atlas)
    progress(f"starting a server with {atlas or 'the embedded model'}")
    with running_server(serve) as address, Client(address) as client:
        wait_until_ready(client)
        asked = [ask(client, question) for question in counted("questions", questions["questions"])]
        given = [check(client, text) for text in counted("given answers", questions["texts"])]
        probe = client.probe()
        selected = client.heatmap(feature=probe.features[0], statistic="SELECTED", image="png")
    return asked, given, probe, selected.image


def ask(client: Client, question: Mapping[str, Any]) -> Asked:
    """Lets the server's model answer, with the running probability of every token."""
    trail: list[float] = []
    generation: Generation | None = None
    stream = client.generate(question["prompt"], max_new_tokens=24, false_positive_rate=FALSE_POSITIVE_RATE)
    for event in stream:
        if isinstance(event, GeneratedToken):
            trail += [] if event.probability is None else [event.probability]
        else:
            generation = event
    if generation is None:
        raise ServerFailed("the stream ended without its last event; run the demo again")
    answer = generation.text.strip()
    return judged(question, answer, question["seen"], tuple(trail), generation.detection)


def check(client: Client, text: Mapping[str, Any]) -> Asked:
    """Scores an answer that is given."""
    detection = client.score(text["prompt"], text["response"], false_positive_rate=FALSE_POSITIVE_RATE)
    return judged(text, text["response"], None, (), detection)


def judged(
    item: Mapping[str, Any], answer: str, seen: bool | None, trail: tuple[float, ...], detection: Detection
) -> Asked:
    """An answer beside the truth. The demo's answers are names, so that comparing them folds case and dots only."""
    accepted = {folded(other) for other in item["accepted"]}
    return Asked(item["question"], answer, item["truth"], folded(answer) not in accepted, seen, trail, detection)


def folded(text: str) -> str:
    """Case, outer spaces and the last dot folded away."""
    return " ".join(text.casefold().split()).removesuffix(".")


def demo_questions(atlas: Path | None) -> Any:
    """The questions that ship with the package, or those of a rebuilt Atlas."""
    place = files("lapwing_client").joinpath("demo_questions.json") if atlas is None else atlas / "demo_questions.json"
    return json.loads(place.read_text(encoding="utf-8"))


def as_values(asked: Sequence[Asked], given: Sequence[Asked], probe: Probe) -> dict[str, Any]:
    """Everything as JSON values."""
    return {
        "asked": [vars(one) | {"detection": one.detection.to_dict()} for one in asked],
        "given": [vars(one) | {"detection": one.detection.to_dict()} for one in given],
        "metrics": probe.metrics,
    }


def wait_until_ready(client: Client) -> None:
    """Until the model is loaded and warm."""
    info = client.wait_until_ready(READY_SECONDS)
    name = info.model.name if info.model else "a model"
    progress(f"{name} is ready, probe {info.probe_name} {info.probe_revision}")


def run(command: Sequence[str], what: str) -> None:
    """Runs another verb; its progress goes to standard error."""
    progress(what)
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        print(f"lapwing demo: {what} failed with exit code {done.returncode}; see above", file=sys.stderr)
        raise typer.Exit(1)


def progress(text: str) -> None:
    """One line for whoever waits."""
    print(f"… {text}", file=sys.stderr, flush=True)


def counted(label: str, items: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The items one by one, with a progress bar on the terminal."""
    with typer.progressbar(items, label=f"… {label}", file=sys.stderr, show_eta=False) as bar:
        yield from bar
