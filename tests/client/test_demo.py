"""What the demo prints, and what it does when its server does not come up."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from lapwing_client import demo, demo_report
from lapwing_client.demo_report import Asked
from lapwing_client.local_server import ServerFailed, endings_as_exits, running_server
from lapwing_client.results import Detection

SCORED = Detection(
    state="SCORED",
    reason=None,
    message="",
    probability=0.64,
    logit=1.0,
    bias=0.0,
    flagged=True,
    false_positive_rate=0.1,
    flagged_at=(0.1,),
    probe_name="atlas",
    probe_revision="0" * 12,
    prompt_tokens=3,
    response_tokens=1,
    token_ids=(1, 2, 3, 4),
    token_contributions=(0.0, 0.0, 0.5, 0.5),
    heads_contribution=1.0,
    statistic_contributions={},
    strongest_heads=(),
    seconds={},
)
UNSCORED = replace(SCORED, state="UNSCORED", reason="TOO_SHORT", probability=None, logit=None, flagged=None)


def asked(**changes: object) -> Asked:
    values = {
        "question": "where is it?",
        "answer": "Peru",
        "truth": "Chile",
        "wrong": True,
        "seen": False,
        "trail": (0.0, 0.5, 1.0),
        "detection": SCORED,
    }
    return Asked(**values | changes)  # type: ignore[arg-type]


def test_a_row_shows_question_answer_truth_bar_trail_and_flag() -> None:
    row = demo_report.row(asked())
    assert row == ("where is it? *", "Peru", "Chile", "wrong", "██████░░░░ 0.64", "▁▅█", "FLAGGED")
    assert demo_report.row(asked(seen=True, wrong=False))[0:4] == ("where is it?", "Peru", "Chile", "right")


def test_no_score_never_looks_like_a_low_one() -> None:
    row = demo_report.row(asked(detection=UNSCORED, trail=()))
    assert row[4:] == ("no score (TOO_SHORT)", "", "?")


def test_wrong_answers_are_counted_over_the_questions_only() -> None:
    text = demo_report.answers([asked(), asked(wrong=False)], [asked(seen=None)], 0.1)
    assert "1 of the 2 answers are wrong" in text
    assert "10% of right answers" in text


def test_text_of_a_model_stays_on_its_line() -> None:
    row = demo_report.row(asked(answer="a\nb\x1b[31m" + "c" * 100))
    assert row[1].isprintable()
    assert len(row[1]) == 24


def test_nothing_that_the_probe_was_compared_with_is_left_out() -> None:
    shipped = Path(demo.__file__).parents[2] / "detector" / "lapwing_detector" / "atlas" / "probe" / "manifest.json"
    metrics = json.loads(shipped.read_text())["metrics"]

    class Fitted:
        def __init__(self) -> None:
            self.metrics = metrics

    text = demo_report.quality(Fitted())  # type: ignore[arg-type]
    for name, entry in metrics["comparison"].items():
        assert demo_report.interval(entry["auroc"]) in text, name
    for difference in ("difference", "difference_within"):
        assert demo_report.interval(metrics["paired"][difference], "+.3f") in text


@pytest.mark.parametrize(("answer", "wrong"), [("Peru", False), (" peru.", False), ("Chile", True), ("", True)])
def test_an_answer_is_right_if_it_is_one_of_the_accepted(answer: str, wrong: bool) -> None:
    item = {"question": "?", "truth": "Peru", "accepted": ["Peru", "PER"]}
    assert demo.judged(item, answer, None, (), SCORED).wrong is wrong


def test_a_server_that_does_not_start_shows_its_log() -> None:
    with pytest.raises(ServerFailed, match="--port"), running_server(["--port", "nonsense"]):
        pass


WATCHED = """
import signal, time
from lapwing_client.local_server import running_server
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
with running_server([]) as address:
    print(address, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_server_is_left_behind_by_a_process_that_is_told_to_end(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WATCHED], stdout=subprocess.PIPE, text=True) as watched:
        assert watched.stdout is not None
        host, _, port = watched.stdout.readline().strip().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5):  # it is there ...
            pass
        watched.send_signal(number)
        assert watched.wait(30) != 0
    with pytest.raises(ConnectionRefusedError):  # ... and then it is not
        socket.create_connection((host, int(port)), timeout=5)


def test_signals_are_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with endings_as_exits():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_done(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write everywhere
    monkeypatch.setattr(demo, "interview", None)
    with pytest.raises(typer.Exit) as caught:
        demo.demo(out=out)
    assert caught.value.exit_code == 1
    assert str(out) in capsys.readouterr().err


def test_the_shipped_questions_are_twelve_and_half_of_them_are_about_the_unknown() -> None:
    shipped = demo.demo_questions(None)
    assert len(shipped["questions"]) == 12
    assert sum(item["seen"] for item in shipped["questions"]) == 6
    assert all(item["truth"] in item["accepted"] for item in (*shipped["questions"], *shipped["texts"]))
