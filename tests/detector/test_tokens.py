"""One function builds the ids that are scored: exactly one BOS, nothing cut, and every wrong input by its field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lapwing_detector import tokens
from lapwing_detector.errors import InvalidInput
from lapwing_detector.tokens import TokenIds, build_ids

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")

CHAT_WITH_BOS = "{{ bos_token }}"
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + CHAT


def byte_tokenizer(
    *, adds_bos: bool = True, adds_eos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A real tokenizer, one token a byte."""
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{'<s> ' * adds_bos}$A{' </s>' * adds_eos}", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(template=CHAT_WITH_BOS + CHAT)


def text_of(ids: tuple[int, ...]) -> str:
    return byte_tokenizer().decode(ids, skip_special_tokens=True)


MESSAGES = [{"role": "user", "content": "Where is Riga?"}]
CHAT_TEXT = "[user]Where is Riga?[assistant]"


# One BOS.


def names_no_special_token(text: str) -> bool:
    return not any(name in text for name in SPECIAL)


@given(st.text(max_size=40).filter(names_no_special_token), st.text(max_size=40))
@example("", "<s></s>")
def test_text_gets_one_bos_and_response_none(prompt: str, response: str) -> None:
    ids = build_ids(TOKENIZER, "p" + prompt, response)
    assert ids.prompt_ids[0] == BOS
    assert BOS not in ids.prompt_ids[1:] + ids.response_ids
    assert text_of(ids.prompt_ids) == "p" + prompt
    assert text_of(ids.response_ids) == response


TOKENIZER = byte_tokenizer()


def test_a_special_token_that_is_spelt_out_is_one_in_a_prompt_and_text_in_an_answer() -> None:
    ids = build_ids(TOKENIZER, "p<s>q</s>", "<s></s>")
    letters = TOKENIZER.convert_tokens_to_ids(["p", "q"])
    assert ids.prompt_ids == (BOS, letters[0], BOS, letters[1], EOS)  # as in a template that was filled in by hand
    assert len(ids.response_ids) == len("<s></s>")
    assert text_of(ids.response_ids) == "<s></s>"


@pytest.mark.parametrize("template", [CHAT, CHAT_WITH_BOS + CHAT], ids=["template without BOS", "template with BOS"])
def test_messages_get_one_bos(template: str) -> None:
    ids = build_ids(byte_tokenizer(template=template), MESSAGES, "Latvia").prompt_ids
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert text_of(ids) == CHAT_TEXT


def test_control_the_plain_way_doubles_it() -> None:
    tokenizer = byte_tokenizer(template=CHAT_WITH_BOS + CHAT)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text)["input_ids"].count(BOS) == 2


def test_control_the_check_notices_a_doubled_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_opened", lambda tokenizer, ids, opening: (BOS, *ids))
    assert build_ids(byte_tokenizer(template=CHAT_WITH_BOS + CHAT), MESSAGES).prompt_ids.count(BOS) == 2


def test_text_that_writes_its_own_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_ids(tokenizer, "<s>a").prompt_ids == build_ids(tokenizer, "a").prompt_ids
    assert build_ids(tokenizer, "<s><s>a").prompt_ids == build_ids(tokenizer, "a").prompt_ids


@pytest.mark.parametrize("template", [CHAT, CHAT_WITH_BOS + CHAT])
def test_a_tokenizer_that_adds_no_bos(template: str) -> None:
    tokenizer = byte_tokenizer(adds_bos=False, template=template)
    assert BOS not in build_ids(tokenizer, "a").prompt_ids
    assert build_ids(tokenizer, MESSAGES).prompt_ids.count(BOS) == (template != CHAT)  # only if the template writes it


def test_no_end_of_sequence_behind_a_prompt() -> None:
    tokenizer = byte_tokenizer(adds_eos=True)
    assert tokenizer("a")["input_ids"][-1] == EOS
    ids = build_ids(tokenizer, "a", "b")
    assert EOS not in ids.all
    assert ids.all == build_ids(byte_tokenizer(), "a", "b").all


# What goes in comes out.


def test_ids_are_left_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    for given_ids in ([BOS, BOS, 9], (7, 8), np.array([5, 6]), torch.tensor([5, 6]), range(3, 6)):
        ids = build_ids(tokenizer, given_ids, given_ids)
        assert ids.prompt_ids == ids.response_ids == tuple(int(one) for one in given_ids)
        assert all(type(one) is int for one in ids.all)


def test_prompt_and_response_are_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = build_ids(tokenizer, "ab", "cd")
    assert ids.all == ids.prompt_ids + ids.response_ids
    assert ids.followed_by([9, 9]) == TokenIds(ids.prompt_ids, (*ids.response_ids, 9, 9))
    assert build_ids(tokenizer, "ab").response_ids == ()


def test_one_of_both_may_be_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_ids(tokenizer, "", "a").prompt_ids == (BOS,)
    assert build_ids(tokenizer, [], [9]) == TokenIds((), (9,))
    assert build_ids(tokenizer, "a", "").response_ids == ()


def test_long_texts_are_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.model_max_length = 10
    assert len(build_ids(tokenizer, "a" * 5000).prompt_ids) == 5001


# Wrong input.


@pytest.mark.parametrize(
    ("prompt", "response", "field", "words"),
    [
        ("", "", "prompt", "is empty"),
        ("", None, "prompt", "is empty"),
        ([], [], "prompt", "is empty"),
        ([], None, "prompt", "is empty"),
        (None, "a", "prompt", "NoneType"),
        (7, "a", "prompt", "int"),
        (b"ab", "a", "prompt", "bytes"),
        ({"role": "user"}, "a", "prompt", "dict"),
        ("a", 3.5, "response", "float"),
        ("a", MESSAGES, "response_ids[0]", "dict"),
        ([3, 4, 259], "a", "prompt_ids[2]", "is 259; the tokenizer has 259 tokens"),
        ("a", [3, 4, 5, -1], "response_ids[3]", "is -1"),
        ("a", [10**30], "response_ids[0]", "must lie in [0, 259)"),
        ([3, True], "a", "prompt_ids[1]", "bool"),
        ([3, 4.0], "a", "prompt_ids[1]", "float"),
        ([3, "4"], "a", "prompt_ids[1]", "str"),
        ([3, {"role": "user", "content": "a"}], "a", "prompt_ids[1]", "dict"),
        (["a", "b"], "a", "prompt_ids[0]", "str"),
        ([*MESSAGES, 5], "a", "prompt[1]", "int"),
        ([*MESSAGES, {"role": "user"}], "a", "prompt[1].content", "is missing"),
        ([*MESSAGES, {"role": "user", "content": None}], "a", "prompt[1].content", "NoneType"),
        ([{"content": "a"}], "a", "prompt[0].role", "is missing"),
        ([{"role": "", "content": "a"}], "a", "prompt[0].role", "is empty"),
        ([{"role": "user", "content": "a", "name": "b"}], "a", "prompt[0].name", "not known"),
        ("a\ud83d", "b", "prompt", "surrogate pair at position 1"),
        ("a", "\udc00", "response", "surrogate pair at position 0"),
        ([{"role": "user", "content": "\ud83d"}], "b", "prompt", "surrogate"),
    ],
)
def test_wrong_input_is_named(
    tokenizer: PreTrainedTokenizerFast, prompt: Any, response: Any, field: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        build_ids(tokenizer, prompt, response)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_messages_without_a_chat_template() -> None:
    with pytest.raises(InvalidInput, match=r"set tokenizer\.chat_template"):
        build_ids(byte_tokenizer(), MESSAGES)


def test_messages_that_the_template_refuses() -> None:
    with pytest.raises(InvalidInput, match="the user speaks first"):
        build_ids(byte_tokenizer(template=STRICT), [{"role": "system", "content": "a"}])


def test_ids_behind_a_hole_in_the_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    assert build_ids(tokenizer, [259]).prompt_ids == (259,)
