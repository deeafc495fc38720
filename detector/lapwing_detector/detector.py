"""A model, its tokenizer and a probe: scores answers that are given, and answers while they are written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lapwing_detector import embedded
from lapwing_detector.detection import DEFAULT_FALSE_POSITIVE_RATE, Detection
from lapwing_detector.errors import DetectorError, InvalidInput, TooLong
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.log_probabilities import LogProbabilities, read_with_log_probabilities
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import Scored, ScoreJob, Stopwatch, among, attempted, detect
from lapwing_detector.streams import Streams
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import Prompt, Response, TokenIds, build_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Detector:
    """Scores how likely the answers of one language model are made up.

    Not safe for use by several threads at once; several `generate` iterators may take turns in one thread.
    """

    def __init__(self, language_model: LanguageModel, probe: Probe) -> None:
        self.language_model = language_model
        self.probe = probe

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel | None = None,
        probe: str | Path | Probe | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | None = None,
        device: str | torch.device | None = None,
    ) -> Detector:
        """Loads a model with the probe that was fitted on it.

        Args:
            model: Hub id, directory, or a loaded model (then with `tokenizer`); the embedded Atlas without it.
            probe: directory, Hub id, or a loaded probe; the embedded one for the embedded model.
            tokenizer: of a loaded model.
            dtype: `float32`, `bfloat16` or `float16`; as stored without it, but float32 for float16 on a CPU.
            device: such as `cuda`; the CPU without it.

        Raises:
            InvalidInput: the model can't be found, or one of two that belong together is missing.
            ProbeMismatch: the probe was fitted on another model.
            ProbeCorrupt: the probe directory is damaged.
            UnsupportedModel: its attention can't be captured.
        """
        if probe is None and model is not None:
            raise InvalidInput("probe", "a model of your own needs a probe fitted on it: lapwing train --help")
        if model is None or isinstance(model, str | Path):
            loaded = LanguageModel.load(model, dtype=dtype, device=device)
        elif tokenizer is None:
            raise InvalidInput("tokenizer", "a loaded model needs its tokenizer; pass tokenizer=...")
        else:
            loaded = LanguageModel(model, tokenizer)
        fitted = probe if isinstance(probe, Probe) else Probe.from_pretrained(probe or embedded.probe_path())
        return cls(loaded, fitted)

    @property
    def model(self) -> PreTrainedModel:
        """The model, as transformers knows it."""
        return self.language_model.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.language_model.tokenizer

    @property
    def identity(self) -> ModelIdentity:
        """Which model it is."""
        return self.language_model.identity

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together."""
        return self.language_model.max_tokens

    @property
    def probe(self) -> Probe:
        """The probe that scores; setting another one takes effect with the next call, if it fits the model."""
        return self._probe

    @probe.setter
    def probe(self, probe: Probe) -> None:
        self.require(probe)
        self._probe = probe

    def require(self, probe: Probe) -> None:
        """Refuses a probe that was fitted on another model, and warns of one that was fitted in another dtype.

        Raises:
            ProbeMismatch: names what differs.
        """
        probe.require(self.identity)
        if probe.identity.dtype != self.identity.dtype:
            warnings.warn(
                f"the probe {probe.name!r} was fitted in {probe.identity.dtype}, the model runs in "
                f"{self.identity.dtype}: scores shift a little",
                stacklevel=3,
            )

    def tokens(self, prompt: Prompt, response: Response | None = None) -> TokenIds:
        """The ids that `score` reads for this prompt and response; see `build_ids`.

        Tokens that end an answer are dropped from the end of the response: they are no part of what is scored.

        Raises:
            InvalidInput: with the field that can't be used.
            TooLong: more tokens than the model was made for.
        """
        ids = build_ids(self.tokenizer, prompt, response, opening=self.language_model.opening)
        ids = TokenIds(ids.prompt_ids, without_end(ids.response_ids, self.language_model.stop_tokens))
        if max(ids.all, default=0) >= self.language_model.vocabulary:
            raise InvalidInput(
                "prompt",
                f"tokenises to id {max(ids.all)}, the model has {self.language_model.vocabulary}; "
                "use the tokenizer that belongs to it",
            )
        count = len(ids.all)
        if count > self.max_tokens:
            field = "prompt" if len(ids.prompt_ids) > self.max_tokens else "response"
            raise TooLong(
                field, f"{count} tokens with prompt and response, the model takes {self.max_tokens}; shorten it"
            )
        return ids

    def score(
        self, prompt: Prompt, response: Response, *, false_positive_rate: float = DEFAULT_FALSE_POSITIVE_RATE
    ) -> Detection:
        """How likely the response to the prompt is made up.

        Args:
            prompt: text, chat messages (`[{"role": ..., "content": ...}]`), or token ids.
            response: text or token ids, without the end-of-sequence token.
            false_positive_rate: operating point at which `flagged` is decided; one that the probe stores.

        Returns:
            A detection; UNSCORED when the text is too short for the probe or the attention is not finite.

        Raises:
            InvalidInput: with the field that can't be used; TooLong if it is the length.
        """
        [result] = self.score_batch([(prompt, response)], false_positive_rate=false_positive_rate)
        if isinstance(result, DetectorError):
            raise result
        return result

    def score_batch(
        self,
        items: Sequence[tuple[Prompt, Response]],
        *,
        false_positive_rate: float = DEFAULT_FALSE_POSITIVE_RATE,
    ) -> list[Detection | DetectorError]:
        """Scores several items in one padded forward; a bad item fails alone, in its place of the list.

        Args:
            items: (prompt, response), each as for `score`.
            false_positive_rate: operating point at which `flagged` is decided.

        Returns:
            For each item its detection, or the error that `score` would have raised.
        """
        probe = self.probe  # one for the whole batch, whatever is set meanwhile
        results: list[Detection | DetectorError] = []
        good: list[tuple[int, TokenIds, Stopwatch]] = []
        for index, (prompt, response) in enumerate(items):
            clock = Stopwatch()
            try:
                with clock.stage("tokenise"):
                    ids = self.tokens(prompt, response)
            except DetectorError as error:
                results.append(error)
            else:
                good.append((index, ids, clock))
        scored = self.score_ids([ScoreJob(ids, probe, false_positive_rate) for _, ids, _ in good])
        for (index, _, clock), one in zip(good, scored, strict=True):
            results.insert(index, replace(one.detection, seconds=clock.seconds | dict(one.detection.seconds)))
        return results

    def score_ids(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        """Scores several sequences, each by probes of its own, in one padded forward.

        Args:
            jobs: ids as `tokens` makes them, with probes that fit the model (`require`).

        Returns:
            One for each job, in their order. A shadow that can't score costs nobody else a verdict.
        """
        clock, results = Stopwatch(), []
        with clock.stage("forward"):
            readings = self._read(jobs)
        for job, (summary, said) in zip(jobs, readings, strict=True):
            detection, *shadows = [
                partial(detect, probe, among(summary, probe), job.ids, job.false_positive_rate, clock.seconds, said)
                for probe in (job.probe, *job.shadows)
            ]
            results.append(Scored(detection(), tuple(map(attempted, shadows))))
        return results

    def _read(self, jobs: Sequence[ScoreJob]) -> Sequence[tuple[AttentionSummary, LogProbabilities | None]]:
        """What the probes of the jobs read, and no more."""
        probes = {id(probe): probe for job in jobs for probe in (job.probe, *job.shadows)}.values()
        read: dict[int, set[int]] = {}
        for probe in probes:
            for layer, of_layer in probe.heads.items():
                read.setdefault(layer, set()).update(of_layer)
        heads = {layer: tuple(sorted(read[layer])) for layer in sorted(read)} or None
        if any(probe.reads_log_probabilities for probe in probes):
            return read_with_log_probabilities(self.language_model, [job.ids for job in jobs], heads)
        return [(one, None) for one in self.language_model.summaries([job.ids.all for job in jobs], heads)]

    def streams(self) -> Streams:
        """Several answers that are written at once and share forwards; none so far."""
        return Streams(self.language_model)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        false_positive_rate: float = DEFAULT_FALSE_POSITIVE_RATE,
        stop_strings: Sequence[str] = (),
        stop_when_probability_above: float | None = None,
        minimum_tokens: int = 1,
        score_every: int = 1,
        contributions: bool = False,
    ) -> Iterator[GeneratedToken | Generation]:
        """Writes an answer and scores it after every token.

        Args:
            prompt: text, chat messages, or token ids.
            max_new_tokens: at most so many; fewer where the model's context ends.
            temperature: 0 always takes the likeliest token.
            top_p: smallest share of probability from which a token is drawn, in (0, 1].
            seed: makes sampling repeatable.
            false_positive_rate: operating point of the last detection.
            stop_strings: the answer ends where one of them appears in its text, which leaves it out.
            stop_when_probability_above: ends the answer as soon as its running probability is above this; in [0, 1).
            minimum_tokens: written before `stop_when_probability_above` may end the answer.
            score_every: every how many tokens there is a score; the last token has one in any case.
            contributions: whether scored tokens come with the shares of all tokens so far.

        Yields:
            A `GeneratedToken` for each token, with the score of all up to it; last the `Generation`.
            Leaving the iterator ends the generation.

        Raises:
            InvalidInput: with the field that can't be used.
        """
        if self.probe.training.get("mode") == "supplied":
            warnings.warn(
                f"the probe {self.probe.name!r} was fitted on texts that the model only read; of what it writes itself "
                "the scores may be off: fit one on its own answers (lapwing generate)",
                stacklevel=2,
            )
        if isinstance(stop_strings, str):
            raise InvalidInput("stop_strings", "is one text; give a list of them")
        options = GenerationOptions(
            max_new_tokens,
            temperature,
            top_p,
            seed,
            false_positive_rate,
            tuple(stop_strings),
            stop_when_probability_above,
            minimum_tokens,
            score_every,
            contributions,
        )
        streams = self.streams()
        streams.add(self.tokens(prompt), self.probe, options)
        return _events(streams)


def _events(streams: Streams) -> Iterator[GeneratedToken | Generation]:
    """What becomes of the only stream."""
    while len(streams):
        for _, event in streams.step():
            if isinstance(event, Exception):
                raise event
            yield event


def without_end(ids: tuple[int, ...], stops: frozenset[int]) -> tuple[int, ...]:
    """The ids without the stop tokens at their end, as `model.generate` leaves them there."""
    length = len(ids)
    while length and ids[length - 1] in stops:
        length -= 1
    return ids[:length]
