"""Answers that come and go at random while others are written, and the score of every prefix read at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from lapwing_detector.embedded import model_path
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.streams import Stream, Streams
from lapwing_detector.tokens import TokenIds
from tests.detector.running_sums import a_probe, said
from tests.detector.tiny_models import long_model, new_model, token_ids

LONGEST = 120
"""Tokens of a prompt and its answer: past the room that is made for the first 64."""


@cache
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(model_path())


def language_model(family: str = "llama", **changes: object) -> LanguageModel:
    """A tiny model that never ends by itself."""
    model = long_model(family) if family in ("longrope", "dynamic") else new_model(family, **changes)
    return endless(LanguageModel(model, tokenizer()))


def endless(model: LanguageModel) -> LanguageModel:
    vars(model)["stop_tokens"] = frozenset()
    return model


def prompt(tokens: int, seed: int = 0) -> TokenIds:
    return TokenIds(tuple(token_ids(1, tokens, seed=seed)[0].tolist()), ())


@contextmanager
def forwards_of(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of the ids of every forward inside."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@dataclass
class Answer:
    """What became of one stream."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    generation: Generation | None = None
    error: Exception | None = None


def finished(streams: Streams) -> dict[Stream, Answer]:
    """Steps until nothing is left to do."""
    answers: dict[Stream, Answer] = {}
    while len(streams):
        step(streams, answers)
    return answers


def written(
    model: LanguageModel, probe: Probe, tokens: int, lengths: Sequence[int], **options: object
) -> dict[Stream, Answer]:
    """Answers of so many tokens to prompts of some lengths, begun together; their lengths are their seeds."""
    streams = Streams(model)
    for length in lengths:
        chosen = GenerationOptions(**{"max_new_tokens": tokens, "temperature": 1.0, "seed": length, **options})
        streams.add(prompt(length, length), probe, chosen)
    return finished(streams)


def step(streams: Streams, answers: dict[Stream, Answer]) -> None:
    """One step, whose events are kept."""
    for stream, event in streams.step():
        answer = answers.setdefault(stream, Answer())
        assert answer.generation is answer.error is None, "nothing comes after the end"
        if isinstance(event, Exception):
            answer.error = event
        elif isinstance(event, Generation):
            answer.generation = event
        else:
            assert event.index == len(answer.tokens)
            answer.tokens.append(event)


def scheduled(model: LanguageModel, probes: list[Probe], seed: int, count: int = 6) -> dict[Stream, Answer]:
    """Answers of random lengths that join, pause, go on and are cancelled at random."""
    chance, streams = random.Random(seed), Streams(model)
    answers: dict[Stream, Answer] = {}
    waiting = list(range(count))
    while waiting or len(streams) or any(stream.paused and not stream.ended for stream in answers):
        for _ in range(min(len(waiting), chance.choice((0, 0, 1, 3)))):
            one = waiting.pop()
            options = GenerationOptions(
                max_new_tokens=chance.randrange(1, 40), temperature=chance.choice((0.0, 1.0)), seed=one
            )
            ids = prompt(chance.randrange(1, LONGEST - 40), seed * count + one)
            answers[streams.add(ids, probes[one % len(probes)], options)] = Answer()
        for stream in answers:
            chosen = chance.random()
            if chosen < 0.01:
                streams.cancel(stream)
            elif chosen < 0.08:
                streams.pause(stream)
            elif chosen < 0.3:
                streams.resume(stream)
        resting = {stream: len(answer.tokens) for stream, answer in answers.items() if not stream.active}
        step(streams, answers)
        assert all(len(answers[stream].tokens) == tokens for stream, tokens in resting.items())
    return answers


def worst(model: LanguageModel, answers: dict[Stream, Answer]) -> float:
    """Largest difference of a running logit, or of the last one, to that of the same ids read at once, alone."""
    differences = [0.0]
    for stream, answer in answers.items():
        assert answer.error is None
        written = [token.token_id for token in answer.tokens]
        for token in answer.tokens:
            differences.append(_difference(model, stream, written[: token.index + 1], token.logit))
        if answer.generation:
            assert list(answer.generation.token_ids) == written
            differences.append(_difference(model, stream, written, answer.generation.detection.logit))
    return max(differences)


def _difference(model: LanguageModel, stream: Stream, written: list[int], logit: float | None) -> float:
    [summary] = model.summaries([[*stream.prompt.prompt_ids, *written]], stream.probe.heads)
    expected = said(stream.probe, summary)
    assert (expected is None) == (logit is None)
    return 0.0 if logit is None or expected is None else abs(logit - expected)


def two_probes() -> list[Probe]:
    return [a_probe(), a_probe(k=2)]


def of_layer_1(probe: Probe) -> Probe:
    """The same, reading that layer alone."""
    kept = np.array([False, True, False])[:, None]
    selected = np.ones_like(probe.selected) & kept
    return replace(probe, selected=selected, weights=np.full_like(probe.weights, 0.5) * kept[..., None])


def ids_of(answers: dict[Stream, Answer]) -> list[list[int]]:
    return [[token.token_id for token in answer.tokens] for answer in answers.values()]
