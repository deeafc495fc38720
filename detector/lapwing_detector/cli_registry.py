"""The verb `lapwing probes`: a registry of probes, in steps that can be undone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lapwing_detector.registry_current import Current
    from lapwing_detector.registry_strays import Stray

probes = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep probes in a registry: publish revisions, say which one scores, go back.\n\n"
    "A registry is a directory that `lapwing serve --probes ROOT` reads. A revision is copied into it whole or not at "
    "all, and never changed; what is in force changes in one step. Running servers take changes over when they are "
    "told to reload.\n\n"
    "Example: lapwing probes publish my-probe --registry /srv/probes --activate",
)

SCORES = "scores; a running server must be told to reload: Client.reload_probes()"

Root = Annotated[
    Path, typer.Option("--registry", envvar="LAPWING_REGISTRY", help="Directory of the registry.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reference = Annotated[str, typer.Argument(metavar="NAME[@REVISION]", help="A published probe.", show_default=False)]


@probes.command()
def publish(
    probe: Annotated[str, typer.Argument(help="Directory that lapwing train wrote, or an id of the Hugging Face Hub.")],
    registry: Root,
    activate: Annotated[bool, typer.Option("--activate", help="Let it score from now on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a probe into the registry; makes the registry if there is none.

    Its name stands for the new revision from now on. Only the active probe goes on with the revision that it has until
    another one is activated. The first probe of a registry becomes the active one.

    Example: lapwing probes publish my-probe --registry /srv/probes
    """
    from lapwing_detector.registry import Registry

    done = Registry(registry).publish(probe, activate=activate)
    shown = f"{done.name}@{done.revision}"
    scores = (done.name, done.revision) == done.current.resolve(done.current.active)
    if as_json:
        print(json.dumps({"name": done.name, "revision": done.revision, "new": done.new, "active": scores}))
        return
    print(f"published {shown}" if done.new else f"{shown} was published before")
    print(f"it {SCORES}" if scores else f"to let it score: lapwing probes activate {shown} --registry {registry}")


@probes.command("list")
def list_(registry: Root, as_json: AsJson = False) -> None:
    """Show the probes, the revisions that their names stand for, and which of them score.

    What is gone, and what lies there without ever having been published, is told on standard error.

    Example: lapwing probes list --registry /srv/probes
    """
    from lapwing_detector.registry import Registry

    opened = Registry(registry)
    current = opened.current()
    note([*opened.missing(), *opened.strays()])
    if as_json:
        print(json.dumps(described(current)))
        return
    if not current.published:
        print(f"no probe was published yet: lapwing probes publish PROBE --registry {registry}")
        return
    rows = [("PROBE", "REVISION", "STATE", "OTHER REVISIONS, NEWEST FIRST")]
    for probe in described(current)["probes"]:
        others = " ".join(one for one in probe["revisions"] if one != probe["revision"])
        rows.append((probe["name"], probe["revision"], probe["state"], others))
    width = max(len(row[0]) for row in rows)
    print(
        "\n".join(
            f"{name:{width}}  {revision:12}  {state:6}  {others}".rstrip() for name, revision, state, others in rows
        )
    )
    pinned = [shadow for shadow in current.shadows if "@" in shadow]
    if pinned:
        print(f"shadows of a revision of their own: {' '.join(pinned)}")


@probes.command()
def activate(probe: Reference, registry: Root, as_json: AsJson = False) -> None:
    """Let a probe score from now on; without a revision, the one that its name stands for.

    Example: lapwing probes activate my-probe@0123456789ab --registry /srv/probes
    """
    from lapwing_detector.registry import Registry

    name, revision = parsed(probe)
    opened = Registry(registry)
    opened.activate(name, revision)
    tell(opened.current(), as_json)


@probes.command()
def rollback(
    registry: Root,
    name: Annotated[str, typer.Argument(help="Go back to the revision that this name stood for before.")] = "",
    as_json: AsJson = False,
) -> None:
    """Undo the last change: what scored before scores again. With a name, only its revision changes.

    Example: lapwing probes rollback --registry /srv/probes
    """
    from lapwing_detector.registry import Registry

    if name and parsed(name)[1] is not None:
        raise typer.BadParameter(f"{name} has a revision; give the name alone, or: lapwing probes activate {name}")
    tell(Registry(registry).rollback(name or None), as_json, name)


@probes.command()
def shadow(
    probe: Reference,
    registry: Root,
    off: Annotated[bool, typer.Option("--off", help="End it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a probe score beside the active one, where only the metrics of a server show it.

    Example: lapwing probes shadow my-probe@0123456789ab --registry /srv/probes
    """
    from lapwing_detector.registry import Registry

    current = Registry(registry).shadow(*parsed(probe), on=not off)
    if as_json:
        print(json.dumps(described(current)))
    else:
        print(f"shadows: {' '.join(current.shadows) or 'none'}")


@probes.command()
def verify(registry: Root, as_json: AsJson = False) -> None:
    """Load every revision and say which are not what was published. Exit code 1 if there is one.

    What lies there without ever having been published, and so never scores, is told on standard error.

    Example: lapwing probes verify --registry /srv/probes
    """
    from lapwing_detector.registry import Registry

    opened = Registry(registry)
    verdicts = opened.verify()
    note(opened.strays())
    if as_json:
        print(json.dumps([vars(verdict) | {"ok": not verdict.reason} for verdict in verdicts]))
    else:
        for verdict in verdicts:
            print(f"{verdict.name}@{verdict.revision}  {verdict.reason or 'ok'}")
    if any(verdict.reason for verdict in verdicts):
        raise typer.Exit(1)


def parsed(text: str) -> tuple[str, str | None]:
    """Name and revision; misuse where they are none."""
    from lapwing_detector.errors import InvalidInput
    from lapwing_detector.registry_current import reference

    try:
        return reference(text)
    except InvalidInput as error:
        raise typer.BadParameter(error.reason) from error


def note(strays: Iterable[Stray]) -> None:
    """What somebody should look at."""
    for stray in strays:
        print(f"{stray.path} {stray.reason}", file=sys.stderr)


def tell(current: Current, as_json: bool, name: str = "") -> None:
    """What a name stands for now; the active one without a name."""
    if as_json:
        print(json.dumps(described(current)))
    elif name and name != current.active:
        print(f"{name} stands for {current.revisions[name]}")
    else:
        print(f"{current.active}@{current.revisions[current.active]} {SCORES}")


def described(current: Current) -> dict[str, Any]:
    """A registry as JSON values."""
    shadows = current.shadow_references
    return {
        "active": current.active,
        "shadows": list(current.shadows),
        "probes": [
            {
                "name": name,
                "revision": revision,
                "state": "active" if name == current.active else "shadow" if (name, revision) in shadows else "",
                "revisions": list(current.newest_first(name)),
                "history": list(current.history.get(name, ())),
            }
            for name, revision in sorted(current.revisions.items())
        ],
    }
