"""How an answer is told while it is written, and why it ends."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from lapwing_detector.calibration import Calibration, StageCalibration
from lapwing_detector.detector import Detector
from lapwing_detector.errors import InvalidInput
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.running import RunningLogits
from lapwing_detector.scoring import ScoreJob
from lapwing_detector.sequences import Sequences
from tests.detector.probes import random_probe
from tests.detector.stream_schedules import endless, finished

QUESTION = "Question: which country is the city of Lyon in? Answer:"
SAMPLED = {"temperature": 1.3, "seed": 4, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def detector() -> Detector:
    loaded = endless(LanguageModel.load())
    probe = random_probe(layers=6, heads=8, k=10, identity=loaded.identity)
    return Detector.from_pretrained(loaded.model, probe, tokenizer=loaded.tokenizer)


@pytest.fixture(scope="module", autouse=True)
def without_end(detector: Detector) -> None:
    endless(detector.language_model)


def told(detector: Detector, **options: Any) -> tuple[list[GeneratedToken], Generation]:
    *tokens, generation = detector.generate(QUESTION, **{**SAMPLED, **options})
    assert isinstance(generation, Generation)
    assert "".join(token.text for token in tokens) == generation.text
    assert [token.token_id for token in tokens] == list(generation.token_ids)
    return tokens, generation


def test_it_ends_at_a_stop_string_which_its_text_leaves_out(detector: Detector) -> None:
    _, whole = told(detector)
    assert whole.finish_reason == "length"
    for start, size in ((5, 3), (20, 1), (33, 6)):
        stop = whole.text[start : start + size]
        _, cut = told(detector, stop_strings=["never written \N{BIRD}", stop])
        assert cut.finish_reason == "stop_string"
        assert cut.text == whole.text[: whole.text.find(stop)]
        count = len(cut.token_ids)
        assert cut.token_ids == whole.token_ids[:count]
        # The tokens of the stop string count, and there is none behind it.
        texts = [detector.tokenizer.decode(whole.token_ids[:n], skip_special_tokens=True) for n in (count, count - 1)]
        assert [stop in text for text in texts] == [True, False]
        assert cut.detection.response_tokens == count
        assert cut.detection.logit == pytest.approx(detector.score(cut.prompt_ids, cut.token_ids).logit, abs=1e-4)


def test_what_may_become_a_stop_string_is_held_back_and_given_out_if_it_does_not(detector: Detector) -> None:
    tokens, whole = told(detector)
    stop = whole.text[10:16] + "\N{BIRD}"  # begins, but is never written
    held, same = told(detector, stop_strings=[stop])
    assert same.text == whole.text
    texts = [token.text for token in held]
    assert texts != [token.text for token in tokens]
    so_far = ""
    for text in texts[:-1]:
        so_far += text
        assert not any(so_far.endswith(stop[:size]) for size in range(1, len(stop)))


def test_it_ends_as_soon_as_the_running_probability_is_too_high(detector: Detector) -> None:
    tokens, whole = told(detector)
    highest = sorted(token.probability for token in tokens[:-1])
    most = (highest[-2] + highest[-1]) / 2
    [at] = [token.index for token in tokens[:-1] if token.probability > most]
    cut_tokens, cut = told(detector, stop_when_probability_above=most)
    assert cut.finish_reason == "flagged"
    assert len(cut_tokens) == at + 1
    assert cut_tokens[-1].probability == tokens[at].probability > most
    assert cut.token_ids == whole.token_ids[: at + 1]
    assert cut.detection.logit == cut_tokens[-1].logit
    # Controls: with a limit that is not passed, and before enough tokens are written, it goes on.
    assert told(detector, stop_when_probability_above=highest[-1])[1].finish_reason == "length"
    assert told(detector, stop_when_probability_above=most, minimum_tokens=at + 2)[1].finish_reason == "length"
    assert told(detector, stop_when_probability_above=most, minimum_tokens=at + 1)[1].finish_reason == "flagged"


def test_the_probability_that_ended_it_is_that_of_the_stage(detector: Detector, monkeypatch: Any) -> None:
    stages = (StageCalibration(0.5, 1000.0, 0.0, 4.0),)  # .98 for all that is not finished
    monkeypatch.setattr(detector, "_probe", replace(detector.probe, stages=stages))
    tokens, whole = told(detector, stop_when_probability_above=0.97)
    assert len(tokens) == 1
    assert tokens[0].probability == stages_say(4.0) > 0.97
    assert whole.detection.probability == detector.probe.calibration.probability(tokens[0].logit)


def stages_say(logit: float) -> float:
    return Calibration(0.0, logit).probability(0.0)


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_every_nth_token_is_scored_and_the_last_one(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    all_tokens, _ = told(detector)
    asked: list[int] = []
    logits = RunningLogits.logits
    monkeypatch.setattr(RunningLogits, "logits", lambda running: asked.append(1) or logits(running))
    tokens, generation = told(detector, score_every=every)
    scored = [token.index for token in tokens if token.logit is not None]
    assert scored == sorted({*range(every - 1, 24, every), 23})
    assert [all_tokens[index].logit for index in scored] == pytest.approx(
        [tokens[index].logit for index in scored], abs=1e-5
    )
    assert len(asked) == 24 // every  # the sums are not even looked at in between
    assert tokens[-1].logit == generation.detection.logit


def test_contributions_are_those_of_a_score_of_the_prefix(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = told(detector)
    assert all(token.token_contributions is None for token in plain)
    rows: list[int] = []
    summary = Sequences.summary
    monkeypatch.setattr(Sequences, "summary", lambda sums, row: rows.append(row) or summary(sums, row))
    tokens, generation = told(detector, contributions=True, score_every=4)
    assert len(rows) == 6  # of 24 tokens
    for token in tokens:
        assert (token.token_contributions is None) == (token.index % 4 != 3)
        if token.token_contributions is not None:
            read = detector.score(generation.prompt_ids, generation.token_ids[: token.index + 1])
            assert token.token_contributions == pytest.approx(read.token_contributions, abs=1e-4)
            assert token.logit == pytest.approx(read.logit, abs=1e-4)
            assert token.token_contributions.sum() == pytest.approx(token.logit - detector.probe.bias, abs=1e-4)
    assert tokens[-1].token_contributions is generation.detection.token_contributions


@pytest.mark.parametrize("contributions", [False, True])
def test_a_probe_that_reads_log_probabilities_too(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, contributions: bool
) -> None:
    weights = {"mean_log_probability.v1": 0.7, "minimum_log_odds.v1": -0.2}
    plain, both = detector.probe, replace(detector.probe, statistic_weights=weights)
    without, _ = told(detector)
    monkeypatch.setattr(detector, "_probe", both)
    tokens, generation = told(detector, contributions=contributions)
    for token in tokens:
        read = detector.score(generation.prompt_ids, generation.token_ids[: token.index + 1])
        # The log-odds of a sure token magnify the rounding of its logits, at most a thousandfold.
        assert token.logit == pytest.approx(read.logit, abs=1e-3)
        assert read.logit == pytest.approx(
            read.bias + read.heads_contribution + sum(read.statistic_contributions.values()), abs=1e-5
        )
        if contributions:
            assert token.token_contributions.sum() == pytest.approx(token.logit - read.bias, abs=1e-4)
    assert generation.detection.statistic_contributions.keys() == weights.keys()
    # Control: they make a difference.
    assert min(abs(one.logit - other.logit) for one, other in zip(tokens, without, strict=True)) > 0.1
    # One of each in a batch.
    ids = detector.tokens(generation.prompt_ids, generation.token_ids)
    [scored] = detector.score_ids([ScoreJob(ids, plain, shadows=(both,))])
    assert scored.detection.logit == pytest.approx(without[-1].logit, abs=1e-4)
    assert scored.shadows[0].logit == pytest.approx(generation.detection.logit, abs=1e-3)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_every_nth_score_of_a_probe_that_reads_log_probabilities_is_that_of_its_prefix(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    weights = {"mean_log_probability.v1": 0.7, "lowest_quarter_log_odds.v1": 0.3, "minimum_log_odds.v1": -0.2}
    monkeypatch.setattr(detector, "_probe", replace(detector.probe, statistic_weights=weights))
    tokens, generation = told(detector, score_every=every)
    read = [detector.score(generation.prompt_ids, generation.token_ids[:count]).logit for count in range(1, 25)]
    scored = [token for token in tokens if token.logit is not None]
    assert [token.index for token in scored] == sorted({*range(every - 1, 24, every), 23})
    assert [token.logit for token in scored] == pytest.approx([read[token.index] for token in scored], abs=1e-4)
    # Control: a token more or less, of the answer or of what is said of it, is another score.
    assert min(abs(one - other) for one, other in itertools.pairwise(read)) > 1e-3


def test_too_short_has_no_contributions(detector: Detector) -> None:
    *tokens, _ = detector.generate([20, 21, 22], max_new_tokens=9, contributions=True)
    assert [token.token_contributions is None for token in tokens] == [token.logit is None for token in tokens]
    assert tokens[0].logit is None
    assert tokens[-1].logit is not None


def test_characters_of_several_tokens_come_whole_though_many_write_at_once(detector: Detector) -> None:
    streams = detector.streams()
    for seed in range(12):
        options = GenerationOptions(max_new_tokens=8, temperature=50.0, seed=seed)  # bytes in any order
        streams.add(detector.tokens(QUESTION), detector.probe, options)
    for answer in finished(streams).values():
        text = "".join(token.text for token in answer.tokens)
        assert (
            text
            == answer.generation.text
            == detector.tokenizer.decode(answer.generation.token_ids, skip_special_tokens=True)
        )


def test_wrong_options_name_their_field(detector: Detector) -> None:
    for options, field in (
        ({"stop_strings": ["a", ""]}, "stop_strings[1]"),
        ({"stop_strings": "abc"}, "stop_strings"),
        ({"stop_when_probability_above": 1.0}, "stop_when_probability_above"),
        ({"stop_when_probability_above": float("nan")}, "stop_when_probability_above"),
        ({"minimum_tokens": 0}, "minimum_tokens"),
        ({"score_every": True}, "score_every"),
    ):
        with pytest.raises(InvalidInput) as caught:
            detector.generate(QUESTION, **options)
        assert caught.value.field == field
