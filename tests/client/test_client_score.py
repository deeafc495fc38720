"""The verb `lapwing score` against a real server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from odd_certificates import issue
from service_fakes import FakeEngine, Running, a_shelf
from test_client_retries import Refusing
from test_client_tls import served_by
from wire_server import WireServer

from lapwing_client import PermissionDenied, cli, progress
from lapwing_client.score_lines import read_line
from lapwing_server.limits import Limits

COUNT = 53
"""Lines: several times what is asked for at once."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running(shelf=a_shelf("fake-probe", "other-probe")) as running:
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


def test_a_good_file_ends_with_0_and_order_is_kept(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i:03d}", "response": "x"}) + "\n" for i in range(COUNT)))
    for concurrency in ("1", "16"):
        assert run(server, "--jsonl", str(path), "--concurrency", concurrency) == 0
        shown = capsys.readouterr()
        answers = [json.loads(line) for line in shown.out.splitlines()]
        assert [bytes(answer["token_ids"]) for answer in answers] == [b"number %03dx" % i for i in range(COUNT)]
        assert shown.err == "", "nothing is said when it is quick and well"


def test_a_probe_may_be_named(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(LINES[0] + "\n")
    for source in (["--prompt", "hello", "--response", "world", "--json"], ["--jsonl", str(path)]):
        for name in ("fake-probe", "other-probe"):
            assert run(server, *source, "--probe", name) == 0
            assert json.loads(capsys.readouterr().out)["probe_name"] == name
    assert run(server, "--prompt", "hello", "--response", "world", "--probe", "nope") == 1
    assert "known are fake-probe, other-probe" in capsys.readouterr().err


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
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    path = tmp_path / "items.jsonl"
    path.write_text(f"{LINES[0]}\n" * 32)
    assert run(server, "--jsonl", str(path)) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0] == "1 scored"
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


def test_a_line_that_is_too_large_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = json.dumps({"prompt": "x" * 2000, "response": "y"})
    with Running(limits=Limits(request_bytes=1000)) as server:
        code, answers, said = scored(server, tmp_path / "items.jsonl", capsys, LINES[0], large, LINES[0])
    assert (code, [answer.get("error") for answer in answers]) == (1, [None, "TooLarge", None])
    assert "1 of 3 lines failed" in said


@pytest.mark.parametrize(("answered", "words"), [(7, "nothing after line 7 is scored: "), (0, "no line is scored: ")])
def test_when_nothing_more_can_be_scored_it_ends(
    answered: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = Refusing("Score", 0, grpc.StatusCode.PERMISSION_DENIED)

    def before(method: str, context: grpc.ServicerContext) -> None:
        refusing.left = len(server.calls) > answered
        refusing(method, context)

    path = tmp_path / "items.jsonl"
    path.write_text(f"{LINES[0]}\n" * 1000)
    with WireServer(before) as server:
        assert cli.main(["score", "--server", server.target, "--jsonl", str(path), "--concurrency", "1"]) == 1
        assert len(server.calls) < 20, "it is not asked a thousand times"
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == answered
    assert shown.err == f"{words}no ({PermissionDenied.who_acts})\n"


# Who we are, and whom we trust.


def test_a_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text("from-a-file\n")
    arguments = ["--prompt", "a", "--response", "b"]
    with WireServer() as server:
        command = ["score", "--server", server.target, *arguments]
        assert cli.main(command) == 0
        monkeypatch.setenv("LAPWING_TOKEN", "from-the-environment")
        assert cli.main(command) == 0
        assert cli.main([*command, "--token-file", str(path)]) == 0
    assert [call.get("authorization") for call in server.metadata] == [
        None,
        "Bearer from-the-environment",
        "Bearer from-a-file",
    ]
    shown = capsys.readouterr()
    assert "from-" not in shown.out + shown.err


@pytest.mark.parametrize(("content", "words"), [(None, "can't be read"), (b" \n", "is empty"), (b"\xff", "can't be")])
def test_a_token_file_that_holds_none_is_misuse(
    content: bytes | None, words: str, server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    assert run(server, "--prompt", "a", "--response", "b", "--token-file", str(path)) == 2
    assert words in "".join(line.strip("│ ") + " " for line in capsys.readouterr().err.splitlines())


def test_a_token_is_no_option(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """Other users of the machine read the options of a command."""
    assert run(server, "--prompt", "a", "--response", "b", "--token", "secret") == 2
    assert "No such option" in capsys.readouterr().err


def test_an_encrypted_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = issue("authority")
    ours = issue("ours", authority)
    served = issue("server", authority, hosts=("lapwing.example.org",))
    for name, data in (("ca", authority.pem), ("cert", ours.pem), ("key", ours.key)):
        (tmp_path / name).write_bytes(data)
    trust = ["--tls-ca", str(tmp_path / "ca"), "--tls-name", "lapwing.example.org"]
    mine = ["--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key")]
    with WireServer(credentials=served_by(served, wants=authority)) as server:
        command = ["score", "--server", server.target, "--prompt", "a", "--response", "b"]
        assert cli.main([*command, *trust, *mine]) == 0
        assert "made up with probability 0.500" in capsys.readouterr().out
        for options, words in (
            ([*trust], "wants a client certificate"),
            ([*trust[:2], *mine], "is not to be trusted"),
            (["--tls"], "is not to be trusted"),
            ([], "speaks TLS and this client does not"),
            ([*trust, *mine[:2]], "give both or none of them"),
        ):
            assert cli.main([*command, *options]) == 1
            shown = capsys.readouterr()
            assert words in shown.err
            assert shown.err.count("\n") == 1


def test_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    with WireServer() as one, WireServer() as two:
        servers = f"{one.target},{two.target}"
        assert cli.main(["score", "--server", servers, "--prompt", "a", "--response", "b"]) == 0
        assert len(one.calls) + len(two.calls) == 1


def test_a_line_is_a_pair() -> None:
    line = read_line(3, b'{"id": 7, "prompt": "a", "response": "b"}')
    assert (line.number, line.id, tuple(line), line.error) == (3, 7, ("a", "b"), "")
    assert tuple(read_line(3, b"[]")) == ()


@pytest.mark.parametrize("arguments", [("--prompt", "hello", "--response", "world"), ("--jsonl", "-")])
def test_a_full_disk_is_one_line_and_ends_with_1(server: Running, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "lapwing_client", "score", "--server", server.target, *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, input=LINES[0].encode(), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"lapwing score: [Errno 28] No space left on device\n"
