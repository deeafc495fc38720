"""The worker's side of scoring: takes what waits, tokenises it, and runs one shared forward at a time."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lapwing_detector.errors import DetectorError
from lapwing_detector.scoring import Scored, ScoreJob
from lapwing_detector.tokens import TokenIds
from lapwing_server.admission import Admission, TooLate
from lapwing_server.batching import Overhead, cut
from lapwing_server.engine import Engine
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.mishap import as_exception, report
from lapwing_server.readings import fingerprint
from lapwing_server.soundness import Row
from lapwing_server.waiting import Call, Entry, Item, Outcome, Waiting

log = logging.getLogger("lapwing.server")


class Computed(NamedTuple):
    """What came of a turn."""

    calls: list[Call]
    """Those that are answered by now."""

    tokens: int
    """That the forward held."""

    seconds: float
    """That the forward took."""


class Forwards:
    """Every method is called in the worker; `running` and `items` may be read by anybody."""

    def __init__(
        self,
        waiting: Waiting,
        limits: Limits,
        metrics: Metrics,
        admission: Admission,
        clock: Callable[[], float],
        row: Row,
    ) -> None:
        self.running = 0
        """Tokens of what was taken and has no outcome yet."""
        self._taken: dict[Entry, None] = {}
        self._waiting = waiting
        self._limits = limits
        self._metrics = metrics
        self._admission = admission
        self._clock = clock
        self._row = row
        self._overhead = Overhead()
        self._cuts: deque[list[Entry]] = deque()
        self._done: list[Call] = []

    @property
    def items(self) -> int:
        """How many were taken and have no outcome yet."""
        return len(self._taken)

    def run(self, engine: Engine) -> Computed:
        """At most one forward."""
        if not self._cuts:
            self._take(engine)
        tokens, seconds = 0, 0.0
        while self._cuts and not tokens:
            batch = [entry for entry in self._cuts.popleft() if self._wanted(entry)]
            tokens = sum(entry.size for entry in batch)
            if batch:
                seconds = self._forward(engine, batch)
        done, self._done = self._done, []
        return Computed(done, tokens, seconds)

    def abandon(self, error: Exception) -> list[Call]:
        """Gives up all that was taken, after an error that belongs to no item; the calls that are answered by now."""
        for entry in self._taken:
            if entry.settle(error):
                self._done.append(entry.call)
        self._taken.clear()
        self._cuts.clear()
        self.running = 0
        done, self._done = self._done, []
        return done

    def _take(self, engine: Engine) -> None:
        """Takes as many items as are worth a forward, and cuts what can't be one for its lengths."""
        ready: list[Entry] = []
        most, items = self._limits.batch_tokens, self._limits.batch_forward_items
        taken = 0
        while len(ready) < items and taken < self._overhead.enough:
            entry = self._waiting.take(most - taken if ready else math.inf)
            if entry is None:
                break
            self._taken[entry] = None
            self.running += entry.size
            if self._wanted(entry) and self._tokenised(engine, entry):
                ready.append(entry)
                taken += entry.size
        for places in cut([entry.size for entry in ready], most, items, self._overhead.tokens):
            self._cuts.append([ready[place] for place in places])

    def _wanted(self, entry: Entry) -> bool:
        """Whether somebody still waits for it. Nothing is computed of what nobody does."""
        call = entry.call
        if call.gone:
            self._metrics.dropped("cancelled")
            self._settle(entry, TooLate())
        elif call.deadline is not None and call.deadline <= self._clock():
            self._metrics.dropped("expired")
            self._settle(entry, TooLate())
        else:
            return True
        return False

    def _tokenised(self, engine: Engine, entry: Entry) -> bool:
        begun = self._clock()
        entry.seconds["queue"] = begun - entry.call.begun
        self._metrics.stage("queue", entry.seconds["queue"])
        try:
            entry.ids = entry.item.ids or read(engine, entry.item)
        except BaseException as error:  # of whatever kind, it belongs to this item
            self._settle(entry, as_exception(error))
            return False
        if entry.item.ids is None:
            entry.seconds["tokenise"] = self._clock() - begun
            self._metrics.stage("tokenise", entry.seconds["tokenise"])
        size = len(entry.ids.all)
        if entry.item.characters:  # a stop token that is dropped would count against texts
            self._admission.wording.saw(max(0, size - entry.item.token_count), entry.item.characters)
        self.running += size - entry.size
        entry.size = size
        return True

    def _forward(self, engine: Engine, batch: list[Entry]) -> float:
        jobs = [job_of(entry) for entry in batch]
        padded, begun = len(batch) * max(entry.size for entry in batch), self._clock()
        self._metrics.batch(len(batch), padded)
        try:
            scored = list(zip(batch, engine.score_ids(jobs), strict=True))
        except BaseException as error:
            self._blame(batch, error)
            return self._clock() - begun
        seconds, tokens = self._clock() - begun, sum(entry.size for entry in batch)
        self._overhead.saw(padded, seconds)
        self._admission.pace.saw(seconds, tokens)
        self._admission.together.saw(tokens, 1)
        self._measure([one for _, one in scored])
        for entry, one in scored:
            self._count(entry, one)
            self._settle(entry, one.detection)
        return seconds

    def _blame(self, batch: list[Entry], error: BaseException) -> None:
        """A forward failed: who may not be to blame has another one."""
        if len(batch) > 1:
            self._cuts.extendleft([entry] for entry in reversed(batch))
        elif shadows := batch[0].item.shadows:  # it also captured what only they read
            self._metrics.unseen("failed", len(shadows))
            report(error, "a shadow")
            batch[0].item = replace(batch[0].item, shadows=())
            self._cuts.appendleft(batch)
        else:
            self._settle(batch[0], as_exception(error))

    def _measure(self, scored: Sequence[Scored]) -> None:
        """The seconds of the whole batch are in each of its detections."""
        self._metrics.stage("forward", scored[0].detection.seconds.get("forward", 0.0))
        self._metrics.stage("probe", sum(one.detection.seconds.get("probe", 0.0) for one in scored))

    def _count(self, entry: Entry, scored: Scored) -> None:
        if entry.item.role:
            self._metrics.scored(scored.detection, entry.item.role)
        for shadow in scored.shadows:
            if isinstance(shadow, DetectorError):
                self._metrics.unseen("failed")
                report(shadow, "a shadow")
            else:
                self._metrics.scored(shadow, "shadow")

    def _settle(self, entry: Entry, outcome: Outcome) -> None:
        del self._taken[entry]
        self.running -= entry.size
        self._row.saw(outcome)
        if entry.call.answer is None and isinstance(outcome, Exception):  # of shadows alone, so nobody else is told
            self._metrics.unseen("failed", 1 + len(entry.item.shadows))
            report(outcome, "a shadow")
        if entry.settle(outcome):
            self._done.append(entry.call)


def read(engine: Engine, item: Item) -> TokenIds:
    """The ids of an item."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("to score: prompt %s response %s", fingerprint(item.prompt), fingerprint(item.response))
    return engine.tokens(item.prompt, item.response)


def job_of(entry: Entry) -> ScoreJob:
    """The same for the engine."""
    assert entry.ids is not None, "it was tokenised before"
    item = entry.item
    return ScoreJob(entry.ids, item.probe, item.false_positive_rate, item.shadows)
