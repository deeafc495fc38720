"""The worker's side of scoring: takes what waits, tokenises it, and runs one shared forward at a time."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

from lapwing_detector.scoring import Scored, ScoreJob
from lapwing_detector.tokens import TokenIds
from lapwing_server.admission import Ratio, TooLate
from lapwing_server.batching import Overhead, cut
from lapwing_server.engine import Engine
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.mishap import report
from lapwing_server.readings import fingerprint
from lapwing_server.waiting import Call, Entry, Item, Outcome, Waiting

log = logging.getLogger("lapwing.server")


class Forwards:
    """Every method is called in the worker; `running` and `items` may be read by anybody."""

    def __init__(
        self, waiting: Waiting, limits: Limits, metrics: Metrics, wording: Ratio, clock: Callable[[], float]
    ) -> None:
        self.running = 0
        """Tokens of what was taken and has no outcome yet."""
        self.items = 0
        """How many those are."""
        self._waiting = waiting
        self._limits = limits
        self._metrics = metrics
        self._wording = wording
        self._clock = clock
        self._overhead = Overhead()
        self._cuts: deque[list[Entry]] = deque()
        self._done: list[Call] = []

    def run(self, engine: Engine) -> tuple[list[Call], int]:
        """At most one forward.

        Returns:
            The calls that are answered by now, and how many tokens the forward held.
        """
        if not self._cuts:
            self._take(engine)
        tokens = 0
        while self._cuts and not tokens:
            batch = [entry for entry in self._cuts.popleft() if self._wanted(entry)]
            tokens = sum(entry.size for entry in batch)
            if batch:
                self._forward(engine, batch)
        done, self._done = self._done, []
        return done, tokens

    def _take(self, engine: Engine) -> None:
        """Takes as many items as are worth a forward, and cuts what can't be one for its lengths."""
        ready: list[Entry] = []
        most, items = self._limits.batch_tokens, self._limits.batch_forward_items
        taken = 0
        while len(ready) < items and taken < self._overhead.enough:
            entry = self._waiting.take(most - taken if ready else math.inf)
            if entry is None:
                break
            self.items += 1
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
        except Exception as error:  # of whatever kind, it belongs to this item
            self._settle(entry, error)
            return False
        if entry.item.ids is None:
            entry.seconds["tokenise"] = self._clock() - begun
            self._metrics.stage("tokenise", entry.seconds["tokenise"])
        size = len(entry.ids.all)
        self._wording.saw(size - entry.item.token_count, entry.item.characters)
        self.running += size - entry.size
        entry.size = size
        return True

    def _forward(self, engine: Engine, batch: list[Entry]) -> None:
        jobs = [job_of(entry) for entry in batch]
        padded, begun = len(batch) * max(entry.size for entry in batch), self._clock()
        self._metrics.batch(len(batch), padded)
        try:
            scored = engine.score_ids(jobs)
        except Exception as error:
            if len(batch) == 1:
                self._settle(batch[0], error)
            else:  # one of them may be to blame, and shall fail alone
                self._cuts.extendleft([entry] for entry in reversed(batch))
            return
        self._overhead.saw(padded, self._clock() - begun)
        self._measure(scored)
        for entry, one in zip(batch, scored, strict=True):
            self._count(entry, one)
            self._settle(entry, one.detection)

    def _measure(self, scored: Sequence[Scored]) -> None:
        """The seconds of the whole batch are in each of its detections."""
        self._metrics.stage("forward", scored[0].detection.seconds.get("forward", 0.0))
        self._metrics.stage("probe", sum(one.detection.seconds.get("probe", 0.0) for one in scored))

    def _count(self, entry: Entry, scored: Scored) -> None:
        self._metrics.scored(scored.detection, entry.item.role)
        for shadow in scored.shadows:
            self._metrics.scored(shadow, "shadow")

    def _settle(self, entry: Entry, outcome: Outcome) -> None:
        self.items -= 1
        self.running -= entry.size
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
