"""`lapwing probes`: what it does, what it says, and its exit codes."""

from __future__ import annotations

import json
import random
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from lapwing_client import cli
from lapwing_detector.registry import Registry
from tests.detector.registries import DAMAGES, a_revision, damage, sources

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (a_revision(number).revision for number in range(2))
BETA = a_revision(0, "beta").revision
SCORES = "it scores; a running server must be told to reload: Client.reload_probes()\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("saved")
    return [*sources(place, 2), *sources(place, 1, "beta")]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wide and without colours, and with a registry by the environment."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("LAPWING_REGISTRY", str(tmp_path / "registry"))


class Told:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def values(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    value = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lapwing.verbs"]["probes"]
    entry = EntryPoint("probes", value, cli.GROUP)

    def call(*arguments: object) -> Told:
        code = cli.call(entry, [str(argument) for argument in arguments])
        return Told(code, *capsys.readouterr())

    return call


def test_from_the_first_probe_to_the_last_step_back(run: Any, saved: list[Path], tmp_path: Path) -> None:
    told = run("publish", saved[0])
    assert (told.code, told.out) == (0, f"published alpha@{FIRST}\n{SCORES}")
    told = run("publish", saved[1])
    assert told.out.startswith(f"published alpha@{SECOND}\nto let it score: lapwing probes activate alpha@{SECOND}")
    assert run("publish", saved[1]).out.startswith(f"alpha@{SECOND} was published before\n")
    assert run("publish", saved[2], "--activate").out == f"published beta@{BETA}\n{SCORES}"
    assert run("list").out.split("\n")[1:3] == [
        f"alpha  {FIRST}          {SECOND}",
        f"beta   {BETA}  active",
    ]
    assert run("rollback").out.startswith(f"alpha@{FIRST} scores")
    assert run("activate", f"alpha@{SECOND}").out.startswith(f"alpha@{SECOND} scores")
    assert run("rollback", "alpha").out.startswith(f"alpha@{FIRST} scores")
    assert run("shadow", "beta").out == "shadows: beta\n"
    assert run("shadow", f"alpha@{SECOND}").out == f"shadows: beta alpha@{SECOND}\n"
    listed = run("list").out
    assert f"beta   {BETA}  shadow" in listed
    assert f"shadows of a revision of their own: alpha@{SECOND}" in listed
    assert run("shadow", "beta", "--off").out == f"shadows: alpha@{SECOND}\n"
    told = run("verify")
    assert (told.code, told.out.count("  ok\n")) == (0, 3)


def test_the_same_for_programs(run: Any, saved: list[Path]) -> None:
    assert run("publish", saved[0], "--json").values == {
        "name": "alpha",
        "revision": FIRST,
        "new": True,
        "active": True,
    }
    assert run("publish", saved[1], "--json").values["active"] is False
    run("publish", saved[2])
    changed = run("activate", f"alpha@{SECOND}", "--json").values
    assert changed == run("list", "--json").values
    assert changed["active"] == "alpha"
    assert changed["probes"][0] == {
        "name": "alpha",
        "revision": SECOND,
        "state": "active",
        "revisions": [SECOND, FIRST],
        "history": [FIRST],
    }
    assert run("rollback", "--json").values["probes"][0]["revision"] == FIRST
    assert run("shadow", "beta", "--json").values["shadows"] == ["beta"]
    assert [one["ok"] for one in run("verify", "--json").values] == [True] * 3


def test_a_damaged_revision_is_found(run: Any, saved: list[Path], tmp_path: Path) -> None:
    run("publish", saved[0])
    run("publish", saved[1])
    damage(tmp_path / "registry" / "alpha" / SECOND / "README.md", DAMAGES[0], random.Random(0))
    told = run("verify")
    assert told.code == 1
    assert told.out.startswith(
        f"alpha@{FIRST}  ok\nalpha@{SECOND}  revision {SECOND} of alpha is not what was published"
    )
    told = run("verify", "--json")
    assert [one["ok"] for one in json.loads(told.out)] == [True, False]
    told = run("activate", f"alpha@{SECOND}")
    assert (told.code, told.out) == (1, "")
    assert "README.md is not the file that was saved" in told.err


def test_what_is_gone_and_what_was_never_published_is_told_beside_the_list(
    run: Any, saved: list[Path], tmp_path: Path
) -> None:
    root = tmp_path / "registry"
    run("publish", saved[0])
    run("publish", saved[1])
    assert run("list").err == run("verify").err == ""
    (root / "alpha" / SECOND).rename(root / "alpha" / ("0" * 12))
    told = run("list")
    assert (told.code, told.out.count("\n")) == (0, 2)
    assert f"alpha/{SECOND} was published and is gone; publish the probe again" in told.err
    assert f"alpha/{'0' * 12} is not among what was published, so it never scores" in told.err
    assert run("list", "--json").values["active"] == "alpha"
    told = run("verify", "--json")
    assert (told.code, [one["ok"] for one in json.loads(told.out)]) == (1, [True, False])
    assert told.err.count("\n") == 1
    run("publish", saved[1])
    told = run("verify")
    assert (told.code, told.err.count("\n")) == (0, 1), "what never scores is no failure"


def test_a_registry_that_was_just_begun_says_what_is_next(run: Any, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / ".lock").touch()
    assert "lapwing probes publish PROBE --registry" in run("list").out
    told = run("rollback")
    assert (told.code, told.err) == (
        1,
        "lapwing probes: nothing was published yet, so there is nothing to go back to\n",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["activate", "gamma"], 1, "no probe is called 'gamma'; known are alpha"),
        (["activate", "alpha@" + "0" * 12], 1, f"no revision '{'0' * 12}'; known are {FIRST}"),
        (["rollback"], 1, "it has no other"),
        (["shadow", "alpha"], 1, "is the active probe"),
        (["publish", "./nowhere"], 1, "give the path that lapwing train wrote"),
        (["list", "--registry", "/nowhere"], 1, "begin one: lapwing probes publish"),
        (["activate", "Alpha"], 2, "neither NAME nor NAME@REVISION"),
        (["activate", "alpha@head"], 2, "neither NAME nor NAME@REVISION"),
        (["rollback", "../alpha"], 2, "neither NAME nor NAME@REVISION"),
        (["rollback", f"alpha@{FIRST}"], 2, f"or: lapwing probes activate alpha@{FIRST}"),
        (["activate"], 2, "Missing argument"),
        (["publsh"], 2, "No such command"),
        (["list", "--jsno"], 2, "No such option"),
    ],
)
def test_what_goes_wrong_says_how_to_mend_it(
    run: Any, saved: list[Path], arguments: list[str], code: int, said: str
) -> None:
    run("publish", saved[0])
    told = run(*arguments)
    assert (told.code, told.out) == (code, "")
    assert said in told.err


def test_without_a_registry_both_ways_to_name_one_are_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAPWING_REGISTRY")
    told = run("list")
    assert told.code == 2
    assert "--registry" in told.err
    assert "LAPWING_REGISTRY" in told.err


def test_a_registry_that_may_not_be_written_is_named(
    run: Any, saved: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("publish", saved[0])

    def refuse(registry: Registry, before: object, after: object) -> None:
        raise PermissionError(13, "Permission denied", "CURRENT")

    monkeypatch.setattr(Registry, "_put", refuse)
    told = run("publish", saved[1])
    assert (told.code, told.out) == (1, "")
    assert "Permission denied: 'CURRENT'" in told.err


@pytest.mark.parametrize("verb", ["publish", "list", "activate", "rollback", "shadow", "verify"])
def test_every_help_has_an_example(run: Any, verb: str) -> None:
    told = run(verb, "--help")
    assert told.code == 0
    assert f"Example: lapwing probes {verb}" in told.out
    assert f"Usage: lapwing probes {verb}" in told.out


def test_the_help_of_all_shows_them(run: Any) -> None:
    shown = run("--help").out
    assert all(verb in shown for verb in ("publish", "list", "activate", "rollback", "shadow", "verify"))
    assert "Example: lapwing probes publish" in shown
