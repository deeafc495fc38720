"""A tiny engine: one token for each byte, and a logit that is made of the ids, so that a mix-up shows."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.calibration import Calibration
from lapwing_detector.detection import Detection, HeadContribution, Reason, State
from lapwing_detector.errors import InvalidInput, TooLong
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe, Threshold
from lapwing_detector.scoring import Scored, ScoreJob
from lapwing_detector.tokens import TokenIds

VOCABULARY = 256
CONTEXT = 400

LAPLACIAN, ATTENTION_SCORE = "laplacian_eigenvalues.v1", "attention_score.v1"


def an_identity(name: str = "fake-model") -> ModelIdentity:
    digest, sample = "ab" * 32, (0.5, 0.25)
    weights = hashlib.sha256(np.array(sample, "<f4").tobytes()).hexdigest()
    return ModelIdentity(name, "", digest, digest, weights, "float32", "none", digest, digest, 3, 3, sample)


def a_probe(name: str = "fake-probe", layers: int = 2, heads: int = 3, **changes: Any) -> Probe:
    """A probe whose every number is different."""
    generator = np.random.default_rng(7)
    selected = np.ones((layers, heads), bool)
    selected[0, 0] = False
    weights = generator.normal(size=(layers, heads, 3)).astype(np.float32) * selected[..., None]
    values = {
        f"{feature}/{statistic}": generator.uniform(size=(layers, heads)).astype(np.float32)
        for feature in (LAPLACIAN, ATTENTION_SCORE)
        for statistic in ("P_VALUE", "Q_VALUE", "AUROC", "HEAD_PROBE")
    }
    fields: dict[str, Any] = {
        "name": name,
        "features": (LAPLACIAN,),
        "k": 3,
        "layers": tuple(range(1, layers + 1)),
        "weights": weights,
        "bias": -0.25,
        "selected": selected,
        "calibration": Calibration(1.5, 0.1),
        "thresholds": (Threshold(0.01, 2.0, None, 0), Threshold(0.05, 0.5, 0.04, 100), Threshold(0.1, 0.0, 0.09, 100)),
        "identity": an_identity(),
        "statistics": values,
        "metrics": {
            "auroc": 0.75,
            "interval": [0.7, 0.8],
            "spread": float("nan"),
            "examples": {"missed": [{"prompt": "a secret"}]},
        },
        "training": {"items": 100},
    }
    return Probe(**fields | changes)


@dataclass(frozen=True)
class FakeToken:
    index: int
    token_id: int
    text: str
    log_probability: float
    probability: float | None
    logit: float | None
    token_contributions: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class FakeGeneration:
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    detection: Detection


class PoisonError(RuntimeError):
    """What a forward fails with that reads a poisonous token."""


@dataclass
class FakeEngine:
    """Knows of itself what was asked of it."""

    identity: ModelIdentity = field(default_factory=an_identity)
    max_tokens: int = CONTEXT
    before: Callable[[], None] = lambda: None
    """Called by the worker before each forward: a gate to hold it, or something to raise."""

    poison: int = -1
    """A forward that reads this token fails as a whole."""

    tokenised: int = 0
    """Times that something was tokenised, well or not."""

    forwards: int = 0
    steps: int = 0
    """Tokens that were generated, of all streams together."""

    closed: int = 0
    """Streams that ended: finished, cancelled or failed."""

    threads: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    """"score", "read" (of new prompts) or "step" for each forward."""

    batches: list[list[int]] = field(default_factory=list)
    """Tokens of each sequence, for each forward that scored."""

    scored: list[tuple[int, ...]] = field(default_factory=list)
    """The ids of every sequence that a forward read to score it."""

    def require(self, probe: Probe) -> None:
        probe.require(self.identity)

    def tokens(self, prompt: Any, response: Any = None) -> TokenIds:
        self.threads.add(threading.current_thread().name)
        self.tokenised += 1
        ids = TokenIds(self._ids(prompt, "prompt"), () if response is None else self._ids(response, "response"))
        count = len(ids.all)
        if count > self.max_tokens:
            raise TooLong("response", f"prompt and response have {count} tokens, the model takes {self.max_tokens}")
        return ids

    def score_ids(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        self.forward("score", [job.ids.all for job in jobs])
        self.batches.append([len(job.ids.all) for job in jobs])
        return [
            Scored(
                detect(job.probe, job.ids, job.false_positive_rate),
                tuple(detect(shadow, job.ids, job.false_positive_rate) for shadow in job.shadows),
            )
            for job in jobs
        ]

    def streams(self) -> FakeStreams:
        return FakeStreams(self)

    def score(
        self, prompt: Any, response: Any, *, false_positive_rate: float = 0.05, probe: Probe | None = None
    ) -> Detection:
        """What a test expects; the server does not know this method."""
        return detect(probe or a_probe(), self.tokens(prompt, response), false_positive_rate)

    def forward(self, what: str, sequences: Sequence[tuple[int, ...]]) -> None:
        self.threads.add(threading.current_thread().name)
        self.before()
        self.forwards += 1
        self.calls.append(what)
        self.scored += sequences if what == "score" else []
        if any(self.poison in ids for ids in sequences):
            raise PoisonError("a forward that read poison")

    def _ids(self, content: Any, field: str) -> tuple[int, ...]:
        if isinstance(content, str):
            return tuple(content.encode())
        if isinstance(content[0], dict):
            return tuple("".join(f"<{turn['role']}>{turn['content']}" for turn in content).encode())
        for i, number in enumerate(content):
            if not 0 <= number < VOCABULARY:
                raise InvalidInput(f"{field}_ids[{i}]", f"is {number}; the vocabulary has {VOCABULARY} tokens")
        return tuple(content)


@dataclass(eq=False)
class FakeStream:
    """One generation: the alphabet, again and again."""

    prompt: TokenIds
    probe: Probe
    options: GenerationOptions
    written: tuple[int, ...] = ()
    paused: bool = False
    read: bool = False
    """Whether a forward has read its prompt."""

    @property
    def next_token(self) -> int:
        return 65 + len(self.written) % 26

    @property
    def context(self) -> tuple[int, ...]:
        """What its next forward reads, or has read before."""
        return (*self.prompt.prompt_ids, *self.written, self.next_token) if self.read else self.prompt.prompt_ids


class FakeStreams:
    """Generations that share forwards, as the real ones: one reads all new prompts, and one takes all a token further.

    A paused one takes part in none. Where a forward fails, each that was in it has one alone, to find out whose fault
    it was.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._streams: list[FakeStream] = []
        self.wanted: Callable[[FakeStream], bool] | None = None
        self.tidied = 0

    def __len__(self) -> int:
        return sum(not stream.paused for stream in self._streams)

    def add(self, prompt: TokenIds, probe: Probe, options: GenerationOptions) -> FakeStream:
        if len(prompt.prompt_ids) >= self._engine.max_tokens:
            raise TooLong("prompt", f"has {len(prompt.prompt_ids)} tokens, the model takes {self._engine.max_tokens}")
        stream = FakeStream(prompt, probe, options)
        self._streams.append(stream)
        return stream

    def cancel(self, stream: FakeStream) -> None:
        if stream in self._streams:
            self._end(stream)

    def pause(self, stream: FakeStream) -> None:
        stream.paused = True

    def resume(self, stream: FakeStream) -> None:
        stream.paused = False

    def tidy(self) -> None:
        self.tidied += 1

    def step(self) -> list[tuple[FakeStream, FakeToken | FakeGeneration | Exception]]:
        events = self._forward("read", [stream for stream in self._streams if not stream.read])
        return events + self._forward("step", [stream for stream in self._streams if stream.read])

    def _forward(
        self, what: str, streams: Sequence[FakeStream]
    ) -> list[tuple[FakeStream, FakeToken | FakeGeneration | Exception]]:
        group = [stream for stream in streams if not stream.paused and self._goes_on(stream)]
        if not group:
            return []
        try:
            self._engine.forward(what, [stream.context for stream in group])
        except Exception as error:
            return self._apart(what, group, error)
        if what == "step":
            return [(stream, event) for stream in group for event in self._advance(stream)]
        for stream in group:
            stream.read = True
        return []

    def _apart(
        self, what: str, group: Sequence[FakeStream], error: Exception
    ) -> list[tuple[FakeStream, FakeToken | FakeGeneration | Exception]]:
        if len(group) == 1:
            return [self._failed(group[0], error)]
        return [event for stream in group for event in self._forward(what, [stream])]

    def _goes_on(self, stream: FakeStream) -> bool:
        if self.wanted is None or self.wanted(stream):
            return True
        self._end(stream)
        return False

    def _failed(self, stream: FakeStream, error: Exception) -> tuple[FakeStream, Exception]:
        self._end(stream)
        return stream, error

    def _end(self, stream: FakeStream) -> None:
        self._streams.remove(stream)
        self._engine.closed += 1

    def _advance(self, stream: FakeStream) -> list[FakeToken | FakeGeneration]:
        options, index = stream.options, len(stream.written)
        stream.written += (stream.next_token,)
        self._engine.steps += 1
        room = self._engine.max_tokens - len(stream.prompt.prompt_ids)
        detection = detect(stream.probe, stream.prompt.followed_by(stream.written), options.false_positive_rate)
        reason = reason_to_end(stream, detection, min(options.max_new_tokens, room))
        seen = bool(reason) or (index + 1) % options.score_every == 0
        token = FakeToken(
            index,
            stream.written[-1],
            chr(stream.written[-1]),
            -0.5,
            detection.probability if seen else None,
            detection.logit if seen else None,
            detection.token_contributions if seen and options.contributions else None,
        )
        if not reason:
            return [token]
        self._end(stream)
        text = "".join(map(chr, stream.written))
        cut = min((text.find(one) for one in options.stop_strings if one in text), default=len(text))
        return [token, FakeGeneration(text[:cut], stream.prompt.prompt_ids, stream.written, reason, detection)]


def reason_to_end(stream: FakeStream, detection: Detection, limit: int) -> str:
    """Why a stream ends after its newest token; empty when it does not."""
    options, text, above = stream.options, bytes(stream.written).decode(), stream.options.stop_when_probability_above
    if any(one in text for one in options.stop_strings):
        return "stop_string"
    scored = len(stream.written) % options.score_every == 0 and len(stream.written) >= options.minimum_tokens
    if above is not None and scored and detection.probability is not None and detection.probability > above:
        return "flagged"
    return "length" if len(stream.written) == limit else ""


def detect(probe: Probe, tokens: TokenIds, rate: float) -> Detection:
    """A detection whose logit is the sum of one share of each id."""
    ids = tokens.all
    short = len(ids) < probe.needed_tokens
    shares = np.array([] if short else [(number - 97) / 64 for number in ids], np.float32) / max(1, len(ids))
    logit = None if short else float(shares.sum()) + probe.bias
    threshold = probe.threshold(rate)
    return Detection(
        state=State.UNSCORED if logit is None else State.SCORED,
        reason=Reason.TOO_SHORT if short else None,
        message=f"{len(ids)} tokens, {probe.needed_tokens} needed" if short else "",
        probability=None if logit is None else probe.calibration.probability(logit),
        logit=logit,
        bias=probe.bias,
        flagged=None if logit is None or threshold is None else logit > threshold.logit,
        false_positive_rate=rate,
        flagged_at=() if logit is None else probe.flagged_at(logit),
        probe_name=probe.name,
        probe_revision=probe.revision,
        prompt_tokens=len(tokens.prompt_ids),
        response_tokens=len(tokens.response_ids),
        token_ids=ids,
        token_contributions=shares,
        head_contributions=(HeadContribution(2, 1, 0.5), HeadContribution(1, 2, -0.25)) if not short else (),
        seconds={"forward": 0.0, "probe": 0.0},
    )
