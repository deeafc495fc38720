"""The worker's side of generation: all streams that are open, one token further at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, cast

from lapwing_detector.tokens import TokenIds
from lapwing_server.admission import TooLate
from lapwing_server.engine import Engine, Streams
from lapwing_server.metrics import Metrics
from lapwing_server.mishap import as_exception
from lapwing_server.soundness import Row
from lapwing_server.stream import Stream
from lapwing_server.waiting import Item

if TYPE_CHECKING:
    from lapwing_detector import GeneratedToken, Generation


class Writing:
    """Every method but `add` is called in the worker; `open` may be read by anybody."""

    def __init__(
        self, metrics: Metrics, clock: Callable[[], float], row: Row, shadow: Callable[[Item, str], None]
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._row = row
        self._shadow = shadow
        """Told what else is to be scored once a generation is finished, and whose it is."""
        self._new: deque[Stream] = deque()
        self._streams: Streams | None = None
        self._open: dict[Hashable, Stream] = {}
        self._told: dict[Stream, None] = {}
        """Streams that have news, in order."""

    def add(self, stream: Stream) -> None:
        """The stream joins the next round."""
        self._new.append(stream)

    @property
    def open(self) -> int:
        """Streams that are not at their end."""
        return len(self._new) + len(self._open)

    @property
    def busy(self) -> bool:
        """Whether there is something to do in a round: without it only paused streams are open."""
        return bool(self._new) or any(self._needs_a_round(stream) for stream in self._open.values())

    def round(self, engine: Engine) -> list[Stream]:
        """Takes every stream that can go on one step further.

        Returns:
            The streams that have news.
        """
        try:
            if self._streams is None:
                self._streams = engine.streams()
                self._streams.wanted = self._goes_on
            self._join(engine, self._streams)
            self._look_after(self._streams)
            self._step(self._streams)
        except BaseException as error:  # nothing is known of any of them
            self._break(as_exception(error))
        told, self._told = list(self._told), {}
        return told

    def _break(self, error: Exception) -> None:
        for stream in self._open.values():
            self._put(stream, error)
        self._open.clear()
        while self._new:
            self._put(self._new.popleft(), error)
        self._streams = None

    def _needs_a_round(self, stream: Stream) -> bool:
        return not stream.paused or stream.stopped or stream.drained

    def _look_after(self, streams: Streams) -> None:
        """Ends what nobody waits for, and takes up what can go on."""
        for handle, stream in list(self._open.items()):
            if not self._wanted(stream):
                streams.cancel(handle)
                del self._open[handle]
            elif stream.paused and stream.drained:
                stream.paused = False
                streams.resume(handle)

    def _wanted(self, stream: Stream) -> bool:
        """Whether somebody still waits for it. No token is written that nobody does."""
        if stream.stopped:
            self._metrics.dropped("cancelled")
            return False
        if stream.deadline is not None and stream.deadline <= self._clock():
            self._metrics.dropped("expired")
            self._put(stream, TooLate())
            return False
        return True

    def _goes_on(self, handle: Hashable) -> bool:
        """Asked before every forward that holds the stream; what ends it is told in the next round."""
        stream = self._open.get(handle)
        return stream is None or not (
            stream.stopped or (stream.deadline is not None and stream.deadline <= self._clock())
        )

    def _join(self, engine: Engine, streams: Streams) -> None:
        while self._new:
            stream = self._new.popleft()
            if self._wanted(stream):
                try:
                    self._open[streams.add(self._tokenised(engine, stream), stream.probe, stream.options)] = stream
                except BaseException as error:  # of whatever kind, it belongs to this stream
                    self._put(stream, as_exception(error))

    def _tokenised(self, engine: Engine, stream: Stream) -> TokenIds:
        begun = self._clock()
        stream.seconds["queue"] = begun - stream.begun
        ids = engine.tokens(stream.prompt)
        stream.seconds["tokenise"] = self._clock() - begun
        for stage in ("queue", "tokenise"):
            self._metrics.stage(stage, stream.seconds[stage])
        return ids

    def _step(self, streams: Streams) -> None:
        if not len(streams):
            streams.tidy()
            return
        events, written = streams.step(), 0
        for handle, event in events:
            written += self._take(handle, event)
        self._metrics.generated(written)
        self._pause(streams, events)

    def _take(self, handle: Hashable, event: GeneratedToken | Generation | Exception) -> bool:
        """Notes an event of a stream; whether it is a token."""
        stream = self._open[handle]
        is_token = hasattr(event, "token_id")  # their classes need torch
        if is_token and "first_token" not in stream.seconds:
            stream.seconds["first_token"] = self._clock() - stream.begun
            self._metrics.stage("first_token", stream.seconds["first_token"])
        self._put(stream, event)
        if not is_token:
            del self._open[handle]
            if not isinstance(event, Exception):
                self._finish(stream, cast("Generation", event))
        return is_token

    def _finish(self, stream: Stream, generation: Generation) -> None:
        if stream.role:
            self._metrics.scored(generation.detection, stream.role)
        if stream.shadows:
            ids = TokenIds(generation.prompt_ids, generation.token_ids)
            rate, (first, *others) = stream.options.false_positive_rate, stream.shadows
            self._shadow(Item([], [], first, rate, tuple(others), "shadow", ids), stream.client)

    def _put(self, stream: Stream, event: GeneratedToken | Generation | Exception) -> None:
        self._row.saw(event)
        stream.outbox.append(event)
        if not hasattr(event, "token_id"):
            stream.outbox.append(None)
        self._told[stream] = None

    def _pause(self, streams: Streams, events: Sequence[tuple[Hashable, object]]) -> None:
        """Streams whose clients are far behind take part no longer."""
        for handle, _ in events:
            stream = self._open.get(handle)
            if stream is not None and stream.full:
                # Said first: a client that catches up in between sees it, and asks for a round.
                stream.paused = True
                if not stream.drained:
                    streams.pause(handle)
                else:
                    stream.paused = False
