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
from lapwing_detector.running import RunningLogits
from lapwing_detector.tokens import TokenIds
from lapwing_detector.writing import Stream

__all__ = ["Stream", "Streams"]

Event = GeneratedToken | Generation | Exception

MOST_READ = 8192
"""Tokens of prompts, padding included, that are read in one forward."""


@dataclass(eq=False)
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
        self._shares: bool | None = None
        """Whether answers can share forwards; None until the first cache has been seen."""

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
        prompts, start = [stream.prompt.prompt_ids for stream in streams], time.perf_counter()
        try:
            batch, logits = Batch.read(self._model, streams[0].probe.heads or None, prompts)
            if self._shares is None:
                self._shares = batch.plain and self._model.takes_padding
        except Exception as error:
            if len(streams) == 1:
                yield _failed(streams[0], error)
            else:
                for stream in streams:
                    yield from self._read([stream])
            return
        for stream in streams:
            stream.alone = not (self._shares and batch.plain)
        group = _Group(streams, batch)
        self._groups.append(group)
        for row, (stream, choice) in enumerate(zip(streams, _choices(group, logits, start), strict=True)):
            yield from _told(stream, partial(stream.begin, choice, partial(batch.summary, row)))

    # Groups.

    def _regroup(self) -> Iterator[tuple[Stream, Event]]:
        """Puts together all that may share a forward, and takes out what is paused or has ended."""
        before, self._groups = self._groups, []
        active: dict[str, list[tuple[_Group, list[int]]]] = {}
        for group in before:
            if going := group.rows(lambda one: one.active):
                active.setdefault(group.key, []).append((group, going))
            if paused := group.rows(lambda one: one.paused and not one.ended):
                yield from self._gather([(group, paused)])
        for parts in active.values():
            yield from self._gather(parts)

    def _gather(self, parts: list[tuple[_Group, list[int]]]) -> Iterator[tuple[Stream, Event]]:
        group, rows = parts[0]
        if len(parts) == 1 and len(rows) == len(group.streams):
            self._groups.append(group)
            return
        streams = [group.streams[row] for group, rows in parts for row in rows]
        try:
            self._groups.append(_Group(streams, Batch.gather([(group.batch, rows) for group, rows in parts])))
        except Exception as error:
            if len(parts) == 1:
                yield from (_failed(stream, error) for stream in streams)
            else:  # perhaps there is memory for each of them
                for part in parts:
                    yield from self._gather([part])

    # Steps.

    def _advance(self, group: _Group) -> Iterator[tuple[Stream, Event]]:
        start = time.perf_counter()
        try:
            logits = group.batch.feed([stream.next_token for stream in group.streams])
        except Exception as error:
            yield from self._advance_apart(group, error)
            return
        choices = _choices(group, logits, start)
        try:
            wanted = any(stream.wants_logit for stream in group.streams)
            running: list[float | None] = group.running.logits() if wanted else [None] * len(choices)
        except Exception as error:
            yield from (_failed(stream, error) for stream in group.streams)
            return
        for row, (stream, choice) in enumerate(zip(group.streams, choices, strict=True)):
            summary = partial(group.batch.summary, row)
            yield from _told(stream, partial(stream.advance, choice, running[row], summary))

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
        failed = False
        for stream, batch in zip(group.streams, batches, strict=True):
            alone = _Group([stream], batch)
            self._groups.append(alone)
            for one, event in self._advance(alone):
                failed = failed or isinstance(event, Exception)
                yield one, event
        for stream in group.streams:
            stream.alone = not failed  # or the next forward of all of them would fail, too


def _choices(group: _Group, logits: Tensor, start: float) -> list[tuple[int, float]]:
    """The next token of each answer, and on their clocks the time since the start of the forward."""
    for stream in group.streams:
        stream.clock.add("forward", time.perf_counter() - start)
    return choose([stream.chooser for stream in group.streams], logits)


def _told(stream: Stream, tell: Callable[[], Sequence[Event]]) -> list[tuple[Stream, Event]]:
    try:
        return [(stream, event) for event in tell()]
    except Exception as error:
        return [_failed(stream, error)]


def _failed(stream: Stream, error: Exception) -> tuple[Stream, Exception]:
    stream.ended = True
    return stream, error


def _together(streams: Iterable[Stream]) -> list[list[Stream]]:
    """Streams whose prompts are read in one forward: of one probe, and none less than half as long as the longest."""
    together: list[list[Stream]] = []
    for stream in sorted(streams, key=lambda one: (one.probe.revision, -len(one.prompt.prompt_ids))):
        if together and _alike(together[-1], stream):
            together[-1].append(stream)
        else:
            together.append([stream])
    return together


def _alike(streams: list[Stream], other: Stream) -> bool:
    longest, count = len(streams[0].prompt.prompt_ids), len(other.prompt.prompt_ids)
    return (
        streams[0].probe.revision == other.probe.revision
        and 2 * count >= longest
        and (len(streams) + 1) * longest <= MOST_READ
    )
