"""The verb `lapwing score` against a real server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_fakes import FakeEngine, Running

from lapwing_client import Client, Unavailable, cli
from lapwing_client import score as verb
from lapwing_server.limits import Limits


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


def run(server: Running, *arguments: str) -> int:
    return cli.main(["score", "--server", server.target, *arguments])


def test_one_response_for_people(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--prompt", "hello", "--response", "world") == 0
    shown = capsys.readouterr().out
    assert "made up with probability 0.498 (logit -0.072)" in shown
    assert "not flagged at 5.0% false alarms (flagged at: none)" in shown
    assert "layer 2 head 1 (+0.500), layer 1 head 2 (-0.250)" in shown
    assert "response token 0 (+0.034)" in shown, "the strongest token"
    assert "prompt token 4 (+0.022)" in shown
    assert "probe fake-probe" in shown


def test_one_response_as_json(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--prompt", "hello", "--response", "world", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["logit"] == FakeEngine().score("hello", "world", false_positive_rate=0.05).logit
    assert shown["token_ids"] == list(b"helloworld")


def test_flagged_says_at_which_rates(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "{{{{", "--response", "zzzzzzzzzzzzzzzz", "--false-positive-rate")
    assert run(server, *arguments, "0.1") == 0
    assert "flagged at 10.0% false alarms (flagged at: 10.0%)" in capsys.readouterr().out
    assert run(server, *arguments, "0.03") == 0
    assert "the probe has no threshold for 3.0% false alarms" in capsys.readouterr().out


def test_what_can_not_be_scored_is_not_called_true(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--prompt", "a", "--response", "b") == 0
    shown = capsys.readouterr().out
    assert shown == "could not score: 2 tokens, 3 needed (TOO_SHORT)\n"


def test_an_error_is_one_line_and_ends_with_1(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--prompt", "a", "--response", "x" * 500) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "lapwing score: response: prompt and response have 501 tokens, the model takes 400" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a"],
        ["--response", "a"],
        ["--prompt", "a", "--response", "b", "--jsonl", "f"],
        ["--prompt", "a", "--jsonl", "f"],
        ["--prompt", "", "--jsonl", "f"],
        ["--response", "", "--jsonl", "f"],
        ["--jsonl", "/no/such/file"],
        ["--prompt", "a", "--response", "b", "--timeout", "0"],
    ],
)
def test_misuse_ends_with_2(server: Running, arguments: list[str]) -> None:
    assert run(server, *arguments) == 2


def test_the_help_teaches_with_an_example(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "--help") == 0
    assert "Example: lapwing score --server localhost:50051" in capsys.readouterr().out


LINES = [
    '{"id": "one", "prompt": "hello", "response": "world"}',
    "",
    '{"prompt": "hello", "response": ',
    '{"id": "three", "messages": [{"role": "user", "content": "ab"}], "response": "cd"}',
    '{"id": "four", "prompt": "hello"}',
    '["hello", "world"]',
    '{"id": "six", "prompt": "a", "response": "b"}',
    '{"id": "seven", "prompt": "hello", "response": [1, 999]}',
    '{"id": "eight", "prompt": "hello", "response": [1.5]}',
    '{"id": 9, "prompt": "hello", "response": "world"}',
]


def test_a_file_gives_one_line_for_each_line(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    assert run(server, "--jsonl", str(path)) == 1
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [answer.get("id") for answer in answers] == ["one", None, "three", "four", None, "six", "seven", "eight", 9]
    assert [answer.get("state", answer.get("error")) for answer in answers] == [
        *("SCORED", "InvalidLine", "SCORED", "InvalidLine", "InvalidLine"),
        *("UNSCORED", "InvalidRequest", "InvalidLine", "SCORED"),
    ]
    for number in (3, 5, 6, 8, 9):
        assert f"line {number}: " in shown.err
    assert "5 of 9 lines failed" in shown.err


def test_a_good_file_ends_with_0_and_order_is_kept_over_batches(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.jsonl"
    count = 3 * verb.BATCH + 5
    path.write_text("".join(json.dumps({"prompt": f"number {i:03d}", "response": "x"}) + "\n" for i in range(count)))
    before = server.engine.forwards
    assert run(server, "--jsonl", str(path)) == 0
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [bytes(answer["token_ids"]) for answer in answers] == [b"number %03dx" % i for i in range(count)]
    assert server.engine.forwards - before == 4
    assert shown.err == "", "nothing is said when it is quick and well"


def test_standard_input_is_a_file_too(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b'{"prompt": "\xff", "response": "b"}\n' + LINES[0].encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8", errors="strict"))
    assert run(server, "--jsonl", "-") == 1
    broken, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert broken["message"].startswith("is no JSON ('utf-8' codec can't decode byte 0xff")
    assert good["id"] == "one"


def test_progress_is_told_on_standard_error(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(verb.time, "monotonic", lambda: float(next(clock)))
    path = tmp_path / "items.jsonl"
    path.write_text(f"{LINES[0]}\n" * (2 * verb.BATCH))
    with Client(server.target) as client:
        assert verb.score_file(client, path, None) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["16 lines scored", "32 lines scored"]
    assert len(shown.out.splitlines()) == 32


def test_text_that_is_no_text_fails_alone(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe", "response": "b"}\n' + LINES[0].encode() + b"\n")
    assert run(server, "--jsonl", str(path)) == 1
    answers: list[Any] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer.get("error") for answer in answers] == ["InvalidLine", None]


def scored(
    server: Running, path: Path, capsys: pytest.CaptureFixture[str], *lines: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the answers and what is said of them."""
    path.write_text("".join(f"{line}\n" for line in lines))
    code = run(server, "--jsonl", str(path))
    shown = capsys.readouterr()
    return code, [json.loads(line, parse_constant=pytest.fail) for line in shown.out.splitlines()], shown.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 100_000, "is no JSON"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "response": "b"}', "give one of them"),
        ('{"id": [1], "prompt": "a", "response": "b"}', "id is a list; give text or a number"),
        ('{"prompt": "a", "response": [1.5]}', "give text or a list of token ids"),
        ('{"prompt": "a", "response": {"text": "b"}}', "response: is a dict; give text or a list of token ids"),
    ],
)
def test_a_strange_line_fails_alone(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    code, answers, said = scored(server, tmp_path / "items.jsonl", capsys, line, LINES[0])
    assert code == 1
    assert [answer.get("error") for answer in answers] == ["InvalidLine", None]
    assert words in answers[0]["message"]
    assert words in said


def test_an_id_that_json_has_no_word_for_is_null(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{"id": NaN, "prompt": "hello", "response": "world"}'
    code, [answer], _ = scored(server, tmp_path / "items.jsonl", capsys, line)
    assert (code, answer["id"], answer["state"]) == (0, None, "SCORED")


def test_a_batch_is_bounded_by_its_bytes(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"prompt": "x" * 80, "response": "y"})
    before = server.engine.forwards
    monkeypatch.setattr(verb, "BATCH_BYTES", 3 * (len(line) + 1))
    code, answers, _ = scored(server, tmp_path / "items.jsonl", capsys, *[line] * 7)
    assert (code, [answer["line"] for answer in answers]) == (0, [1, 2, 3, 4, 5, 6, 7])
    assert server.engine.forwards - before == 3
    monkeypatch.undo()
    scored(server, tmp_path / "items.jsonl", capsys, *[line] * 7)
    assert server.engine.forwards - before == 4, "control: without the bound they are one batch"


@pytest.mark.parametrize("bound", [verb.BATCH_BYTES, 1])
def test_a_line_that_is_too_large_fails_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "BATCH_BYTES", bound)
    large = json.dumps({"prompt": "x" * 2000, "response": "y"})
    with Running(limits=Limits(request_bytes=1000)) as server:
        code, answers, said = scored(server, tmp_path / "items.jsonl", capsys, LINES[0], large, LINES[0])
    assert (code, [answer.get("error") for answer in answers]) == (1, [None, "TooLarge", None])
    assert "1 of 3 lines failed" in said


def test_when_nothing_more_can_be_scored_the_first_such_line_is_named(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([Client.score_batch])

    def once(self: Client, *args: Any, **kwargs: Any) -> Any:
        for call in calls:
            return call(self, *args, **kwargs)
        raise Unavailable("nobody there")

    monkeypatch.setattr(Client, "score_batch", once)
    code, answers, said = scored(server, tmp_path / "items.jsonl", capsys, *[LINES[0]] * (verb.BATCH + 3))
    assert (code, len(answers)) == (1, verb.BATCH)
    assert said.startswith(f"line {verb.BATCH + 1} and all after it are not scored: nobody there (the caller")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--prompt", "hello", "--response", "world"), ("--jsonl", "-")])
def test_a_full_disk_is_one_line_and_ends_with_1(server: Running, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "lapwing_client", "score", "--server", server.target, *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, input=LINES[0].encode(), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"lapwing score: [Errno 28] No space left on device\n"
