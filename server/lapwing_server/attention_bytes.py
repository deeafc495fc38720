"""How much attention all open streams together hold, and each client's of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from grpc import StatusCode

from lapwing_server.admission import STREAM_PUSHBACK
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Part:
    """A stream of attention, told apart by what it is."""

    client: str


class AttentionBytes:
    """Counts the bytes of attention that all open streams together hold. May be used by several threads."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._most = limits.attention_total_bytes
        self._each = limits.attention_of_one
        self._metrics = metrics
        self._held: dict[Part, int] = {}
        self._lock = threading.Lock()
        metrics.attention_is(lambda: self.held)

    @property
    def held(self) -> int:
        """Bytes of all streams together."""
        with self._lock:
            return sum(self._held.values())

    @contextmanager
    def share(self, client: str) -> Iterator[Callable[[int], None]]:
        """The part of one stream of a client, which is empty again on leaving.

        Yields:
            Asked before the stream holds so many bytes in place of what it held. Raises Refusal when they are more than
            the client or the server has left. While sums grow they are there twice, which is not counted: those of one
            stream grow at a time.
        """
        part = Part(client)
        with self._lock:
            self._held[part] = 0
        try:
            yield partial(self._hold, part)
        finally:
            with self._lock:
                del self._held[part]

    def _hold(self, part: Part, nbytes: int) -> None:
        with self._lock:
            if part not in self._held:
                return  # its client left while its last slice was read; what was read goes with that
            others = {one: held for one, held in self._held.items() if one is not part}
            of_client = sum(held for one, held in others.items() if one.client == part.client)
            bounds = ("", sum(others.values()), self._most), (" of this client", of_client, self._each)
            full = next((bound for bound in bounds if bound[1] + nbytes > bound[2]), None)
            if full is None:
                self._held[part] = nbytes
                return
        self._metrics.shed("ATTENTION_FULL")
        whose, held, most = full
        message = f"other streams{whose} hold {held} of at most {most} bytes of attention, and this one needs {nbytes}"
        message += "; try again"
        raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "ATTENTION_FULL", message, retry_after=STREAM_PUSHBACK)
