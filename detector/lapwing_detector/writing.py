"""One answer while it is written: its tokens, its text, its running score, and when it ends. Runs no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.answer_text import StopStrings, TextStream
from lapwing_detector.choosing import Choice, Chooser
from lapwing_detector.detection import Detection
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import Stopwatch, detect
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.token_statistics import token_contributions
from lapwing_detector.tokens import TokenIds


class Stream:
    """One answer, made by `Streams.add`."""

    def __init__(
        self, model: LanguageModel, prompt: TokenIds, probe: Probe, options: GenerationOptions, limit: int
    ) -> None:
        self.prompt, self.probe, self.options = TokenIds(prompt.prompt_ids, ()), probe, options
        self.written: list[int] = []
        """Tokens of the answer that were given out."""

        self._said: list[float] = []
        """Their log-probabilities."""

        self.paused = self.ended = False
        self.alone = False
        """It shares no forwards, since it can't or since sharing failed."""

        self.passed = 0
        """Steps in which another prompt was read."""

        self.clock = Stopwatch()
        self.chooser = Chooser(options)
        self._limit, self._stop_tokens = limit, model.stop_tokens
        self._text, self._stops, self._parts = TextStream(model.tokenizer), StopStrings(options.stop_strings), [""]
        self._next = (0, 0.0)

    @property
    def active(self) -> bool:
        """Whether it takes part in the next step."""
        return not (self.paused or self.ended)

    @property
    def next_token(self) -> int:
        """The token that was chosen, and is fed before it is scored and given out: only then has it a row."""
        return self._next[0]

    def begin(self, choice: Choice, summary: Callable[[], AttentionSummary]) -> list[Generation]:
        """The prompt was read.

        Args:
            choice: the first token and its log-probability.
            summary: attention of the prompt.

        Returns:
            The finished answer where the model has nothing to say.
        """
        self._next = choice
        if choice[0] not in self._stop_tokens:
            return []
        return [self._finish("stop", self._detect(summary))]

    @property
    def wants_logit(self) -> bool:
        """Whether the running logit is asked for once the next token is fed, if the answer does not end there."""
        return self._due and not self.options.contributions

    @property
    def _due(self) -> bool:
        return (len(self.written) + 1) % self.options.score_every == 0

    def advance(
        self, following: Choice, logit: float | None, summary: Callable[[], AttentionSummary]
    ) -> list[GeneratedToken | Generation]:
        """The next token was fed.

        Args:
            following: the token after it, and its log-probability.
            logit: what the probe reads in the attention of everything up to it, where `wants_logit` asked for it.
            summary: attention of everything up to it.

        Returns:
            That token; behind the last one the finished answer, too.
        """
        (token, log_probability), self._next = self._next, following
        said = _NOTHING
        due = self._due
        self.written.append(token)
        self._said.append(log_probability)
        reason = "length" if len(self.written) == self._limit else "stop" if following[0] in self._stop_tokens else ""
        if due and not reason:
            said = self._running(logit, summary)
            reason = "flagged" if self._too_high(said.probability) else ""
        text = self._stops.push(self._text.push(token, bool(reason)), bool(reason))
        self._parts.append(text)
        reason = "stop_string" if self._stops.found else reason
        whole = [self._finish(reason, self._detect(summary))] if reason else []
        for generation in whole:
            last = self._said_by(generation.detection)
            # The probability that ended it stays to be seen; other last tokens are told with the verdict on the whole.
            said = replace(last, probability=said.probability) if reason == "flagged" else last
        index = len(self.written) - 1
        event = GeneratedToken(index, token, text, log_probability, said.probability, said.logit, said.contributions)
        return [event, *whole]

    def _running(self, logit: float | None, summary: Callable[[], AttentionSummary]) -> _Said:
        if self.options.contributions:
            said = self._said_by(self._detect(summary))
        else:
            said = _Said(self._with_statistics(logit))
        if said.logit is None:
            return said
        return replace(said, probability=self.probe.running_probability(said.logit, len(self.written)))

    def _said_by(self, detection: Detection) -> _Said:
        shares = detection.token_contributions if self.options.contributions and detection.logit is not None else None
        return _Said(detection.logit, detection.probability, shares)

    def _with_statistics(self, logit: float | None) -> float | None:
        """The logit with what the probe reads beside attention."""
        if logit is None or not self.probe.reads_log_probabilities:
            return logit
        _, statistics = token_contributions(self._said, self.probe.statistic_weights)
        logit += sum(statistics.values())
        return logit if math.isfinite(logit) else None

    def _too_high(self, probability: float | None) -> bool:
        most = self.options.stop_when_probability_above
        return (
            most is not None
            and probability is not None
            and probability > most
            and len(self.written) >= self.options.minimum_tokens
        )

    def _detect(self, summary: Callable[[], AttentionSummary]) -> Detection:
        ids = self.prompt.followed_by(self.written)
        return detect(self.probe, summary(), ids, self.options.false_positive_rate, self.clock.seconds, self._said)

    def _finish(self, reason: str, detection: Detection) -> Generation:
        self.ended = True
        return Generation("".join(self._parts), self.prompt.prompt_ids, tuple(self.written), reason, detection)


@dataclass(frozen=True)
class _Said:
    """What is said of an answer at one token; nothing where it is not scored."""

    logit: float | None = None
    probability: float | None = None
    contributions: NDArray[np.float32] | None = None


_NOTHING = _Said()
