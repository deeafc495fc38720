"""Decides what the model computes next: a forward that scores and a step of all streams, in turn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Final

from lapwing_detector.detection import DEFAULT_FALSE_POSITIVE_RATE, Detection, Reason
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_server.admission import Admission, Places, TooLate
from lapwing_server.engine import WARM_UP, Engine, Prompt
from lapwing_server.forwards import Forwards
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.mishap import caught, report
from lapwing_server.refusal import Refusal
from lapwing_server.soundness import Row
from lapwing_server.stream import Stream
from lapwing_server.waiting import Call, Item, Outcome, Waiting, call_of
from lapwing_server.worker import Worker
from lapwing_server.writing import Writing

UNCOUNTED: Final = ""
"""Role of a score that the server makes for itself."""

AT_ONCE: Final = 4
"""Calls of a forward that are answered before the event loop turns to others: who is refused meanwhile waits for
these few, and not for a whole forward's answers to be written."""


class Scheduler:
    """Takes work on the event loop and has it done by the worker, in rounds, between which others may use the worker.

    A round is one forward over the items that wait, as many as fit, and one step of the streams that are open.

    Args:
        worker: whose thread computes.
        limits: how much is taken on.
        metrics: what is told of it.
        clock: seconds, that never go back.
        doubt: called on the event loop when so much failed in a row that the model may be to blame; `works` tells.
    """

    def __init__(
        self,
        worker: Worker,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        doubt: Callable[[], None] = lambda: None,
    ) -> None:
        self.places = Places(limits, metrics)
        self.admission = Admission(limits, metrics)
        self._worker = worker
        self._metrics = metrics
        self._clock = clock
        self._queue = Waiting()
        metrics.queue_is(lambda: self._queue.items)
        self._doubt = doubt
        self._row = Row(self._raise_doubt)
        self._forwards = Forwards(self._queue, limits, metrics, self.admission, clock, self._row)
        self._writing = Writing(metrics, clock, self._row, self._add_shadow)
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake = False
        self._round_begun: float | None = None
        self._lock = threading.Lock()

    def begin(self, engine: Engine) -> None:
        """Computes with this engine, and answers on the running event loop, from now on."""
        self._engine, self._loop = engine, asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        """Items whose turn has not come."""
        return self._queue.items

    @property
    def in_flight(self) -> int:
        """Items that are being scored, and streams that are open."""
        return self._forwards.items + self._writing.open

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._awake

    @property
    def computing(self) -> float:
        """Seconds for which the round that is going on has been going on; 0 when there is none."""
        begun = self._round_begun
        return 0.0 if begun is None else self._clock() - begun

    async def score(self, items: Sequence[Item], *, deadline: float | None = None, client: str = "") -> list[Outcome]:
        """What came of each item: its detection, or what is wrong with it alone.

        Args:
            items: what is to be scored. They may share forwards with each other and with other calls.
            deadline: after which nothing of it is computed, by the scheduler's clock.
            client: who asks; clients take turns.

        Raises:
            Refusal: it is not taken on, or was not done by its deadline.
        """
        begun, sizes = self._clock(), self.admission.sizes(items)
        self.admission.usual.came(client, sum(sizes))
        self.admission.check(sizes, begun, deadline, self._queue, self._forwards.running, client)
        outcomes = await self._outcomes(items, sizes, begun, deadline, client)
        for outcome in outcomes:
            if isinstance(outcome, TooLate):
                raise outcome
        return outcomes

    def require_hope(self, *, deadline: float | None = None, client: str = "") -> None:
        """Refuses a call that would be refused even if it asks for as little as any of this client's lately.

        To know that before the call is read saves most of what a refusal costs, when there is far too much to do. What
        could never be taken on, too large for instance, is told so only when it is read.

        Raises:
            Refusal: not even such a one would be taken on.
        """
        least = (self.admission.usual.least(client),)
        try:
            self.admission.check(least, self._clock(), deadline, self._queue, self._forwards.running, client)
        except Refusal:
            self.admission.usual.unread(client)
            raise

    def generate(
        self,
        prompt: Prompt,
        probe: Probe,
        options: GenerationOptions,
        *,
        deadline: float | None = None,
        shadows: tuple[Probe, ...] = (),
        role: str = "active",
        client: str = "",
    ) -> Stream:
        """A new generation; whoever does not read it to its end must `close` it.

        Args:
            prompt: what the model is given.
            probe: scores what it writes.
            options: how it writes.
            deadline: after which no token is begun, by the scheduler's clock.
            shadows: score the finished response unseen.
            role: why `probe` scores, as the metrics call it.
            client: who asks; what the shadows score comes in its turns.

        Raises:
            Refusal: the deadline has passed.
        """
        begun = self._clock()
        if deadline is not None and deadline <= begun:
            raise TooLate
        stream = Stream(
            prompt,
            probe,
            options,
            begun=begun,
            deadline=deadline,
            wake=self._wake,
            shadows=shadows,
            role=role,
            client=client,
        )
        self._writing.add(stream)
        self._wake()
        return stream

    async def works(self, probe: Probe) -> bool:
        """Whether the model scores a plain text and writes a token, by the way of all requests and behind what waits.

        Args:
            probe: that scores both, which the metrics don't count.
        """
        item = Item(*WARM_UP, probe, DEFAULT_FALSE_POSITIVE_RATE, role=UNCOUNTED)
        [outcome] = await self._outcomes([item], self.admission.sizes([item]), self._clock(), None)
        if not isinstance(outcome, Detection) or outcome.reason is Reason.NON_FINITE:
            return False
        with closing(self.generate(WARM_UP[0], probe, GenerationOptions(max_new_tokens=1), role=UNCOUNTED)) as stream:
            try:
                return [event async for event in stream] != []
            except Exception:  # logged where the requests failed that raised the doubt
                return False

    async def _outcomes(
        self, items: Sequence[Item], sizes: Sequence[int], begun: float, deadline: float | None, client: str = ""
    ) -> list[Outcome]:
        answer: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        call = call_of(items, sizes, begun, deadline, answer, client)
        self._queue.add(call)
        self._wake()
        try:
            return await answer
        except asyncio.CancelledError:
            self._forget(call)
            raise

    def _forget(self, call: Call) -> None:
        """Nothing more of a call is computed."""
        call.gone = True
        for _ in range(self._queue.remove(call)):
            self._metrics.dropped("cancelled")

    def _add_shadow(self, item: Item, client: str) -> None:
        """Scores for the metrics alone, when there is little else to do."""
        if self.admission.room_for_shadow(self._queue, client):
            self._queue.add(call_of([item], self.admission.sizes([item]), self._clock(), None, None, client))
        else:
            self._metrics.unseen("no_room", 1 + len(item.shadows))

    def _wake(self) -> None:
        with self._lock:
            if self._awake:
                return
            self._awake = True
        self._worker.post(self._round)

    def _round(self) -> None:
        engine, loop = self._engine, self._loop
        assert engine is not None, "begin() comes first"
        assert loop is not None
        self._round_begun = self._clock()
        try:
            self._compute(engine, loop)
        except BaseException as error:  # it belongs to nobody, and must not end the rounds
            report(error, "a round")
            self._row.saw(caught(error))
            tell(loop, partial(answer_all, self._forwards.abandon(caught(error))))
        finally:
            self._round_begun = None
            with self._lock:
                self._awake = bool(self._queue.items or self._forwards.items) or self._writing.busy
                if self._awake:
                    self._worker.post(self._round)

    def _compute(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        begun = self._clock()
        calls, tokens, seconds = self._forwards.run(engine)
        if calls:
            tell(loop, partial(answer_all, calls))
        busy = self._writing.busy
        if busy and (streams := self._writing.round(engine)):
            tell(loop, partial(announce_all, streams))
        if tokens or busy:
            self.admission.rest.saw(max(0.0, self._clock() - begun - seconds), 1)

    def _raise_doubt(self) -> None:
        assert self._loop is not None, "begin() comes first"
        tell(self._loop, self._doubt)


def tell(loop: asyncio.AbstractEventLoop, news: Callable[[], None]) -> None:
    """Has the event loop do it, unless the loop has ended, and with it whoever waited."""
    try:
        loop.call_soon_threadsafe(news)
    except RuntimeError:
        if not loop.is_closed():
            raise


def answer_all(calls: Sequence[Call]) -> None:
    """Wakes whoever waits for one of the calls, a few in each round of the event loop, on which it is called."""
    for call in calls[:AT_ONCE]:
        if call.answer is not None and not call.answer.done():
            call.answer.set_result([call.outcomes[place] for place in range(call.items)])
    if rest := calls[AT_ONCE:]:
        asyncio.get_running_loop().call_soon(answer_all, rest)


def announce_all(streams: Sequence[Stream]) -> None:
    """Wakes whoever waits for news of one of the streams."""
    for stream in streams:
        stream.announce()
