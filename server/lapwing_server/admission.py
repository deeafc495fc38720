"""What is taken on, and what is refused at once because it would come to nothing."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from grpc import StatusCode

from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.refusal import Refusal
from lapwing_server.security.principals import Principal
from lapwing_server.waiting import Item, Waiting

LONGEST_PUSHBACK: Final = 10.0
SHORTEST_PUSHBACK: Final = 0.05
"""Seconds. What drains a queue is not known to the millisecond."""

MARGIN: Final = 1.4
"""Times what is expected: a client that is refused at once can go elsewhere, one that waits for nothing can't."""

LATELY: Final = 32
"""Calls of a client that tell how small its calls are, and calls that are refused unread before one is read again."""

KNOWN: Final = 1024
"""Clients of which that is known."""

STREAM_PUSHBACK: Final = 1.0
"""Seconds after which another stream may be asked for; when one ends nobody knows."""


class TooLate(Refusal):
    """Its deadline has passed."""

    def __init__(self) -> None:
        super().__init__(
            StatusCode.DEADLINE_EXCEEDED,
            "DEADLINE_EXCEEDED",
            "the deadline passed before it was done; give it more time",
        )


class Ratio:
    """A moving average of one number for each unit of another: what was seen lately counts more."""

    KEPT: Final = 0.9
    """Of what was seen before, with every look."""

    LEAST: Final = 1e-3
    """Units that tell something."""

    def __init__(self, first: float = 0.0) -> None:
        self._first = first
        self._amount = 0.0
        self._units = 0.0

    def saw(self, amount: float, units: float) -> None:
        """So much came of so many units."""
        self._amount = self.KEPT * self._amount + amount
        self._units = self.KEPT * self._units + units

    def of(self, units: float) -> float:
        """What would come of so many."""
        return units * (self._amount / self._units if self._units >= self.LEAST else self._first)


class Usual:
    """How small the calls of each client are, as far as they were read."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, deque[int]] = OrderedDict()
        self._unread: Counter[str] = Counter()

    def came(self, client: str, tokens: int) -> None:
        """A call of so many tokens was read."""
        self._sizes.setdefault(client, deque(maxlen=LATELY)).append(tokens)
        self._sizes.move_to_end(client)
        del self._unread[client]
        if len(self._sizes) > KNOWN:
            forgotten, _ = self._sizes.popitem(last=False)
            del self._unread[forgotten]

    def unread(self, client: str) -> None:
        """A call was refused without being read."""
        if client in self._sizes:
            self._unread[client] += 1

    def least(self, client: str) -> int:
        """Tokens of the smallest of its last calls; 1 as long as none, and when many since then were not read."""
        return 1 if self._unread[client] >= LATELY else min(self._sizes.get(client, ()), default=1)


class Admission:
    """Decides by what waits and by how long things took so far."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.pace = Ratio()
        """Seconds for a token of a forward that scores; 0, which refuses nothing, as long as it is unknown."""
        self.rest = Ratio()
        """Seconds of a round for all else: a step of the streams, most of all."""
        self.wording = Ratio(0.3)
        """Tokens for a character."""
        self.together = Ratio()
        """Tokens of a forward. Its items are done when all of it is, those that came later included."""
        self.usual = Usual()
        self._limits = limits
        self._metrics = metrics

    def sizes(self, items: Sequence[Item]) -> list[int]:
        """About how many tokens each has."""
        return [max(1, item.token_count + round(self.wording.of(item.characters))) for item in items]

    def check(
        self,
        sizes: Sequence[int],
        now: float,
        deadline: float | None,
        waiting: Waiting,
        running: int,
        client: str = "",
    ) -> None:
        """Lets a call in, or not.

        Args:
            sizes: tokens of each of its items.
            now: the time.
            deadline: by when it must be done.
            waiting: what comes before it.
            running: tokens of what is being computed.
            client: whose call it is.

        Raises:
            Refusal: it is too late already, there are too many, or it would be too late when its turn comes.
        """
        if deadline is not None and deadline <= now:
            raise TooLate
        self._require_room(len(sizes), waiting, running, client)
        if deadline is None or not (running or waiting.items):
            return  # with nothing before it, it is tried: else a wrong average would refuse for ever
        own = sum(sizes)
        over = now + self._seconds(running, waiting.tokens + own) - deadline
        if over > 0:  # a rough count was enough for most
            over = now + self._seconds(running, waiting.ahead_of(len(sizes), client) + own) - deadline
        if over > 0:
            raise self._shed(
                "DEADLINE_UNREACHABLE", "it would not be done by its deadline; give it more time or try again", over
            )

    def room_for_shadow(self, waiting: Waiting, client: str) -> bool:
        """Whether what is scored for the metrics alone may wait: never so much that a call is refused for it."""
        most = self._limits.queue_items // 2, self._limits.items_of_one // 2
        return waiting.items < most[0] and waiting.items_of(client) < most[1]

    def _seconds(self, running: int, tokens: int) -> float:
        """Until so many tokens are computed, by forwards that are as large as they were lately."""
        forward = max(1.0, self.together.of(1))
        forwards = math.ceil(tokens / forward)
        rounds = forwards + math.ceil(running / forward)
        return MARGIN * (self.pace.of(running + forwards * forward) + self.rest.of(rounds))

    def _require_room(self, items: int, waiting: Waiting, running: int, client: str) -> None:
        for reason, whose, before, most in (
            ("QUEUE_FULL", "", waiting.items, self._limits.queue_items),
            ("CLIENT_QUEUE_FULL", " of this client", waiting.items_of(client), self._limits.items_of_one),
        ):
            if items > most:
                self._metrics.shed(reason)
                message = f"{items} items are more than may wait{whose}, which is {most}; send fewer at once"
                raise Refusal(StatusCode.RESOURCE_EXHAUSTED, reason, message, never_retry=True)
            if before + items > most:
                half = self._seconds(running, waiting.tokens) / 2
                raise self._shed(reason, f"{before} of at most {most} items{whose} wait already; try again", half)

    def _shed(self, reason: str, message: str, seconds: float) -> Refusal:
        self._metrics.shed(reason)
        return Refusal(StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after=pushback(seconds))


def pushback(seconds: float) -> float:
    """Seconds after which to try again: about so many, but not for all who are refused the same."""
    spread = random.uniform(0.75, 1.25)  # noqa: S311 - no secret
    return spread * min(max(seconds, SHORTEST_PUSHBACK), LONGEST_PUSHBACK)


class Places:
    """Counts the streams that are open, of all clients and of each."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._most = {"generate": limits.generate_streams, "attention": limits.attention_streams}
        self._each = limits.streams_of_one
        self._metrics = metrics
        self._taken: Counter[str] = Counter()
        self._of_client: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """Streams that are open."""
        return self._taken.total()

    @contextmanager
    def take(self, kind: str, principal: Principal) -> Iterator[None]:
        """Holds a place while inside.

        Args:
            kind: generate or attention.
            principal: who asks; streams of both kinds count together for one.

        Raises:
            Refusal: there are as many as the server takes.
        """
        client, each = principal.name, principal.streams or self._each
        if self._taken[kind] >= self._most[kind]:
            raise self._refuse(f"{self._taken[kind]} streams of this kind are open, which is the most")
        if self._of_client[client] >= each:
            raise self._refuse(f"{self._of_client[client]} streams of this client are open, which is the most")
        self._taken[kind] += 1
        self._of_client[client] += 1
        try:
            yield
        finally:
            self._taken[kind] -= 1
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    def _refuse(self, message: str) -> Refusal:
        self._metrics.shed("TOO_MANY_STREAMS")
        message += " at the same time; try again"
        return Refusal(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_after=STREAM_PUSHBACK)
