"""What a judge is asked, and what its reply means."""

from __future__ import annotations

import pytest
from judge_fakes import generation

from lapwing_training.errors import InvalidOption
from lapwing_training.labels.judge import TEMPLATE, Answer, fill, read_verdict, require_template


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
