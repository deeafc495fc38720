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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from judge_server import JudgeServer, judge_server
from typer.testing import CliRunner, Result

from lapwing_training.cli.label import label
from lapwing_training.errors import InvalidOption
from lapwing_training.generations import LabelledGeneration, read_generations, write_generations
from lapwing_training.judge import TEMPLATE, Answer, fill, read_verdict, require_template
from lapwing_training.judge_cache import JudgeCache, answer_key
from lapwing_training.judge_endpoint import Endpoint, EndpointOptions, JudgeFailed
from lapwing_training.judging import PATIENCE, Judge
from lapwing_training.label import label_generations

KEY = "sk-very-secret"
KILLS = 20 if os.environ.get("LAPWING_SOAK") else 5


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


def generation(name: str, right: bool = False, **changes: Any) -> LabelledGeneration:
    """An answer that the server takes for right or wrong; the first and last words are no accepted answer."""
    response = f"{'right-answer' if right else 'wrong'} {name}"
    fields = {"prompt": f"About item-{name}?", "response": response, "references": ("Paris",), **changes}
    return LabelledGeneration(id=name, **fields)


def generations(count: int) -> list[LabelledGeneration]:
    return [generation(f"i{number}", right=number % 3 == 0) for number in range(count)]


def judge_of(server: JudgeServer, cache: Path, template: str = TEMPLATE, concurrency: int = 4, **options: Any) -> Judge:
    endpoint = Endpoint(EndpointOptions("model-j", server.url, **{"timeout": 10.0, "retries": 4, **options}))
    return Judge(endpoint, JudgeCache(cache), template, concurrency)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(label)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(server: JudgeServer, source: Path, out: Path, *more: object, rule: str = "judge") -> tuple[object, ...]:
    return source, "--out", out, "--rule", rule, "--judge", "model-j", "--base-url", server.url, *more


# What is asked


def test_braces_in_the_items_own_texts_are_not_filled_in() -> None:
    item = generation("a", response="{references}", prompt="{response} and {x}")
    text = fill("Q {question} R {references} A {response} {other}", item)
    assert text == "Q {response} and {x} R - Paris A {references} {other}"


def test_a_chat_is_shown_with_its_roles_and_a_single_message_as_it_stands() -> None:
    user = {"role": "user", "content": "Where?"}
    alone = generation("a", prompt=None, messages=(user,))
    chat = generation("a", prompt=None, messages=({"role": "system", "content": "Be brief."}, user))
    assert fill("{question}|{response}", alone) == "Where?|wrong a"
    assert fill("{question}|{response}", chat) == "system: Be brief.\n\nuser: Where?|wrong a"


@pytest.mark.parametrize(
    ("template", "missing"), [("{question}", "{response}"), ("{response}", "{question}"), ("", "and")]
)
def test_a_prompt_that_does_not_show_what_is_judged_is_refused(template: str, missing: str) -> None:
    require_template(TEMPLATE)
    with pytest.raises(InvalidOption, match=missing):
        require_template(template)


# What a reply means


@pytest.mark.parametrize(
    ("content", "word", "reason"),
    [
        ('{"reason": "same city", "verdict": "correct"}', "correct", "same city"),
        ('```json\n{"verdict": "Incorrect ", "reason": 3}\n```', "incorrect", ""),
        ('<think>{"verdict": "correct"}?</think>\nSo: {"verdict": "incorrect"}', "incorrect", ""),
        ('It says {Rome}, so {"a": {"b": 1}, "verdict": "refused"} is it', "refused", ""),
        ("**Incorrect**.", "incorrect", ""),
        ("It differs.\nVerdict: **incorrect**", "incorrect", ""),
        ('{"reason": "half \\ud800", "verdict": "correct"}', "correct", "half ?"),
    ],
)
def test_verdicts_are_found_in_what_endpoints_without_a_schema_write(content: str, word: str, reason: str) -> None:
    verdict = read_verdict(Answer(content))
    assert (verdict.word, verdict.reason) == (word, reason)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "maybe",
        "not correct",
        "Verdict: not correct",
        "It is correct that it is incorrect.",
        '{"verdict": "perhaps"}',
        '{"verdict": ["correct"]}',
        '{"verdict": "correct"} or {"verdict": "incorrect"}',
        '{"verdict": "corr',
        "{" * 3000,
        '{"a":' * 3000,
        TEMPLATE,
    ],
)
def test_what_holds_no_single_verdict_is_unreadable_and_quoted(content: str) -> None:
    verdict = read_verdict(Answer(content))
    assert verdict.word == "unreadable"
    assert "`" + " ".join(content.split())[:100] in verdict.reason
    assert len(verdict.reason) < 400


def test_a_judge_that_refuses_has_judged_nothing() -> None:
    assert read_verdict(Answer('{"verdict": "correct"}', refusal="I won't")).word == "judge refused"
    assert read_verdict(Answer('{"verdict": "correct"}', finish_reason="content_filter")).word == "judge refused"
    assert "cut off" in read_verdict(Answer("so", finish_reason="length")).reason


# The cache


def test_what_was_added_is_found_again_by_another_process_to_be(tmp_path: Path) -> None:
    answer = Answer("Pa\u2028ris \ud800", "", "stop", 3, 4)
    JudgeCache(tmp_path / "new" / "c").add("k", "m", answer)
    assert JudgeCache(tmp_path / "new" / "c")["k"] == answer


@pytest.mark.parametrize("cut", [1, 10, 60, -1])
def test_a_line_that_was_cut_off_is_asked_again_and_spoils_none_after_it(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "c"
    JudgeCache(path).add("k1", "m", Answer("one"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b"k1", b"k2")[:cut])
    cache = JudgeCache(path)
    assert ("k1" in cache, "k2" in cache) == (True, cut == -1)
    cache.add("k3", "m", Answer("three"))
    again = JudgeCache(path)
    assert ("k1" in again, "k3" in again) == (True, True)


def test_a_write_that_fails_half_way_spoils_none_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = JudgeCache(tmp_path / "c")
    plain = Path.open

    def full(path: Path, *how: str) -> Any:
        with plain(path, "ab") as file:
            file.write(b'{"key": "k1", ')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space"):
            cache.add("k1", "m", Answer("one"))
    cache.add("k2", "m", Answer("two"))
    again = JudgeCache(tmp_path / "c")
    assert ("k1" in again, "k2" in again) == (False, True)


def test_another_file_is_never_taken_for_a_cache(tmp_path: Path) -> None:
    write_generations(tmp_path / "items.jsonl", generations(2))
    with pytest.raises(InvalidOption, match=r"items.jsonl, line 1: no answer of a judge; give another file"):
        JudgeCache(tmp_path / "items.jsonl")


def test_model_prompt_and_parameters_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(base_url: str = "") -> str:
        return Endpoint(EndpointOptions("m", base_url)).address

    public, own = address(), address("http://me:secret@localhost:8000/v1/?key=secret")
    assert (public, own) == ("https://api.openai.com/v1", "http://localhost:8000/v1")
    counted = [("m", "p", {}), ("n", "p", {}), ("m", "q", {}), ("m", "p", {"t": 1})]
    keys = [answer_key(*of, place) for of in counted for place in (public, own)]
    assert len(set(keys)) == 8
    assert answer_key("m", "p", {}, public) == keys[0]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert (address(), address("http://other/v1")) == (own, "http://other/v1")


def test_the_default_address_is_that_of_the_package() -> None:
    from openai import OpenAI

    assert str(OpenAI(api_key="k").base_url).rstrip("/") == Endpoint(EndpointOptions("m")).address


def test_the_same_name_behind_another_address_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    with judge_server() as other:
        for asked in (server, other, server):
            judge = judge_of(asked, tmp_path / "c")
            judge(generations(3))
        assert judge.usage.requests == 0  # the first again
        judge = judge_of(other, tmp_path / "d")
        judge(generations(3))
    assert judge.usage.requests == 3


# Asking


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


# The key


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


# The verb


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
