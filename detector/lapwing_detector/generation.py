"""Writing an answer token by token, each with the score of all that stands so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lapwing_detector.capture import capture_attention
from lapwing_detector.detection import Detection
from lapwing_detector.errors import InvalidInput, TooLong
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.probe import Probe
from lapwing_detector.running import RunningLogits
from lapwing_detector.scoring import Stopwatch, detect
from lapwing_detector.tokens import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GeneratedToken:
    """One token of the answer and the running score."""

    index: int
    """Place in the answer, from 0."""

    token_id: int
    text: str
    """What this token adds to the text; empty while a character is incomplete."""

    log_probability: float
    """Natural logarithm, of the model's own distribution (temperature 1)."""

    probability: float | None
    """Running probability that the answer so far is made up; None while it is too short to score."""

    logit: float | None


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Of the answer, without the end-of-sequence token."""

    finish_reason: str
    """`stop`: the model ended by itself; `length`: it reached the limit."""

    detection: Detection


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InvalidInput("max_new_tokens", f"is {self.max_new_tokens!r}; it must be a whole number, at least 1")
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise InvalidInput("temperature", f"is {self.temperature!r}; it must be finite and at least 0")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InvalidInput("top_p", f"is {self.top_p!r}; it must lie in (0, 1]")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 63):
            raise InvalidInput("seed", f"is {self.seed!r}; it must be a whole number in [0, 2^63)")


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Chooser:
    """Takes the likeliest token, or draws one."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        self.random = torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> tuple[int, float]:
        """A token and its log-probability at temperature 1, from the logits of one position, (1, vocabulary)."""
        logits = logits.float()
        if self.greedy or bool(logits.isnan().any()):  # whose attention is not finite either, which the detection says
            token = int(logits.argmax(-1))
        else:
            read = torch.empty(1, 0, dtype=torch.long)
            # The largest becomes 0, so that no temperature, however low, makes it infinite.
            chances = self.warpers(read, logits - logits.max()).softmax(-1)  # type: ignore[arg-type]
            token = int(torch.multinomial(chances, 1, generator=self.random))
        return token, float(logits.log_softmax(-1)[0, token])


class TextStream:
    """Text of a growing list of tokens, piece by piece, whole characters only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0
        """First token of the stretch that is decoded: decoding from a boundary gives the spaces that merges need."""

        self.given = 0
        """Tokens whose text has been given out."""

    def push(self, token_id: int, last: bool = False) -> str:
        """The text that the token completes: none while a character of several tokens is open, all with the last."""
        self.ids.append(token_id)
        before = self._decode(self.ids[self.start : self.given])
        now = self._decode(self.ids[self.start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        self.start, self.given = self.given, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def generate(
    language_model: LanguageModel, probe: Probe, prompt: TokenIds, sampling: Sampling, false_positive_rate: float
) -> Iterator[GeneratedToken | Generation]:
    """See `Detector.generate`. Checks the prompt at once; the model runs as the iterator is advanced."""
    most = language_model.max_tokens
    room = most - len(prompt.prompt_ids)
    if room < 1:
        raise TooLong("prompt", f"has {len(prompt.prompt_ids)} tokens, the model takes {most} in all; shorten it")
    limit = min(room, sampling.max_new_tokens)
    return _steps(language_model, probe, prompt, Chooser(sampling), limit, false_positive_rate)


def _steps(
    language_model: LanguageModel,
    probe: Probe,
    prompt: TokenIds,
    chooser: Chooser,
    limit: int,
    false_positive_rate: float,
) -> Iterator[GeneratedToken | Generation]:
    clock, stream = Stopwatch(), TextStream(language_model.tokenizer)
    captured = capture_attention(language_model.model, heads=probe.heads or None)
    running = RunningLogits(probe, captured)
    cache: Any = None

    def step(ids: tuple[int, ...]) -> torch.Tensor:
        nonlocal cache
        # The capture is left between the steps, so that others may use the model.
        with clock.stage("forward"), captured.resume(), torch.inference_mode():
            output = language_model.forward(language_model.tensor([ids]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1].cpu()  # (1, vocabulary)
        return logits

    def verdict() -> Detection:
        ids = prompt.followed_by(written)
        return detect(probe, captured.summaries()[0], ids, false_positive_rate, clock.seconds)

    written: list[int] = []
    detection: Detection | None = None
    token, log_probability = chooser.choose(step(prompt.prompt_ids))
    while token not in language_model.stop_tokens:
        # The row of a token exists only once it has been fed, so it is fed before it is scored and given out.
        following = chooser.choose(step((token,)))
        written.append(token)
        last = len(written) == limit or following[0] in language_model.stop_tokens
        detection = verdict() if last else None
        [logit] = [detection.logit] if detection else running.logits()
        probability = detection.probability if detection else _running(probe, logit, len(written))
        yield GeneratedToken(len(written) - 1, token, stream.push(token, last), log_probability, probability, logit)
        if last:
            break
        token, log_probability = following
    reason = "length" if len(written) == limit else "stop"
    text = str(language_model.tokenizer.decode(written, skip_special_tokens=True))
    yield Generation(text, prompt.prompt_ids, tuple(written), reason, detection or verdict())


def _running(probe: Probe, logit: float | None, response_tokens: int) -> float | None:
    return None if logit is None else probe.running_probability(logit, response_tokens)
