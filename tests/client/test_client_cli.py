"""The `lapwing` command: verbs, help, exit codes, missing extras."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

from lapwing_client import cli
from lapwing_client.errors import Unavailable

ROOT = Path(__file__).resolve().parents[2]


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, cli.GROUP)


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """Verbs of rooms that are complete, that lack something, and that fail."""
    (tmp_path / "room_of_tests.py").write_text(
        "import typer\n"
        "from lapwing_client.errors import Unavailable\n"
        "def greet(name: str, loud: bool = False) -> None:\n"
        "    '''Greet somebody.'''\n"
        "    print(name.upper() if loud else name)\n"
        "def lose() -> None:\n"
        "    raise Unavailable('nobody there')\n"
        "def late() -> None:\n"
        "    import no_such_module.part\n"
        "def leave() -> None:\n"
        "    raise typer.Exit(1)\n"
        "def misuse() -> None:\n"
        "    raise typer.BadParameter('give more')\n"
        "def fall() -> None:\n"
        "    raise ZeroDivisionError('a mistake of ours')\n"
        "def refuse() -> None:\n"
        "    from lapwing_detector.errors import ProbeMismatch\n"
        "    raise ProbeMismatch('fitted on another model')\n"
        "def stop() -> None:\n"
        "    raise KeyboardInterrupt\n"
    )
    for room in ("lapwing_server", "lapwing_training", "lapwing_detector"):
        (tmp_path / f"{room}_of_tests.py").write_text("import no_such_package.core\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("greet", "lose", "late", "leave", "misuse", "fall", "refuse", "stop")
    found = {name: entry(name, f"room_of_tests:{name}") for name in names}
    monkeypatch.setattr(cli, "entry_points", lambda group: found.values())
    return found


def test_a_verb_gets_its_arguments(verbs: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "lapwing", "--loud"]) == 0
    assert cli.main(["greet", "--loud", "--", "-x"]) == 0
    assert capsys.readouterr().out == "LAPWING\n-X\n"


def test_the_help_of_a_verb_is_its_own(verbs: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Greet somebody." in shown
    assert "Usage: lapwing greet" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lose"], 1, "lapwing lose: nobody there (the caller: check the address"),
        (["leave"], 1, ""),
        (["refuse"], 1, "lapwing refuse: fitted on another model"),
        (["stop"], 130, ""),
        (["misuse"], 2, "give more"),
        (["greet"], 2, "Missing argument"),
        (["greet", "a", "--lowd"], 2, "No such option"),
        (["grete", "a"], 2, "No such command"),
        ([], 2, ""),
    ],
)
def test_exit_codes(
    verbs: dict[str, EntryPoint], arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    assert words in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(verbs: dict[str, EntryPoint]) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["fall"])


@pytest.mark.parametrize(
    ("room", "extra"),
    [("lapwing_server", "server"), ("lapwing_training", "training"), ("lapwing_detector", "detector")],
)
def test_a_missing_package_names_its_extra(
    room: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.EXTRAS[room] == extra

    class Incomplete(EntryPoint):
        def load(self) -> object:
            raise ModuleNotFoundError("No module named 'sklearn.linear_model'", name="sklearn.linear_model")

    monkeypatch.setattr(cli, "entry_points", lambda group: [Incomplete("work", f"{room}.cli:work", group)])
    assert cli.main(["work"]) == 1
    assert capsys.readouterr().err == f"lapwing work: sklearn is not installed; pip install 'lapwing[{extra}]'\n"


def test_a_package_that_is_missed_only_while_running_is_named_too(
    verbs: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["late"]) == 1
    assert "no_such_module is missing from this installation" in capsys.readouterr().err


def test_without_an_installation_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert cli.main(["--help"]) == 1
    assert "pip install -e ." in capsys.readouterr().err


def test_every_verb_of_the_distribution_has_a_summary() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][cli.GROUP]
    assert set(declared) <= set(cli.SUMMARIES)
    assert all(len(summary) < 80 for summary in cli.SUMMARIES.values())
    rooms = {value.partition(".")[0] for value in declared.values()}
    assert rooms - {"lapwing_client"} <= set(cli.EXTRAS)


def test_the_help_lists_verbs_and_summaries_without_importing_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [entry("train", "no_such_room.cli:train"), entry("serve", "no_such_room.cli:serve"), entry("own", "x:y")]
    monkeypatch.setattr(cli, "entry_points", lambda group: found)
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "Serve scores over gRPC." in shown
    assert shown.index("serve") < shown.index("train") < shown.index("own"), "in the order of the work"


@pytest.mark.parametrize("command", [["-m", "lapwing_client"], ["-c", "from lapwing_client.cli import main; main()"]])
def test_the_command_works_as_a_module(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "lapwing" in done.stdout


def test_the_process_ends_with_the_code_of_the_verb() -> None:
    command = [sys.executable, "-m", "lapwing_client", "score", "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give either --prompt and --response, or --jsonl FILE" in done.stderr


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lapwing {version('lapwing')}\n"


def test_who_acts_is_part_of_what_people_read() -> None:
    assert Unavailable.who_acts.startswith("the caller")
