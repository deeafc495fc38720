"""Answers at the edges of what can be asked for, several at once: each is scored as its tokens read at once, alone."""

from __future__ import annotations

import pytest

from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.streams import Streams
from lapwing_detector.tokens import TokenIds
from tests.detector.running_sums import a_probe
from tests.detector.stream_schedules import (
    finished,
    forwards_of,
    ids_of,
    language_model,
    prompt,
    tokenizer,
    worst,
    written,
)
from tests.detector.test_streams import SAME_SCORE, SEEN
from tests.detector.tiny_models import EOS, new_model

EIGHT = (1, 1, 2, 3, 5, 8, 13, 21)
"""Tokens of prompts."""


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_eight_that_end_at_once_leave_nothing(tokens: int) -> None:
    model = language_model()
    streams = Streams(model)
    for length in EIGHT:
        streams.add(prompt(length, length), a_probe(), GenerationOptions(max_new_tokens=tokens))
    while streams._waiting:
        streams._advance = lambda group: ()  # those that were read wait for the others
        streams.step()
    del streams._advance
    with forwards_of(model.model) as seen:
        answers = finished(streams)
    assert seen == [(8, 1)] * tokens
    assert len(answers) == 8
    assert all(len(answer.tokens) == tokens and answer.generation for answer in answers.values())
    assert streams._groups == [] == streams._waiting
    assert worst(model, answers) < SAME_SCORE


@pytest.mark.parametrize("name", ["gpt_oss", "mistral"])
def test_a_model_with_sinks_or_windows_past_its_window(name: str) -> None:
    model = language_model(name)
    answers = written(model, a_probe(), 20, (1, 15, 16, 17))
    assert all(len(answer.tokens) == 20 for answer in answers.values())
    assert worst(model, answers) < SAME_SCORE


def test_an_answer_shorter_than_what_is_scored_is_scored_at_its_end() -> None:
    model = language_model()
    answers = written(model, a_probe(), 6, EIGHT, score_every=7)
    for stream, answer in answers.items():
        assert [token.logit is None for token in answer.tokens] == [True] * 5 + [False]
        answer.tokens[:-1] = []  # which were not to be scored
        assert answer.generation is not None
        read = model.summaries([[*stream.prompt.prompt_ids, *answer.generation.token_ids]], stream.probe.heads)
        expected = stream.probe.score(read[0])[0]
        assert answer.tokens[-1].logit == pytest.approx(expected, abs=SAME_SCORE)
        [before] = model.summaries([[*stream.prompt.prompt_ids, *answer.generation.token_ids[:-1]]], stream.probe.heads)
        assert abs(stream.probe.score(before)[0] - expected) > SEEN / 10  # control: one token earlier


def test_a_prompt_may_hold_the_tokens_that_end_an_answer_and_an_answer_may_be_nothing() -> None:
    probe, ends = a_probe(), tuple(EOS)
    open_ended = language_model()
    prompts = [(*ends[:3], 20, 21), (20, ends[0]), (ends[0],), (30, 31, 32, 33)]

    def answers(model: LanguageModel) -> list[list[int]]:
        streams = Streams(model)
        for ids in prompts:
            streams.add(TokenIds(ids, ()), probe, GenerationOptions(max_new_tokens=9))
        found = finished(streams)
        assert worst(model, {one: said for one, said in found.items() if said.tokens}) < SAME_SCORE
        for answer in found.values():
            assert answer.generation is not None
            if not answer.tokens:
                assert answer.generation.finish_reason == "stop"
                assert answer.generation.detection.logit is None  # nothing was said that could be made up
        return sorted(ids_of(found))

    whole = answers(open_ended)
    assert all(len(ids) == 9 for ids in whole)
    # The first token of one of them ends an answer from now on, and so do the others where it comes later.
    model = LanguageModel(new_model("llama"), tokenizer())
    first = whole[0][0]
    vars(model)["stop_tokens"] = frozenset((first, *ends))
    stops = model.stop_tokens
    cut = [ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))] for ids in whole]
    assert [] in cut
    assert answers(model) == sorted(cut)
