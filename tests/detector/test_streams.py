"""An answer is written and scored as if it were alone, whoever shares its forwards and whenever they come and go."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from lapwing_detector import batch as batches
from lapwing_detector.batch import Batch
from lapwing_detector.errors import InvalidInput, TooLong
from lapwing_detector.generation import GeneratedToken
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.streams import Stream, Streams
from lapwing_detector.tokens import TokenIds
from tests.detector.architectures import build
from tests.detector.running_sums import a_probe
from tests.detector.stream_schedules import (
    endless,
    finished,
    forwards_of,
    ids_of,
    language_model,
    of_layer_1,
    prompt,
    scheduled,
    tokenizer,
    two_probes,
    worst,
    written,
)

SCHEDULES = 40 if os.environ.get("LAPWING_SOAK") else 3

SAME_SCORE = 1e-4
"""Of a sum of 50 numbers that the order of float32 sums moves: a running score is the score of its prefix."""

SEEN = 1e-2
"""What a wrong mask, position or column does to it, at least."""

SHARING = ["llama", "gpt2", "gpt_neox", "phi3"]
ALONE = ["mistral", "gemma2", "lfm2", "longrope", "dynamic"]
"""Windows, which keep no column in its place; other states than keys; frequencies that depend on the length."""


def family(name: str) -> LanguageModel:
    return language_model(name, **({"sliding_window": None} if name == "phi3" else {}))


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_running_score_is_that_of_its_prefix_whatever_the_others_do(name: str, seed: int) -> None:
    model = family(name)
    with forwards_of(model.model) as seen:
        answers = scheduled(model, two_probes(), seed)
    assert max(rows for rows, _ in seen) > 1, "nothing was shared"
    assert sum(len(answer.tokens) for answer in answers.values()) > 30
    assert worst(model, answers) < SAME_SCORE


def wrong_positions(batch: Batch, past: int, new: int) -> dict[str, torch.Tensor]:
    places = Batch.__dict__["right_places"](batch, past, new)
    return {name: value for name, value in places.items() if name != "position_ids"}


def wrong_mask(batch: Batch, past: int, new: int) -> dict[str, torch.Tensor]:
    places = Batch.__dict__["right_places"](batch, past, new)
    return {name: torch.ones_like(value) if name == "attention_mask" else value for name, value in places.items()}


@pytest.mark.parametrize("wrong", [wrong_positions, wrong_mask])
def test_control_a_wrong_place(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(Batch, "right_places", Batch._places, raising=False)
    monkeypatch.setattr(Batch, "_places", wrong)
    # Of gpt2, as rotary embeddings only see differences of positions.
    model = family("gpt2")
    assert worst(model, scheduled(model, two_probes(), 0)) > SEEN


def test_control_a_wrong_column(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = batches._beside
    monkeypatch.setattr(batches, "_beside", lambda *of: beside(*of).roll(1, dims=2))
    model = family("llama")
    assert worst(model, scheduled(model, two_probes(), 0)) > SEEN


@pytest.mark.parametrize("name", ALONE)
def test_where_rows_cannot_be_moved_every_answer_has_its_own_forwards(name: str) -> None:
    model = family(name)
    with forwards_of(model.model) as seen:
        if name in ("longrope", "dynamic"):  # beyond the switch a cache can't go on
            answers = written(model, a_probe(), 10, (3, 7, 12))
        else:
            answers = scheduled(model, [of_layer_1(probe) if name == "lfm2" else probe for probe in two_probes()], 1)
    assert {rows for rows, _ in seen} == {1}
    assert worst(model, answers) < SAME_SCORE


def test_a_model_that_counts_positions_in_its_own_way_shares_nothing() -> None:
    model = endless(LanguageModel(build("roberta"), tokenizer()))
    probe = a_probe(layers=(0, 1, 2))
    with forwards_of(model.model) as seen:
        answers = written(model, probe, 10, (3, 7, 12))
    assert {rows for rows, _ in seen} == {1}
    assert worst(model, answers) < SAME_SCORE


SAME_IN_HALF = 0.3
"""bfloat16 keeps 8 bits: the same tokens one by one and at once differ alone, too."""


def in_half() -> LanguageModel:
    return endless(LanguageModel(family("llama").model.bfloat16(), tokenizer()))


def test_half_precision_runs_together() -> None:
    model = in_half()
    with forwards_of(model.model) as seen:
        answers = scheduled(model, two_probes(), 2)
    assert max(rows for rows, _ in seen) > 1
    assert worst(model, answers) < SAME_IN_HALF


def test_control_a_wrong_mask_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "right_places", Batch._places, raising=False)
    monkeypatch.setattr(Batch, "_places", wrong_mask)
    model = in_half()
    assert worst(model, scheduled(model, two_probes(), 2)) > SAME_IN_HALF


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_probes_that_read_other_heads_each_have_their_own(seed: int) -> None:
    model, all_heads = family("llama"), a_probe()
    selected = np.zeros_like(all_heads.selected)
    selected[2] = True
    last = replace(
        all_heads, name="last", selected=selected, weights=np.ones_like(all_heads.weights) * selected[..., None]
    )
    probes = [all_heads, last, of_layer_1(all_heads)]
    assert len({str(probe.heads) for probe in probes}) == 3
    answers = scheduled(model, probes, seed, count=9)
    assert {stream.probe.revision for stream in answers} == {probe.revision for probe in probes}
    assert worst(model, answers) < SAME_SCORE


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seed_writes_the_same_alone_and_with_others(temperature: float) -> None:
    model, probe, lengths = family("llama"), a_probe(), (40, 3, 17, 9)
    options = {"temperature": temperature, "top_p": 0.9}
    together = written(model, probe, 30, lengths, **options)
    alone = [ids_of(written(model, probe, 30, (length,), **options))[0] for length in lengths]
    by_length = sorted(together, key=lambda stream: lengths.index(len(stream.prompt.prompt_ids)))
    assert ids_of({stream: together[stream] for stream in by_length}) == alone
    assert len(set(map(tuple, alone))) == len(alone)


def begun(model: LanguageModel, *lengths: int, tokens: int = 50) -> tuple[Streams, list[Stream]]:
    """Answers that are being written, all with one probe."""
    streams, probe = Streams(model), a_probe()
    new = [streams.add(prompt(length), probe, GenerationOptions(max_new_tokens=tokens)) for length in lengths]
    while streams._waiting:
        streams.step()
    return streams, new


def test_answers_share_one_forward_per_step_and_prompts_of_like_length_another() -> None:
    model = family("llama")
    streams, _ = begun(model, 10)  # from now on it is known that caches can be put together
    for length in (60, 9, 10, 11):
        streams.add(prompt(length), a_probe(), GenerationOptions(max_new_tokens=50))
    with forwards_of(model.model) as seen:
        streams.step()
        assert seen == [(3, 11), (4, 1)]  # the shortest first
        seen.clear()
        streams.step()
        assert seen == [(1, 60), (5, 1)]
        seen.clear()
        streams.step()
        assert seen == [(5, 1)]


def test_a_long_prompt_is_read_in_the_end_however_many_short_ones_come() -> None:
    model = family("llama")
    streams, _ = begun(model, 3)
    long = streams.add(prompt(60), a_probe(), GenerationOptions(max_new_tokens=1))
    steps = 0
    while not long.ended:
        for _ in range(2):
            streams.add(prompt(4), a_probe(), GenerationOptions(max_new_tokens=1))
        with forwards_of(model.model) as seen:
            streams.step()
        assert sum(columns > 1 for _, columns in seen) == 1
        steps += 1
        assert steps < 10
    assert steps > 2  # it did wait


def test_every_forward_is_made_for_those_only_that_are_still_wanted() -> None:
    model = family("llama")
    streams, (first, second, third) = begun(model, 10, 11, 12)
    later = [streams.add(prompt(length), two_probes()[1], GenerationOptions()) for length in (5, 6)]
    asked: list[Stream] = []
    unwanted = {second, later[0]}

    def wanted(stream: Stream) -> bool:
        asked.append(stream)
        return stream not in unwanted

    streams.wanted = wanted
    with forwards_of(model.model) as seen:
        assert {stream for stream, _ in streams.step()} == {first, third, later[1]}
        assert sorted(seen) == [(1, 1), (1, 6), (2, 1)]
        assert second.ended
        assert {first, second, third, *later} == set(asked)
        unwanted.update((first, third, later[1]))
        seen.clear()
        assert streams.step() == []
    assert seen == []
    assert len(streams) == 0
    assert streams._groups == []


def test_an_answer_that_is_given_up_during_a_step_has_no_part_in_its_next_forward() -> None:
    model = family("llama")
    streams, (first, second) = begun(model, 10, 11)
    third = streams.add(prompt(12), a_probe(), GenerationOptions())
    with forwards_of(model.model) as seen:
        streams.wanted = lambda stream: not (stream is second and seen)  # given up while the prompt is read
        assert {stream for stream, _ in streams.step()} == {first, third}
    assert seen == [(1, 12), (2, 1)]


def rows_held(streams: Streams) -> list[int]:
    return [len(group.streams) for group in streams._groups]


def test_no_cache_of_an_answer_that_has_ended_is_kept() -> None:
    model = family("llama")
    streams, (short, first, second) = begun(model, 9, 10, 11, tokens=4)
    short._limit = len(short.written) + 1
    streams.step()
    assert short.ended
    assert rows_held(streams) == [2]
    streams.cancel(first)
    streams.pause(second)
    assert rows_held(streams) == [2]  # nothing is moved for each that is cancelled
    streams.tidy()
    assert rows_held(streams) == [1]
    assert len(streams) == 0
    streams.resume(second)
    while len(streams):
        assert {stream for stream, _ in streams.step()} == {second}
    assert second.ended


def test_another_probe_has_another_forward() -> None:
    model, (first, second) = family("llama"), two_probes()
    streams = Streams(model)
    for probe in (first, second, first):
        streams.add(prompt(10), probe, GenerationOptions(max_new_tokens=50))
    while streams._waiting:
        streams.step()
    with forwards_of(model.model) as seen:
        events = streams.step()
    assert sorted(seen) == [(1, 1), (2, 1)]
    assert len(events) == 3


def test_no_forward_holds_an_answer_that_was_cancelled_paused_or_has_ended() -> None:
    model, probe = family("llama"), a_probe()
    streams = Streams(model)
    short, paused, cancelled, rest = (
        streams.add(prompt(length), probe, GenerationOptions(max_new_tokens=most))
        for length, most in ((30, 2), (10, 50), (12, 50), (5, 50))
    )
    assert len(streams) == 4
    while streams._waiting:
        streams.step()
    streams.cancel(cancelled)
    streams.cancel(cancelled)
    streams.pause(paused)
    assert len(streams) == 2
    with forwards_of(model.model) as seen:
        assert [stream for stream, _ in streams.step()].count(short) == 2  # the last token and the whole
        assert seen == [(2, 1)]
        assert len(streams) == 1
        events = streams.step()
        assert [stream for stream, _ in events] == [rest]
        assert seen[1:] == [(1, 1)]
        [group] = [group for group in streams._groups if rest in group.streams]
        assert group.batch.tokens == 5 + len(rest.written), "padding that nobody needs was kept"
        streams.resume(paused)
        streams.cancel(short)  # which has ended: nothing to cancel
        assert len(streams) == 2
        assert {stream for stream, _ in streams.step()} == {paused, rest}
        assert seen[2:] == [(2, 1)]
    streams.cancel(paused)
    streams.cancel(rest)
    assert len(streams) == 0
    assert streams.step() == []
    assert streams._groups == [], "what nobody waits for was kept"


def test_an_answer_that_was_never_begun_can_be_cancelled_and_paused() -> None:
    model = family("llama")
    streams = Streams(model)
    never, later = (streams.add(prompt(5), a_probe(), GenerationOptions(max_new_tokens=3)) for _ in range(2))
    streams.cancel(never)
    streams.pause(later)
    with forwards_of(model.model) as seen:
        assert len(streams) == 0
        assert streams.step() == []
    assert seen == []
    streams.resume(later)
    assert set(finished(streams)) == {later}


def test_too_long_or_empty_is_said_at_once() -> None:
    streams = Streams(family("llama"))
    most = streams._model.max_tokens
    for tokens, error in ((most, TooLong), (0, InvalidInput)):
        with pytest.raises(error) as caught:
            streams.add(TokenIds((5,) * tokens, ()), a_probe(), GenerationOptions())
        assert caught.value.field == "prompt"
    streams.add(TokenIds((5,) * (most - 1), ()), a_probe(), GenerationOptions())
    [answer] = finished(streams).values()
    assert len(answer.tokens) == 1
    assert answer.generation is not None
    assert answer.generation.finish_reason == "length"


def test_a_copy_of_a_model_has_captures_of_its_own() -> None:
    model, probe = family("llama"), a_probe()
    model.summaries([[15, 16, 17]], probe.heads)
    other = copy.deepcopy(model)
    assert other.model is not model.model
    streams = Streams(other)
    streams.add(prompt(9), probe, GenerationOptions(max_new_tokens=3))
    [(_, event), *_] = streams.step()
    assert isinstance(event, GeneratedToken)
