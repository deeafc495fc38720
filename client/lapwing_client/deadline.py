"""Time as a value: a moment by which one call, or several together, must be done."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from lapwing_client.errors import DeadlineExceeded
from lapwing_client.requests import real, unusable

LONGEST = 365 * 86_400.0
"""Seconds; gRPC takes what is much longer for what has passed."""


@dataclass(frozen=True)
class Deadline:
    """May be given wherever a timeout is asked for. Shared by several calls it counts down.

    Raises:
        InvalidRequest: the seconds are not a finite number.

    Example:
        deadline = Deadline(10.0)
        client.wait_until_ready(deadline)
        client.score(prompt, response, timeout=deadline)
    """

    seconds: float
    """From now on; what has passed already is a deadline, too."""

    ends: float = field(init=False, repr=False, compare=False)
    """The moment on the clock of `time.monotonic`."""

    def __post_init__(self) -> None:
        seconds = real(self.seconds, "timeout")
        if seconds is None or not math.isfinite(seconds):
            raise unusable("timeout", f"is {self.seconds}; give a finite number of seconds")
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "ends", time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 when it has passed."""
        return self.ends - time.monotonic()

    def time(self) -> float:
        """Seconds that are left for a call.

        Raises:
            DeadlineExceeded: none are. gRPC would begin it, and now and then be quick enough.
        """
        if (left := self.left) <= 0:
            message = f"the deadline of {self.seconds:g} s had passed before the call began; give it more time"
            raise DeadlineExceeded(message, code="DEADLINE_EXCEEDED")
        return min(left, LONGEST)

    @classmethod
    def of(cls, timeout: Timeout) -> Deadline:
        """The deadline itself, or one that begins now."""
        return timeout if isinstance(timeout, Deadline) else cls(timeout)


Timeout = float | Deadline
"""Seconds for one call, or a deadline that several calls share."""
