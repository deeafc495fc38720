"""Several answers that one model writes at once, sharing its forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lapwing_detector.batch import Batch
from lapwing_detector.choosing import choose
from lapwing_detector.errors import InvalidInput, TooLong
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.rotary import switching_points
from lapwing_detector.running import RunningLogits
from lapwing_detector.tokens import TokenIds
from lapwing_detector.writing import Stream

__all__ = ["Stream", "Streams"]

Event = GeneratedToken | Generation | Exception

MOST_READ = 8192
"""Tokens of prompts, padding included, that are read in one forward."""


@dataclass
class _Group:
    """Answers in the order of the rows of their batch."""

    streams: list[Stream]
    batch: Batch
    running: RunningLogits = field(init=False)

    def __post_init__(self) -> None:
        self.running = RunningLogits(self.streams[0].probe, self.batch)

    @property
    def key(self) -> str:
        """The same for groups that may become one."""
        first = self.streams[0]
        return f"alone {id(first)}" if first.alone else first.probe.revision

    def rows(self, wanted: Callable[[Stream], bool]) -> list[int]:
        return [row for row, stream in enumerate(self.streams) if wanted(stream)]


class Streams:
    """Answers that are written at once: those with the same probe share every forward.

        streams = detector.streams()
        first = streams.add(detector.tokens("Where is the lapwing at home?"), probe, GenerationOptions(seed=1))
        while len(streams):
            for stream, event in streams.step():
                ...

    What is said of an answer does not depend on the others, whenever they come and go. For one thread only.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._waiting: list[Stream] = []
        """Their prompts are not read yet."""

        self._groups: list[_Group] = []
        parameters = model.parameters
        self._shares: bool | None = None if {"attention_mask", "position_ids"} <= parameters else False
        """Whether answers can share forwards; None until the first cache has been seen."""

        if switching_points(model.model.config.get_text_config(decoder=True)):
            self._shares = False  # in a batch all would have the frequencies of the longest

    def __len__(self) -> int:
        """Answers that take part in the next step."""
        return sum(stream.active for stream in self._all())

    def add(self, prompt: TokenIds, probe: Probe, options: GenerationOptions) -> Stream:
        """One more answer, from the next step on; nothing runs before.

        Args:
            prompt: its `prompt_ids`, at least one.
            probe: that scores it; fitted on this model, which `Detector.require` checks.
            options: how it is written.

        Raises:
            TooLong: the prompt leaves no room for an answer.
            InvalidInput: it is empty.
        """
        most, count = self._model.max_tokens, len(prompt.prompt_ids)
        if count < 1:
            raise InvalidInput("prompt", "has no tokens; give the model something to answer")
        if count >= most:
            raise TooLong("prompt", f"has {count} tokens, the model takes {most} in all; shorten it")
        stream = Stream(self._model, prompt, probe, options, min(most - count, options.max_new_tokens))
        self._waiting.append(stream)
        return stream

    def cancel(self, stream: Stream) -> None:
        """End an answer without another word; one that has ended stays as it is."""
        stream.ended = True
        self._tidy()

    def pause(self, stream: Stream) -> None:
        """Leave an answer as it is, with its cache, until it is resumed."""
        stream.paused = True

    def resume(self, stream: Stream) -> None:
        """Go on with an answer that was paused."""
        stream.paused = False

    def step(self) -> list[tuple[Stream, Event]]:
        """One more token of every answer that is not paused; the prompts of new ones are read before.

        Returns:
            What became ready: a token of each answer, behind its last one the whole, and where an answer failed the
            error, which is its end and only its own.
        """
        events = list(self._read_waiting())
        self._tidy()
        events += self._regroup()
        for group in list(self._groups):
            if group.streams[0].active:
                events += self._advance(group)
        self._tidy()
        return events

    def _all(self) -> Iterator[Stream]:
        yield from self._waiting
        for group in self._groups:
            yield from group.streams

    def _tidy(self) -> None:
        self._waiting = [stream for stream in self._waiting if not stream.ended]
        self._groups = [group for group in self._groups if not all(stream.ended for stream in group.streams)]

    # Prompts.

    def _read_waiting(self) -> Iterator[tuple[Stream, Event]]:
        new = [stream for stream in self._waiting if stream.active]
        self._waiting = [stream for stream in self._waiting if not stream.active]
        if self._shares is None and new:
            yield from self._read([new.pop(0)])
        for together in _together(new) if self._shares else [[stream] for stream in new]:
            yield from self._read(together)

    def _read(self, streams: list[Stream]) -> Iterator[tuple[Stream, Event]]:
        probe, start = streams[0].probe, time.perf_counter()
        try:
            batch, logits = Batch.read(
                self._model, probe.heads or None, [stream.prompt.prompt_ids for stream in streams]
            )
        except Exception as error:
            if len(streams) == 1:
                yield _failed(streams[0], error)
            else:
                for stream in streams:
                    yield from self._read([stream])
            return
        if self._shares is None:
            self._shares = batch.plain
        for stream in streams:
            stream.alone = stream.alone or not (self._shares and batch.plain)
        group = _Group(streams, batch)
        self._groups.append(group)
        for row, (stream, choice) in enumerate(zip(streams, self._choices(group, logits, start), strict=True)):
            for event in stream.begin(choice, partial(batch.summary, row)):
                yield stream, event

    # Groups.

    def _regroup(self) -> list[tuple[Stream, Event]]:
        """Puts together all that may share a forward, and takes out what is paused or has ended."""
        before, self._groups = self._groups, []
        active: dict[str, list[tuple[_Group, list[int]]]] = {}
        events: list[tuple[Stream, Event]] = []
        for group in before:
            paused, going = (group.rows(lambda one: one.paused and not one.ended), group.rows(lambda one: one.active))
            if going:
                active.setdefault(group.key, []).append((group, going))
            if paused:
                events += self._gather([(group, paused)])
        for parts in active.values():
            events += self._gather(parts)
        return events

    def _gather(self, parts: list[tuple[_Group, list[int]]]) -> list[tuple[Stream, Event]]:
        group, rows = parts[0]
        if len(parts) == 1 and len(rows) == len(group.streams):
            self._groups.append(group)
            return []
        streams = [group.streams[row] for group, rows in parts for row in rows]
        try:
            self._groups.append(_Group(streams, Batch.gather([(group.batch, rows) for group, rows in parts])))
        except Exception as error:
            if len(parts) > 1:  # perhaps there is memory for each of them
                return [event for part in parts for event in self._gather([part])]
            return [_failed(stream, error) for stream in streams]
        return []

    # Steps.

    def _advance(self, group: _Group) -> Iterator[tuple[Stream, Event]]:
        start = time.perf_counter()
        try:
            logits = group.batch.feed([stream.next_token for stream in group.streams])
        except Exception as error:
            yield from self._advance_apart(group, error)
            return
        yield from self._give_out(group, self._choices(group, logits, start))

    def _advance_apart(self, group: _Group, error: Exception) -> Iterator[tuple[Stream, Event]]:
        """A forward failed: find out whose fault it was."""
        self._groups.remove(group)
        try:
            if len(group.streams) == 1:
                raise error
            batches = group.batch.apart()
        except Exception as why:
            yield from (_failed(stream, why) for stream in group.streams)
            return
        for stream, batch in zip(group.streams, batches, strict=True):
            stream.alone = True
            alone = _Group([stream], batch)
            self._groups.append(alone)
            yield from self._advance(alone)
        if any(stream.ended for stream in group.streams):
            for stream in group.streams:
                stream.alone = False

    def _choices(self, group: _Group, logits: Tensor, start: float) -> list[tuple[int, float]]:
        seconds = time.perf_counter() - start
        for stream in group.streams:
            stream.clock.add("forward", seconds)
        return choose([stream.chooser for stream in group.streams], logits)

    def _give_out(self, group: _Group, choices: list[tuple[int, float]]) -> Iterator[tuple[Stream, Event]]:
        wanted = any(stream.wants_logit for stream in group.streams)
        logits: Sequence[float | None] = group.running.logits() if wanted else [None] * len(group.streams)
        for row, (stream, choice) in enumerate(zip(group.streams, choices, strict=True)):
            for event in stream.advance(choice, logits[row], partial(group.batch.summary, row)):
                yield stream, event


def _failed(stream: Stream, error: Exception) -> tuple[Stream, Exception]:
    stream.ended = True
    return stream, error


def _together(streams: Iterable[Stream]) -> list[list[Stream]]:
    """Streams whose prompts are read in one forward, which is worth it while at most half of it is padding."""
    together: list[list[Stream]] = []
    real = 0
    for stream in sorted(streams, key=lambda one: (one.probe.revision, -len(one.prompt.prompt_ids))):
        count = len(stream.prompt.prompt_ids)
        if together and together[-1][0].probe.revision == stream.probe.revision:
            whole = (len(together[-1]) + 1) * len(together[-1][0].prompt.prompt_ids)
            if whole <= min(2 * (real + count), MOST_READ):
                together[-1].append(stream)
                real += count
                continue
        together.append([stream])
        real = count
    return together
