"""How often somebody may call."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lapwing_server.security.principals import Principal

MOST_BUCKETS: Final = 10_000
"""Above it the bucket that was used longest ago is forgotten: most likely it is full, which says the same as none."""


@dataclass
class Bucket:
    """Fills by `rate` tokens in a second up to `burst`; each call takes one."""

    rate: float
    burst: float
    tokens: float
    seen: float
    """When `tokens` was true."""

    def at(self, now: float) -> float:
        """How many tokens there are."""
        return min(self.burst, self.tokens + (now - self.seen) * self.rate)

    def take(self, now: float) -> float:
        """Takes one token; when there is none, returns the seconds until there is, else 0."""
        tokens = self.at(now)
        if tokens < 1:
            return (1 - tokens) / self.rate
        self.tokens, self.seen = tokens - 1, now
        return 0.0

    def change(self, rate: float, burst: float, now: float) -> None:
        """Fills otherwise from now on. What it holds stays, as far as there is room: a change is no gift."""
        self.tokens, self.seen = min(self.at(now), burst), now
        self.rate, self.burst = rate, burst


class Rates:
    """A bucket for each principal, whatever token it shows.

    Args:
        requests_per_second: of a principal that says nothing else; unlimited without it.
        burst: calls at once; as many as in one second without it.
        clock: seconds, never backwards.
    """

    def __init__(
        self,
        requests_per_second: float | None = None,
        burst: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._burst, self.clock = requests_per_second, burst, clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, principal: Principal) -> float:
        """Counts a call; returns the seconds, in whole milliseconds, after which it may come again, 0 if it may now."""
        rate = principal.requests_per_second or self._rate
        if rate is None:
            return 0.0
        now = self.clock()
        bucket = self._bucket(principal, rate, now)
        return math.ceil(1000 * bucket.take(now) - 1e-6) / 1000

    def __len__(self) -> int:
        return len(self._buckets)

    def _bucket(self, principal: Principal, rate: float, now: float) -> Bucket:
        own = principal.burst or (None if principal.requests_per_second else self._burst)
        burst = float(own or max(1, math.floor(rate)))
        bucket = self._buckets.pop(principal.name, None) or Bucket(rate, burst, burst, now)
        if (bucket.rate, bucket.burst) != (rate, burst):
            bucket.change(rate, burst, now)
        self._buckets[principal.name] = bucket
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket
