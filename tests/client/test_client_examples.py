"""The examples, each run as its reader runs it, against a server that is there already."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fakes import FakeEngine, Running
from wire_server import WireServer

EXAMPLES = Path(__file__).resolve().parents[2] / "client" / "examples"
HERE = {"live_generation", "many_answers", "async_generation"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running(FakeEngine()) as running:
        yield running


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_example_is_run_by_a_test() -> None:
    """`own_model` needs a model, and is run by the server's tests."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == HERE | {"own_model"}
    assert "own_model.py" in (Path(__file__).parents[1] / "server" / "test_server_attention_real.py").read_text()


def test_live_generation(server: Running) -> None:
    *tokens, last = lines(run("live_generation", server.target))
    assert len(tokens) == 24
    assert all(re.fullmatch(r" *\d+% #* +'[A-Z]'", line) for line in tokens)
    assert re.fullmatch(r"LENGTH: '[A-Z]{24}' is made up with probability \d+%", last)


def test_live_generation_stops_what_is_probably_made_up(server: Running) -> None:
    *tokens, last = lines(run("live_generation", server.target, "hello\\nthere", "--stop-above", "0.01"))
    assert len(tokens) == 3
    assert last.startswith("FLAGGED: 'ABC' is made up with probability")


def test_many_answers(server: Running) -> None:
    *doubtful, last = lines(run("many_answers", server.target))
    assert last == "24 scored, 0 not"
    assert len(doubtful) == 5
    shares = [int(line.split("%")[0]) for line in doubtful]
    assert shares == sorted(shares, reverse=True)
    assert re.fullmatch(r" *\d+%  Question: which country is the city of \w+ in\? Answer: \w+", doubtful[0])


def test_async_generation(server: Running) -> None:
    found = lines(run("async_generation", server.target))
    assert [line.split(":")[0] for line in found] == ["Lyon", "Bergen", "Kyoto", "Cusco"]
    assert all(re.search(r"'[A-Z]{24}' is made up with probability \d+%$", line) for line in found)


def test_an_example_without_a_server_says_so() -> None:
    with WireServer() as gone:
        target = gone.target
    done = run("live_generation", target)
    assert done.returncode == 1
    assert f"no Lapwing server answers at {target}" in done.stderr


def asked_as_taught(text: str) -> bool:
    """Whether a question is put as those of the demo are, which the embedded model answers."""
    demo = json.loads((EXAMPLES.parent / "lapwing_client" / "demo_questions.json").read_text())
    taught = {question["prompt"].partition(" of ")[0] for question in demo["questions"]}
    asked = re.findall(r"Question:[^\"]*", text)
    return bool(asked) and all(question.partition(" of ")[0] in taught for question in asked)


def test_the_examples_ask_as_the_embedded_model_was_taught() -> None:
    assert all(asked_as_taught(path.read_text()) for path in EXAMPLES.glob("*.py"))
    assert not asked_as_taught('"Question: In which country is Bergen?"'), "control"


def test_the_examples_say_how_they_are_started() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert f"python client/examples/{path.name}" in path.read_text().split('"""')[1]
