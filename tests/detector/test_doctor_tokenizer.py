"""The doctor and the tokenizer: one BOS token in front."""

from __future__ import annotations

import json

import pytest

from lapwing_detector import tokens
from lapwing_detector.doctor.bos import bos_fault
from lapwing_detector.doctor.report import as_json, table
from lapwing_detector.language_model import LanguageModel
from tests.detector.test_doctor import found, quickly, tiny
from tests.detector.test_tokens import CHAT, CHAT_WITH_BOS, byte_tokenizer
from tests.detector.tiny_models import new_model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": CHAT_WITH_BOS + CHAT}, "'<s>' (id 1) 1 in text, 1 in messages"),
        ({"template": CHAT}, "1 in text, 1 in messages"),
        ({}, "1 in text; there is no chat template"),
        ({"adds_bos": False, "template": CHAT}, "is not put in front by the tokenizer: 0 in text, 0 in messages"),
        ({"adds_bos": False, "template": CHAT_WITH_BOS + CHAT + "{{ bos_token }}"}, "0 in text, 2 in messages"),
    ],
)
def test_one_bos_or_a_word_on_why_there_is_none(options, said):
    check = found(quickly(tiny(tokenizer=byte_tokenizer(**options))), "bos")
    assert check.state == "ok"
    assert said in check.said


@pytest.mark.parametrize(("template", "doubled"), [(CHAT_WITH_BOS + CHAT, True), (CHAT, False)])
def test_a_bos_that_users_would_double_is_a_note_and_no_failure(template, doubled):
    diagnosis = quickly(tiny(tokenizer=byte_tokenizer(template=template)))
    check = found(diagnosis, "bos")
    assert check.state == "ok"
    assert check.numbers["tokenised_again"] == (2 if doubled else 1)
    assert ("has BOS twice" in check.note) == doubled
    assert ("note: tokenizer(text) of the chat template's text has BOS twice" in table(diagnosis)) == doubled
    assert json.loads(as_json(diagnosis))["checks"]["bos"]["note"] == check.note


def test_a_tokenizer_without_bos_is_said_and_not_failed():
    tokenizer = byte_tokenizer(adds_bos=False)
    tokenizer.bos_token = None
    check = found(quickly(tiny(tokenizer=tokenizer)), "bos")
    assert (check.state, check.numbers["bos"]) == ("ok", None)
    assert "no BOS token" in check.said


def test_control_a_template_that_writes_bos_behind_a_newline_is_found():
    tokenizer = byte_tokenizer(template="{{ '\n' + bos_token }}" + CHAT)
    diagnosis = quickly(tiny(tokenizer=tokenizer))
    assert diagnosis.wrong == ["bos"]
    assert found(diagnosis, "bos").said.startswith("messages: BOS stands 2 times; once is right")


def test_control_a_doubled_bos_is_found(monkeypatch):
    monkeypatch.setattr(tokens, "_opened", lambda tokenizer, ids, opening: (tokenizer.bos_token_id, *ids))
    diagnosis = quickly(tiny())
    assert diagnosis.wrong == ["bos"]
    assert found(diagnosis, "bos").numbers["counts"] == {"text": 1, "messages": 2}
    assert "one behind the other" in found(diagnosis, "bos").said


@pytest.mark.parametrize(
    ("ids", "adds", "is_text", "fault"),
    [
        ((1, 5, 6), True, True, None),
        ((5, 6), False, True, None),
        ((1, 5, 1, 6), False, False, None),  # a template that marks turns with it
        ((5, 1), True, True, "in front"),
        ((5, 6), True, False, "0 times"),
        ((1, 5, 1), True, False, "2 times"),
        ((1, 1, 5), False, False, "twice"),
        ((1, 5), False, True, "tokenizer puts none"),
    ],
)
def test_what_is_wrong_with_bos_tokens(ids, adds, is_text, fault):
    said = bos_fault(ids, 1, adds, is_text)
    assert said is None if fault is None else fault in said


def test_a_tokenizer_of_another_model_is_found():
    diagnosis = quickly(LanguageModel(new_model("llama"), byte_tokenizer()))
    assert diagnosis.wrong == ["layers", "eager", "batch", "generate"]
    assert "use the tokenizer that belongs to the model" in found(diagnosis, "layers").said
