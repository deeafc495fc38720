"""The `lapwing` command: finds the verbs of every installed room and imports one only when it is called."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer

from lapwing_client.errors import LapwingError

GROUP = "lapwing.verbs"

SUMMARIES = {
    "demo": "Run the whole thing: a model that makes things up, caught in the act.",
    "score": "Score responses with a running server.",
    "serve": "Serve scores over gRPC.",
    "token": "Make a token for a server.",
    "heatmap": "Draw which attention heads a probe uses, and why.",
    "doctor": "Check a model before anyone relies on what is captured of it.",
    "probes": "Keep probes in a registry: publish, activate, roll back.",
    "generate": "Let a model answer questions, for training a probe.",
    "import": "Bring labelled answers of others into our form.",
    "label": "Label generated answers as right or made up.",
    "extract": "Compute the attention features of labelled answers.",
    "inspect": "Say what is in a feature store, and whether it is whole.",
    "merge": "Join the feature stores that several machines made.",
    "train": "Select heads, fit and calibrate a probe.",
    "evaluate": "Measure a probe on held-out answers.",
}
"""One line for each verb, here so that the help need not import them. A verb that is not listed shows without one."""

EXTRAS = {"lapwing_detector": "detector", "lapwing_server": "server", "lapwing_training": "training"}
"""Which extra brings what a package needs; the client needs none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: without the command's own name; those of the process without it.

    Returns:
        0 well, 1 failed, 2 misused, 130 stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not verbs:
        print("lapwing is not installed, so it has no verbs; run: pip install -e .", file=sys.stderr)
        return 1
    if given and given[0] in verbs:
        return call(verbs[given[0]], given[1:])
    return run(overview(verbs), given, "lapwing")


def overview(verbs: Collection[str]) -> typer.Typer:
    """The command without a verb: shows them all by name and summary, and what was mistyped."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def lapwing(
        shown: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print the version and end.")
        ] = False,
    ) -> None:
        """Tells, while a language model is still writing, how likely it is that what it writes is made up."""

    for name in sorted(verbs, key=[*SUMMARIES, *verbs].index):
        app.command(name, help=SUMMARIES.get(name))(lambda: None)
    return app


def show_version(asked: bool) -> None:
    """Prints the version, and ends."""
    if asked:
        print(f"lapwing {version('lapwing')}")
        raise typer.Exit


def call(entry: EntryPoint, arguments: list[str]) -> int:
    """Imports the verb and runs it; returns the exit code."""
    try:
        code = run(application(entry.load()), arguments, f"lapwing {entry.name}")
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        print(f"lapwing {entry.name}: {how_to_mend(entry, missing)}", file=sys.stderr)
        return 1
    except LapwingError as error:
        print(f"lapwing {entry.name}: {error} ({error.who_acts})", file=sys.stderr)
        return 1
    except OSError as error:  # a file or pipe that can't be read or written: nothing that a traceback would explain
        drop_unwritten()
        print(f"lapwing {entry.name}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not speaks_for_itself(error):
            raise
        print(f"lapwing {entry.name}: {error}", file=sys.stderr)
        return 1


def application(verb: Callable[..., Any] | typer.Typer) -> typer.Typer:
    """A verb as an application: a function is its only command, a verb with commands of its own is one already."""
    if isinstance(verb, typer.Typer):
        app = verb
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(verb)
    for command in app.registered_commands:
        command.help = command.help or prose(inspect.getdoc(command.callback) or "")
    return app


def prose(text: str) -> str:
    """The text for typer, which would keep its line breaks and take [[what is in brackets]] for its own markup."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return re.sub(r"\[(?=[a-z#/@])", r"\[", "\n\n".join(paragraphs))


def run(app: typer.Typer, arguments: list[str], name: str) -> int:
    """Runs a typer application without ending the process."""
    try:
        app(arguments, prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def drop_unwritten() -> None:
    """Writes what standard output still holds or, where that fails, drops it: Python tries again at its very end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def how_to_mend(entry: EntryPoint, missing: str) -> str:
    """What to install so that the verb can be imported."""
    extra = EXTRAS.get(entry.module.partition(".")[0])
    if extra is None or missing.startswith("lapwing"):
        return f"{missing or entry.module} is missing from this installation; install lapwing again"
    return f"{missing} is not installed; pip install 'lapwing[{extra}]'"


def speaks_for_itself(error: Exception) -> bool:
    """Whether the text of the error, without its traceback, says what to do: the detector's errors do."""
    module = sys.modules.get("lapwing_detector.errors")
    return module is not None and isinstance(error, module.DetectorError)
