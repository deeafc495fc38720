"""One answer while it is written: its tokens, its text, its running score, and when it ends. Runs no model."""

from __future__ import annotations

from collections.abc import Callable

from lapwing_detector.answer_text import StopStrings, TextStream
from lapwing_detector.choosing import Chooser
from lapwing_detector.detection import Detection
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import Stopwatch, detect
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import TokenIds


class Stream:
    """One answer, made by `Streams.add`."""

    def __init__(
        self, model: LanguageModel, prompt: TokenIds, probe: Probe, options: GenerationOptions, limit: int
    ) -> None:
        self.prompt, self.probe, self.options = TokenIds(prompt.prompt_ids, ()), probe, options
        self.written: list[int] = []
        """Tokens of the answer that were given out."""

        self.paused = self.ended = False
        self.alone = False
        """It shares no forwards, since it can't or since sharing failed."""

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

    def begin(self, choice: tuple[int, float], summary: Callable[[], AttentionSummary]) -> list[Generation]:
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
        self, following: tuple[int, float], logit: float | None, summary: Callable[[], AttentionSummary]
    ) -> list[GeneratedToken | Generation]:
        """The next token was fed.

        Args:
            following: the token after it, and its log-probability.
            logit: what the probe says of everything up to it; looked at where `wants_logit` asked for it.
            summary: attention of everything up to it.

        Returns:
            That token; behind the last one the finished answer, too.
        """
        (token, log_probability), self._next = self._next, following
        due = self._due
        self.written.append(token)
        reason = "length" if len(self.written) == self._limit else "stop" if following[0] in self._stop_tokens else ""
        detection, running, probability = None, None, None
        if due and not reason:
            if self.options.contributions:
                detection = self._detect(summary)
            running = detection.logit if detection else logit
            if running is not None:
                probability = self.probe.running_probability(running, len(self.written))
            reason = "flagged" if self._too_high(probability) else ""
        text = self._stops.push(self._text.push(token, bool(reason)), bool(reason))
        reason = "stop_string" if self._stops.found else reason
        if reason:
            detection = detection or self._detect(summary)
            running = detection.logit
            # What a reader of the stream is told of the end is the verdict on the whole, unless the end is due to what
            # stood before it.
            probability = probability if reason == "flagged" else detection.probability
        self._parts.append(text)
        shares = detection.token_contributions if detection and self.options.contributions else None
        event = GeneratedToken(
            len(self.written) - 1,
            token,
            text,
            log_probability,
            probability,
            running,
            None if running is None else shares,
        )
        return [event, self._finish(reason, detection)] if reason and detection else [event]

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
        return detect(self.probe, summary(), ids, self.options.false_positive_rate, self.clock.seconds)

    def _finish(self, reason: str, detection: Detection) -> Generation:
        self.ended = True
        return Generation("".join(self._parts), self.prompt.prompt_ids, tuple(self.written), reason, detection)
