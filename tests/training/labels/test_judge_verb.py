"""The verb `label` with a judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from judge_fakes import command, generation, generations, run
from judge_server import JudgeServer

from lapwing_training.data.generations import read_generations, write_generations

pytestmark = pytest.mark.usefixtures("judge_surroundings")


def test_the_published_rule_asks_only_where_it_must_and_drops_what_it_cannot_believe(
    server: JudgeServer, tmp_path: Path
) -> None:
    sure = generation("sure", response="the PARIS!")
    long = ("one two three four five six",)
    unbelieved = generation("unbelieved", response="one two three four five nine", references=long)
    items = [sure, generation("right", right=True), generation("wrong"), generation("shy"), unbelieved]
    server.replies["shy"] = {"content": '{"verdict": "refused"}'}
    write_generations(tmp_path / "in", items)
    cost = ("--price-in", 2, "--price-out", 30)
    result = run(*command(server, tmp_path / "in", tmp_path / "out", *cost, "--json", rule="published"))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["items"], told["dropped"]) == (5, 0)
    assert told["verdicts"] == {"correct": 1, "incorrect": 1, "invalid": 1, "refused": 1}
    spent = {"model": "model-j", "requests": 4, "cached": 0, "prompt_tokens": 400, "completion_tokens": 40}
    assert told["judge"] == {**spent, "price": pytest.approx(400 * 2e-6 + 40 * 30e-6)}
    assert set(server.asked) == {"right", "wrong", "shy", "unbelieved"}
    labelled = read_generations(tmp_path / "out")
    assert [item.label for item in labelled] == [0, 0, 1, None, None]
    assert labelled[0].labelling == {"rule": "published", "f1": 1.0, "rouge_l": 0.6667}
    assert labelled[4].labelling["verdict"] == "invalid"
    assert "ROUGE-L is 0.83" in labelled[4].labelling["reason"]

    # Over the file itself, and for nothing: all is in the cache.
    again = run(*command(server, tmp_path / "out", tmp_path / "out", "--drop", rule="published"))
    assert "2 without label left out" in again.stdout
    assert "judge model-j: 0 requests, 4 cached" in again.stdout
    assert read_generations(tmp_path / "out") == labelled[:3]
    assert server.asked.total() == 4


def test_ones_own_prompt_and_chats_go_through_the_verb(server: JudgeServer, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Ist das richtig?\n{question}\n{references}\n{response}", encoding="utf-8")
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "item-chat?"})
    write_generations(tmp_path / "in", [generation("chat", prompt=None, messages=chat)])
    result = run(*command(server, tmp_path / "in", tmp_path / "out", "--prompt", prompt))
    assert result.exit_code == 0, result.output
    sent = server.requests[0]["messages"][0]["content"]
    assert sent == "Ist das richtig?\nsystem: Be brief.\n\nuser: item-chat?\n- Paris\nwrong chat"
    other = run(*command(server, tmp_path / "in", tmp_path / "out"))
    assert "1 requests, 0 cached" in other.stdout  # another prompt is another question


def test_one_file_may_be_both_and_is_left_alone_when_the_judge_fails(server: JudgeServer, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    write_generations(path, generations(4))
    before = path.read_bytes()
    server.mishaps["*"] = ["404"]
    failed = run(*command(server, path, path))
    assert failed.exit_code == 1
    assert "knows no model `model-j`" in failed.output
    assert path.read_bytes() == before
    assert run(*command(server, path, path)).exit_code == 0
    assert [item.label for item in read_generations(path)] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rule", "judge"), "the judge has no name"),
        (("--rule", "exact", "--judge", "m"), "rule `exact` asks none; give --rule judge or published"),
        (("--rule", "judge", "--judge", "m", "--at-least", ".5"), "takes none; only f1 and rouge-l do"),
        (("--rule", "f1", "--at-least", "50"), "at-least is 50.0; expected a score in (0, 1]"),
        (("--rule", "judge", "--judge", "m", "--base-url", "localhost:1"), "expected one such as http://localhost"),
        (("--rule", "judge", "--judge", "m", "--concurrency", "0"), "concurrency is 0"),
        (("--rule", "judge", "--judge", "m", "--timeout", "0"), "timeout is 0.0"),
        (("--rule", "judge", "--judge", "m", "--prompt", "nowhere"), "prompt is nowhere, which can't be read"),
        (("--rule", "judge", "--judge", "m", "--price-in", "-1"), "price-in is -1.0"),
    ],
)
def test_options_that_make_no_sense_are_misuse(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    write_generations(tmp_path / "in", generations(2))
    result = run(tmp_path / "in", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert says in result.output
    assert not (tmp_path / "out").exists()


def test_where_nothing_would_be_left_nothing_is_written(tmp_path: Path) -> None:
    write_generations(tmp_path / "in", [generation("a", references=())])
    result = run(tmp_path / "in", "--out", tmp_path / "out", "--drop")
    assert (result.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "none of the 1 items got a label" in result.output


def test_without_the_package_the_error_says_how_to_get_it(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_generations(tmp_path / "in", generations(2))
    monkeypatch.setitem(sys.modules, "openai", None)  # an import of it fails, as if it were not there
    result = run(*command(server, tmp_path / "in", tmp_path / "out"))
    assert result.exit_code == 1
    assert "pip install 'lapwing[judge]'" in result.output


def test_the_verb_is_imported_without_anything_heavy() -> None:
    code = "import sys, lapwing_training.cli.label; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not {"openai", "numpy", "torch", "rapidfuzz", "tqdm", "pydantic"} & set(loaded)


# Kill -9
