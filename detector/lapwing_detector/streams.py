"""Several answers that one model writes at once, sharing its forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from lapwing_detector.batch import Batch
from lapwing_detector.choosing import Choice, choose
from lapwing_detector.errors import CaptureError, InvalidInput, TooLong
from lapwing_detector.generation import GeneratedToken, Generation
from lapwing_detector.groups import Group, failed, regrouped, without_ended
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.tokens import TokenIds
from lapwing_detector.writing import Stream

__all__ = ["Stream", "Streams"]

Event = GeneratedToken | Generation | Exception

MOST_READ = 8192
"""Tokens of prompts, padding included, that are read in one forward."""


Wanted = Callable[[Stream], bool]


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
        self.wanted: Wanted | None = None
        """Asked before every forward of each answer that would take part: False cancels it. None: all are wanted."""

        self._model = model
        self._waiting: list[Stream] = []
        """Their prompts are not read yet."""

        self._groups: list[Group] = []
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
        self._drop()

    def pause(self, stream: Stream) -> None:
        """Leave an answer as it is, with its cache, until it is resumed."""
        stream.paused = True

    def resume(self, stream: Stream) -> None:
        """Go on with an answer that was paused."""
        stream.paused = False

    def step(self) -> list[tuple[Stream, Event]]:
        """One more token of every answer that is not paused.

        Before that new prompts are read, in one forward at most, so that the others don't wait for all of them: the
        shortest first, but none is passed over for ever.

        Returns:
            What became ready: a token of each answer, behind its last one the whole, and where an answer failed the
            error, which is its end and only its own.
        """
        events = list(self._read_waiting())
        self._drop()
        self._groups, failures = regrouped(self._groups)
        events += failures
        for group in list(self._groups):
            if group.streams[0].active:
                events += self._advance_wanted(group)
        self.tidy()
        return events

    def tidy(self) -> None:
        """Give back the memory of answers that have ended, which `cancel` does not while others share it.

        Every step does so at its end: this is for whoever makes none for a while, as all that is left is paused.
        """
        self._drop()
        self._groups = [left for group in self._groups if (left := without_ended(group)) is not None]

    def _all(self) -> Iterator[Stream]:
        yield from self._waiting
        for group in self._groups:
            yield from group.streams

    def _drop(self) -> None:
        """Forget answers that have ended, where nothing needs to be moved for it."""
        self._waiting = [stream for stream in self._waiting if not stream.ended]
        self._groups = [group for group in self._groups if not all(stream.ended for stream in group.streams)]

    def _ask(self, streams: Iterable[Stream]) -> None:
        """Cancels what is not wanted any more."""
        for stream in streams:
            if stream.active and self.wanted is not None and not self.wanted(stream):
                stream.ended = True

    # Prompts.

    def _read_waiting(self) -> Iterator[tuple[Stream, Event]]:
        self._ask(self._waiting)
        new = [stream for stream in self._waiting if stream.active]
        if not new:
            return
        first = min(_together(new) if self._shares else [[stream] for stream in new], key=_turn)
        self._waiting = [stream for stream in self._waiting if stream not in first]
        for stream in self._waiting:
            stream.passed += stream.active
        yield from self._read(first)

    def _read(self, streams: list[Stream]) -> Iterator[tuple[Stream, Event]]:
        prompts, start = [stream.prompt.prompt_ids for stream in streams], time.perf_counter()
        try:
            batch, logits = Batch.read(self._model, streams[0].probe.heads or None, prompts)
            if self._shares is None:
                self._shares = batch.plain and self._model.takes_padding
        except Exception as error:
            if len(streams) == 1:
                yield failed(streams[0], error)
            else:  # find out whose fault it was, one forward at a time
                for stream in streams:
                    stream.alone = True
                self._waiting = [*streams, *self._waiting]
            return
        for stream in streams:
            stream.alone = not (self._shares and batch.plain)
        group = Group(streams, batch)
        self._groups.append(group)
        for row, (stream, choice) in enumerate(zip(streams, _choices(group, logits, start), strict=True)):
            yield from _told(stream, choice, partial(stream.begin, summary=partial(batch.summary, row)))

    # Steps.

    def _advance_wanted(self, group: Group) -> Iterator[tuple[Stream, Event]]:
        self._ask(group.streams)
        if all(stream.active for stream in group.streams):
            yield from self._advance(group)
            return
        self._groups.remove(group)
        rest, failures = regrouped([group])
        yield from failures
        self._groups += rest
        for smaller in rest:
            yield from self._advance(smaller)

    def _advance(self, group: Group) -> Iterator[tuple[Stream, Event]]:
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
            yield from (failed(stream, error) for stream in group.streams)
            return
        for row, (stream, choice) in enumerate(zip(group.streams, choices, strict=True)):
            summary = partial(group.batch.summary, row)
            yield from _told(stream, choice, partial(stream.advance, logit=running[row], summary=summary))

    def _advance_apart(self, group: Group, error: Exception) -> Iterator[tuple[Stream, Event]]:
        """A forward failed: find out whose fault it was."""
        self._groups.remove(group)
        try:
            if len(group.streams) == 1:
                raise error
            batches = group.batch.apart()
        except Exception as why:
            yield from (failed(stream, why) for stream in group.streams)
            return
        found = False
        for stream, batch in zip(group.streams, batches, strict=True):
            alone = Group([stream], batch)
            self._groups.append(alone)
            for one, event in self._advance_wanted(alone):
                found = found or isinstance(event, Exception)
                yield one, event
        for stream in group.streams:
            stream.alone = not found  # or the next forward of all of them would fail, too


def _choices(group: Group, logits: Tensor, start: float) -> Sequence[Choice | Exception]:
    """The next token of each answer, and on their clocks the time since the start of the forward."""
    for stream in group.streams:
        stream.clock.add("forward", time.perf_counter() - start)
    try:
        return choose([stream.chooser for stream in group.streams], logits)
    except Exception as error:
        return [error] * len(group.streams)


def _told(
    stream: Stream, choice: Choice | Exception, tell: Callable[[Choice], Sequence[Event]]
) -> list[tuple[Stream, Event]]:
    """What an answer makes of the token that was chosen for it."""
    if isinstance(choice, Exception):
        return [failed(stream, choice)]
    try:
        return [(stream, event) for event in tell(choice)]
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        return [failed(stream, error)]
    except BaseException as error:  # a panic in a tokenizer, which is written in Rust; its text may quote the answer
        return [failed(stream, CaptureError(type(error).__name__))]


def _turn(streams: list[Stream]) -> tuple[int, int]:
    """The least is read next: the shortest, but each time that one is passed over halves its length."""
    passed = max(stream.passed for stream in streams)
    return len(streams[0].prompt.prompt_ids) >> passed, -passed


def _together(streams: Iterable[Stream]) -> list[list[Stream]]:
    """Streams whose prompts are read in one forward: of one probe, and none less than half as long as the longest.

    The first of each is the longest.
    """
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
        not (streams[0].alone or other.alone)
        and streams[0].probe.revision == other.probe.revision
        and 2 * count >= longest
        and (len(streams) + 1) * longest <= MOST_READ
    )
