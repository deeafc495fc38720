"""What goes wrong in one answer ends that answer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from lapwing_detector.batch import Batch
from lapwing_detector.errors import CaptureError, UnsupportedGeneration
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.sequences import Sequences
from lapwing_detector.streams import Stream, Streams
from lapwing_detector.tokens import TokenIds
from tests.detector.architectures import build
from tests.detector.running_sums import a_probe
from tests.detector.stream_schedules import (
    Answer,
    endless,
    finished,
    forwards_of,
    ids_of,
    language_model,
    prompt,
    step,
    tokenizer,
    worst,
    written,
)
from tests.detector.test_streams import SAME_SCORE

LENGTHS = (10, 12, 15)


@contextmanager
def failing(model: LanguageModel, when: Callable[[torch.Tensor], bool], layer: int = 1) -> Iterator[list[int]]:
    """Fails in the middle of a forward, behind the attention of some layers, where `when` says so of its ids."""
    failures: list[int] = []
    ids: list[torch.Tensor] = []

    def begin(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        ids[:] = [kwargs["input_ids"]]

    def fail(*_: object) -> None:
        if when(ids[0]):
            failures.append(len(ids[0]))
            raise MemoryError("none left")

    hooks = [
        model.model.register_forward_pre_hook(begin, with_kwargs=True),
        model.model.model.layers[layer].register_forward_hook(fail),
    ]
    try:
        yield failures
    finally:
        for hook in hooks:
            hook.remove()


def begun(model: LanguageModel, probe: Probe, steps: int = 3) -> tuple[Streams, dict[Stream, Answer]]:
    """Answers that are in the middle."""
    streams, answers = Streams(model), {}
    for length in LENGTHS:
        options = GenerationOptions(max_new_tokens=20, temperature=1.0, seed=length)
        answers[streams.add(prompt(length, length), probe, options)] = Answer()
    for _ in range(steps):
        step(streams, answers)
    return streams, answers


def go_on(streams: Streams, answers: dict[Stream, Answer]) -> None:
    while len(streams):
        step(streams, answers)


def test_a_prompt_that_cannot_be_read_ends_alone() -> None:
    model, probe = language_model(), a_probe()
    streams = Streams(model)
    for ids in (prompt(10).prompt_ids, (*prompt(10).prompt_ids, 10**6), prompt(12).prompt_ids):
        streams.add(TokenIds(ids, ()), probe, GenerationOptions(max_new_tokens=4))
    answers = list(finished(streams).values())
    [bad] = [answer for answer in answers if answer.error]
    assert isinstance(bad.error, IndexError)
    assert bad.tokens == []
    assert all(answer.generation for answer in answers if not answer.error)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_prompt_of_all_may_fail(first: bool) -> None:
    model, probe = language_model(), a_probe()
    streams = Streams(model)
    lengths = LENGTHS if first else LENGTHS[::-1]
    for length in lengths:
        streams.add(prompt(length), probe, GenerationOptions(max_new_tokens=4))
    with failing(model, lambda ids: ids.shape[1] == lengths[0]) as failures, forwards_of(model.model) as seen:
        answers = finished(streams)
    assert failures
    assert [bool(answer.error) for answer in answers.values()].count(True) == 1
    assert max(rows for rows, _ in seen) == 2  # the others share their steps


WIDTHS = {"narrow": {}, "wide": {"hidden_size": 128, "initializer_range": 0.2}}
"""Of the model: attention in C takes the wide one's steps."""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_token_that_cannot_be_fed_ends_its_answer_alone(layer: int, width: str) -> None:
    model, probe = language_model(**WIDTHS[width]), a_probe()
    expected = written(model, probe, 20, LENGTHS)
    streams, answers = begun(model, probe)
    victim = list(answers)[1]
    bad, before = victim.next_token, len(answers[victim].tokens)
    others = [stream.next_token for stream in answers if stream is not victim]
    assert bad not in others
    with failing(model, lambda ids: ids.shape[1] == 1 and bad in ids.flatten(), layer) as failures:
        step(streams, answers)
    assert failures == [3, 1]  # together, and apart
    go_on(streams, answers)
    assert isinstance(answers[victim].error, MemoryError)
    assert len(answers[victim].tokens) == before > 0
    rest = {stream: answer for stream, answer in answers.items() if stream is not victim}
    assert worst(model, rest) < SAME_SCORE
    by_seed = {stream.options.seed: ids_of({stream: answer})[0] for stream, answer in expected.items()}
    assert all(ids_of({stream: answer})[0] == by_seed[stream.options.seed] for stream, answer in rest.items())
    assert not any(stream.alone for stream in rest)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layer", [0, 2])
def test_answers_that_only_fail_together_go_on_apart(layer: int, width: str) -> None:
    model, probe = language_model(**WIDTHS[width]), a_probe()
    streams, answers = begun(model, probe)
    with failing(model, lambda ids: len(ids) > 1, layer) as failures, forwards_of(model.model) as seen:
        go_on(streams, answers)
    assert failures == [3]  # once, and then no more
    assert {rows for rows, _ in seen[1:]} == {1}
    assert all(answer.generation for answer in answers.values())
    assert worst(model, answers) < SAME_SCORE


def test_a_forward_that_was_summed_up_before_it_failed_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = language_model(), a_probe()
    streams, answers = begun(model, probe)
    feed = Batch.feed

    def feed_and_fail(batch: Batch, tokens: list[int]) -> torch.Tensor:
        before = batch.tokens
        feed(batch, tokens)
        batch.tokens = before  # as if the logits could not be fetched
        raise MemoryError

    monkeypatch.setattr(Batch, "feed", feed_and_fail)
    step(streams, answers)
    assert all(isinstance(answer.error, CaptureError) for answer in answers.values())
    assert len(streams) == 0


def test_no_memory_for_one_cache_of_all_leaves_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = language_model(), a_probe()
    gather = Batch.gather

    def for_few(parts: list[tuple[Batch, list[int]]]) -> Batch:
        if len(parts) > 1:
            raise MemoryError
        return gather(parts)

    monkeypatch.setattr(Batch, "gather", for_few)
    answers = written(model, probe, 5, (10, 40, 12))
    assert all(answer.generation for answer in answers.values())
    assert worst(model, answers) < SAME_SCORE


def test_an_error_in_what_is_said_of_one_ends_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = language_model(), a_probe()
    streams, answers = begun(model, probe)
    summary = Sequences.summary

    def without_the_second(sums: Sequences, row: int) -> object:
        if row == 1:
            raise CaptureError("no summary")
        return summary(sums, row)

    monkeypatch.setattr(Sequences, "summary", without_the_second)
    go_on(streams, answers)
    assert sum(isinstance(answer.error, CaptureError) for answer in answers.values()) == 1
    assert sum(answer.generation is not None for answer in answers.values()) == 2


def test_attention_that_is_not_finite_stays_with_its_answer() -> None:
    model, probe = language_model(), a_probe()
    bad = 90
    with torch.no_grad():
        model.model.model.embed_tokens.weight[bad] = float("nan")
    streams = Streams(model)
    for ids in ((20, 21, 22, 23, bad), (20, 21, 22, 23, 24, 25, 26), (30, 31, 32, 33)):
        streams.add(TokenIds(ids, ()), probe, GenerationOptions(max_new_tokens=6))
    answers = finished(streams)
    for stream, answer in answers.items():
        assert answer.generation
        broken = bad in stream.prompt.prompt_ids
        assert (answer.generation.detection.logit is None) == broken
        assert all((token.logit is None) == broken for token in answer.tokens)


def test_a_model_without_a_cache_is_refused_and_not_read_token_by_token_anew() -> None:
    model = endless(LanguageModel(build("recurrent_gemma"), tokenizer()))
    heads = {2: (0, 1)}
    [answer] = _answers_of(model, a_probe(), heads)
    assert isinstance(answer.error, UnsupportedGeneration)
    assert "returns no cache" in str(answer.error)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    model, probe = language_model(), a_probe()
    options = {"top_p": 0.9}
    likeliest = ids_of(written(model, probe, 10, LENGTHS, temperature=0.0))
    assert ids_of(written(model, probe, 10, LENGTHS, temperature=temperature)) == likeliest
    assert ids_of(written(model, probe, 10, LENGTHS, temperature=temperature, **options)) == likeliest
    assert ids_of(written(model, probe, 10, LENGTHS, temperature=1.0)) != likeliest


@pytest.mark.parametrize("steps", [1, 4])
def test_a_token_that_cannot_be_drawn_ends_its_answer_alone(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = language_model(), a_probe()
    streams, answers = begun(model, probe, steps)
    victim = list(answers)[1]

    def draw(_: object) -> int:
        raise RuntimeError("no probabilities")

    monkeypatch.setattr(victim.chooser, "draw", draw)
    go_on(streams, answers)
    assert isinstance(answers.pop(victim).error, RuntimeError)
    assert all(answer.generation for answer in answers.values())
    assert worst(model, answers) < SAME_SCORE


def test_logits_from_which_nothing_can_be_chosen_end_those_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = language_model(), a_probe()
    streams, answers = begun(model, probe)
    feed = Batch.feed

    def one_too_few(batch: Batch, tokens: list[int]) -> torch.Tensor:
        return feed(batch, tokens)[:, :0]

    monkeypatch.setattr(Batch, "feed", one_too_few)
    step(streams, answers)
    assert all(answer.error for answer in answers.values())
    assert len(streams) == 0


class PanicException(BaseException):
    """No `Exception`, like those of tokenizers."""


@pytest.mark.parametrize("error", [PanicException, KeyboardInterrupt, SystemExit])
def test_a_panic_in_the_tokenizer_ends_its_answer_alone_and_an_interrupt_ends_all(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, probe = language_model(), a_probe()
    streams, answers = begun(model, probe)
    victim = list(answers)[1]

    def push(*_: object) -> str:
        raise error("a secret")

    monkeypatch.setattr(victim._text, "push", push)
    if error is not PanicException:
        with pytest.raises(error):
            streams.step()
        return
    go_on(streams, answers)
    told = answers.pop(victim).error
    assert isinstance(told, CaptureError)
    assert str(told) == "PanicException"
    assert all(answer.generation for answer in answers.values())


def test_prompts_that_fail_together_are_read_apart_one_in_a_step() -> None:
    model, probe = language_model(), a_probe()
    streams, answers = Streams(model), {}
    for length in LENGTHS:
        answers[streams.add(prompt(length), probe, GenerationOptions(max_new_tokens=30))] = Answer()
    with failing(model, lambda ids: len(ids) > 1 and ids.shape[1] > 1) as failures, forwards_of(model.model) as seen:
        for _ in range(4):
            step(streams, answers)
    assert failures == [2]
    assert sorted(shape for shape in seen if shape[1] > 1)[-1] == (2, 15)
    assert all(answer.tokens for answer in answers.values())
    go_on(streams, answers)
    assert worst(model, answers) < SAME_SCORE


def _answers_of(model: LanguageModel, probe: Probe, heads: dict[int, tuple[int, ...]]) -> list[Answer]:
    vars(probe)["heads"] = heads
    streams = Streams(model)
    streams.add(prompt(9), probe, GenerationOptions(max_new_tokens=3))
    return list(finished(streams).values())
