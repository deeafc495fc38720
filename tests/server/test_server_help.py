"""The help of `lapwing serve` and `lapwing token`: every flag, every default, whole sentences."""

from __future__ import annotations

import itertools
import re

import pytest
from pydantic.fields import FieldInfo

from lapwing_client.cli import main
from lapwing_server import flags
from lapwing_server.setting_names import flag, settable
from lapwing_server.settings import Settings


def test_every_setting_has_a_flag_with_a_help_and_a_section() -> None:
    parameters = {name: flags.parameter((name, info)) for name, info in settable(Settings).items()}
    texts = [parameter.annotation.__metadata__[0].help for parameter in parameters.values()]
    assert all(texts)
    listed = [name for names in flags.SECTIONS.values() for name in names]
    assert sorted([*listed, *(name for name in parameters if name.startswith("limits."))]) == sorted(parameters)


def test_the_help_names_every_flag_and_says_which_source_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["serve", "--help"]) == 0
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert [name for name in settable(Settings) if flag(name) not in said] == []
    assert "the first one wins" in said


def help_of(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The help as lines of text, without its frames."""
    monkeypatch.setenv("COLUMNS", "200")
    assert main([verb, "--help"]) == 0
    return re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)


def test_the_help_says_each_default_and_no_default_where_there_is_none() -> None:
    for name, info in settable(Settings).items():
        said = flags.parameter((name, info)).annotation.__metadata__[0].help
        assert said.endswith(f" Default: {info.default}.") == (info.default not in (None, False)), name


def test_a_default_of_0_is_told() -> None:
    assert flags.help_of(FieldInfo(annotation=int, default=0, description="How many.")) == "How many. Default: 0."


@pytest.mark.parametrize("verb", ["serve", "token"])
def test_sentences_of_the_help_are_broken_only_where_the_terminal_ends(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line ends in the middle of a sentence with room for the next word."""
    lines = [line.rstrip() for line in help_of(verb, monkeypatch, capsys).splitlines()]
    prose = lines[: next(i for i, line in enumerate(lines) if line.split()[:1] in (["Options"], ["Arguments"]))]
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip():
            assert len(line) + 1 + len(following.split()[0]) >= 200, line


def test_the_help_of_tokens_names_the_heading_of_certificates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "under the heading [[certificates]]." in " ".join(help_of("token", monkeypatch, capsys).split())
