"""A judge behind an endpoint that misbehaves, or is killed: no label is changed, nothing is paid for twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from judge_fakes import KEY, command, generation, generations, judge_of, run
from judge_server import JudgeServer

from lapwing_training.data.generations import write_generations
from lapwing_training.errors import InvalidOption
from lapwing_training.labels.judge_cache import JudgeCache
from lapwing_training.labels.judge_endpoint import Endpoint, EndpointOptions, JudgeFailed
from lapwing_training.labels.judging import PATIENCE, Judge
from lapwing_training.labels.label import label_generations

pytestmark = pytest.mark.usefixtures("judge_surroundings")


KILLS = 20 if os.environ.get("LAPWING_SOAK") else 5


def test_verdicts_come_in_the_order_of_the_items_and_several_at_once(server: JudgeServer, tmp_path: Path) -> None:
    items, server.delay = generations(20), 0.05
    judge = judge_of(server, tmp_path / "c", concurrency=3)
    labelled = label_generations(items, "judge", judge=judge)
    assert [item.id for item in labelled] == [item.id for item in items]
    assert [item.label for item in labelled] == [int(number % 3 > 0) for number in range(20)]
    assert labelled[4].labelling == {
        "rule": "judge",
        "judge": "model-j",
        "prompt": judge.prompt_digest,
        "verdict": "incorrect",
        "reason": "because i4",
    }
    assert 1 < server.most_under_way <= 3
    assert set(server.asked.values()) == {1}
    sent = server.requests[0]
    assert (sent["model"], sent["temperature"]) == ("model-j", 0)
    assert sent["response_format"]["json_schema"]["strict"] is True


def test_a_server_that_misbehaves_changes_no_label(server: JudgeServer, tmp_path: Path) -> None:
    items, server.slow = generations(12), 2.0
    tries = {"i0": 2, "i1": 3, "i2": 2, "i3": 2, "i4": 2, "i5": 2, "i6": 4}
    server.mishaps.update({"i0": ["500"], "i1": ["429", "429"], "i2": ["hang up"], "i3": ["nonsense"]})
    server.mishaps.update({"i4": ["other JSON"], "i5": ["slow"], "i6": ["503", "429", "hang up"]})
    labelled = label_generations(items, "judge", judge=judge_of(server, tmp_path / "c", timeout=1.5))
    assert [item.label for item in labelled] == [int(number % 3 > 0) for number in range(12)]
    # The control: everything did go wrong. More tries than told are those of a machine that is slower than the server.
    assert all(server.asked[item] >= count for item, count in tries.items())


def test_answers_that_are_none_become_null_with_the_reason_and_are_not_paid_for_again(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.replies = {
        "a": {"content": None, "refusal": "I can't help with that"},
        "b": {"content": "Hard to say."},
        "c": {"content": '{"verdict": "refused", "reason": "it does not know"}'},
        "e": {"content": "half a", "finish_reason": "content_filter"},
    }
    server.mishaps["d"] = ["filter"]
    items = [generation(name) for name in ("ok", "a", "b", "c", "d", "e")]
    labelled = label_generations(items, "judge", judge=judge_of(server, tmp_path / "c"))
    assert [item.label for item in labelled] == [1, None, None, None, None, None]
    verdicts = [item.labelling["verdict"] for item in labelled]
    assert verdicts == ["incorrect", "judge refused", "unreadable", "refused", "judge refused", "judge refused"]
    reasons = [item.labelling["reason"] for item in labelled]
    assert reasons[1] == "the judge refused: I can't help with that"
    assert reasons[2] == "the judge's reply holds no verdict: `Hard to say.`"
    assert reasons[3] == "it does not know"
    asked = server.asked.total()
    assert label_generations(items, "judge", judge=judge_of(server, tmp_path / "c")) == labelled
    assert server.asked.total() == asked


def test_what_the_endpoint_rejects_is_null_and_asked_again_next_time(server: JudgeServer, tmp_path: Path) -> None:
    server.mishaps["long"] = ["413"]
    items = [generation("ok"), generation("long")]
    first, rejected = label_generations(items, "judge", judge=judge_of(server, tmp_path / "c"))
    assert (first.label, rejected.label) == (1, None)
    assert rejected.labelling["reason"] == "the endpoint rejected the request (413)"
    assert label_generations(items, "judge", judge=judge_of(server, tmp_path / "c"))[1].label == 1
    assert server.asked == {"ok": 1, "long": 2}


@pytest.mark.parametrize("forbidden", [{"response_format"}, {"temperature"}, {"temperature", "response_format"}])
def test_an_endpoint_that_lacks_schemas_or_temperatures_is_asked_without(
    forbidden: set[str], server: JudgeServer, tmp_path: Path
) -> None:
    server.forbidden = forbidden
    labelled = label_generations(generations(6), "judge", judge=judge_of(server, tmp_path / "c"))
    assert [item.label for item in labelled] == [0, 1, 1, 0, 1, 1]
    # Found out once, by the first item, which every other follows.
    assert sum(count > 1 for count in server.asked.values()) == 1
    assert not forbidden & server.requests[-1].keys()
    assert {"temperature", "response_format"} - forbidden <= server.requests[-1].keys()


def test_an_endpoint_that_rejects_everything_is_given_up_soon(server: JudgeServer, tmp_path: Path) -> None:
    server.forbidden = {"model"}
    with pytest.raises(JudgeFailed, match=rf"rejected the request \(400\), and so it did with all {PATIENCE} so far"):
        label_generations(generations(40), "judge", judge=judge_of(server, tmp_path / "c"))
    assert len(server.asked) == PATIENCE


def test_the_same_question_and_answer_is_paid_for_once(server: JudgeServer, tmp_path: Path) -> None:
    items = [generation("a"), replace(generation("a"), id="again")]
    judge = judge_of(server, tmp_path / "c")
    assert [item.label for item in label_generations(items, "judge", judge=judge)] == [1, 1]
    assert server.asked == {"a": 1}
    assert (judge.usage.requests, judge.usage.cached, judge.usage.prompt_tokens) == (1, 1, 100)


def test_without_accepted_answers_only_a_prompt_that_shows_none_is_asked(server: JudgeServer, tmp_path: Path) -> None:
    item = generation("a", references=())
    [plain] = label_generations([item], "judge", judge=judge_of(server, tmp_path / "c"))
    assert (plain.label, plain.labelling["reason"]) == (None, "there are no accepted answers to compare with")
    assert server.asked == {}
    [own] = label_generations([item], "judge", judge=judge_of(server, tmp_path / "c", "{question} {response}"))
    assert own.label == 1


def test_an_endpoint_that_stays_down_stops_the_run_and_keeps_what_it_said(server: JudgeServer, tmp_path: Path) -> None:
    server.mishaps["i5"], server.delay = ["500"] * 2, 0.1
    judge = judge_of(server, tmp_path / "c", concurrency=1, retries=1)
    with pytest.raises(
        JudgeFailed, match=r"answers 500 .*later.* \([5-8] of 9 answers are kept in .*the same command goes on"
    ):
        label_generations(generations(9), "judge", judge=judge)
    labelled = label_generations(generations(9), "judge", judge=judge_of(server, tmp_path / "c"))
    assert [item.label for item in labelled] == [int(number % 3 > 0) for number in range(9)]
    assert max(count for item, count in server.asked.items() if item != "i5") == 1


def test_nobody_at_the_address_is_said_so(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        judge = Judge(Endpoint(EndpointOptions("m", url, retries=0)), JudgeCache(tmp_path / "c"))
        with pytest.raises(JudgeFailed, match=rf"{url}/? gave no answer .*is it running"):
            judge([generation("a")])


@pytest.mark.parametrize("mishap", ["401", "echo"])
def test_the_key_is_sent_and_never_told(mishap: str, server: JudgeServer, tmp_path: Path) -> None:
    write_generations(tmp_path / "in", generations(3))
    server.mishaps["*"] = [mishap]
    failed = run(*command(server, tmp_path / "in", tmp_path / "out"))
    assert failed.exit_code == 1
    assert ("check OPENAI_API_KEY" in failed.output) == (mishap == "401")
    worked = run(*command(server, tmp_path / "in", tmp_path / "out", "--json"))
    assert worked.exit_code == 0, worked.output
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"  # the control: there was something to tell
    told = [failed.output, worked.output, *(path.read_text() for path in tmp_path.iterdir())]
    assert not any(KEY in text for text in told)


def test_a_local_endpoint_needs_no_key_and_the_public_one_does(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge_of(server, tmp_path / "c")([generation("a")])[0].word == "incorrect"
    public = Judge(Endpoint(EndpointOptions("m")), JudgeCache(tmp_path / "d"))
    with pytest.raises(InvalidOption, match="OPENAI_API_KEY is not set; set it, or name an endpoint"):
        public([generation("a")])
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert public([generation("a")])[0].word == "incorrect"


def test_a_key_that_is_none_is_refused_without_saying_it(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-…")
    with pytest.raises(InvalidOption, match="holds signs that no key has") as refused:
        judge_of(server, tmp_path / "c")([generation("a")])
    assert "sk-" not in str(refused.value)


RUN = "import typer; from lapwing_training.cli.label import label; typer.run(label)"


def kept(cache: Path) -> list[str]:
    """Items whose answers are in the cache, as whole lines."""
    lines = cache.read_text().split("\n")[:-1] if cache.exists() else []
    return [re.findall(r"because (i\d+)", line)[0] for line in lines if line]


def test_killed_at_any_moment_it_goes_on_pays_nothing_twice_and_ends_with_the_same_bytes(
    server: JudgeServer, tmp_path: Path
) -> None:
    rng = random.Random(0)
    items, server.delay = generations(10 * KILLS), 0.05
    server.replies["i1"] = {"content": "It is wrong because i1"}  # unreadable, and kept like any other
    source, out, cache = tmp_path / "items.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.judge.jsonl"
    write_generations(source, items)
    arguments = [str(argument) for argument in command(server, source, out, "--concurrency", 3, "--json")]
    paid: dict[str, int] = {}  # by item that was kept when a run was killed: how often it had been asked
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stderr=subprocess.DEVNULL)
        enough, until = len(kept(cache)) + rng.randint(1, 4), time.monotonic() + 60
        while len(kept(cache)) < enough:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        paid |= {item: server.asked[item] for item in kept(cache)}
    result = run(*arguments)
    assert json.loads(result.stdout)["judge"]["cached"] == len(paid)
    assert {item: server.asked[item] for item in paid} == paid
    # Only what was under way when a run was killed was asked again.
    assert len(items) <= server.asked.total() <= len(items) + 3 * KILLS
    whole = run(*command(server, source, tmp_path / "whole.jsonl", "--json"))
    assert json.loads(whole.stdout)["judge"]["requests"] == len(items)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
