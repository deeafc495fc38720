"""What takes several calls, as a plan: it says what to do next and is told how that went.

A plan neither sends nor waits, so that it is the same for a client that blocks and for one that awaits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from lapwing_client import calls, results
from lapwing_client.calls import Call
from lapwing_client.deadline import Deadline
from lapwing_client.errors import (
    CLOSED,
    Cancelled,
    DeadlineExceeded,
    LapwingError,
    Overloaded,
    ServerError,
    Unavailable,
)

Answer = TypeVar("Answer")

SHORTEST_PAUSE = 0.05
"""Seconds."""


@dataclass(frozen=True)
class Ask:
    """Make the call; answered with what it answers, or its error raised."""

    call: Call[Any]
    deadline: Deadline
    wait_for_server: bool = False
    """Whether a server that is not there is waited for until the deadline."""


@dataclass(frozen=True)
class Pause:
    """Do nothing for a while."""

    seconds: float


Step = Ask | Pause
Plan = Generator[Step, Any, Answer]


def follow(plan: Plan[Answer], perform: Callable[[Step], Any]) -> Answer:
    """Carries out a plan."""
    try:
        step = next(plan)
        while True:
            try:
                answer = perform(step)
            except LapwingError as error:
                step = plan.throw(error)
            else:
                step = plan.send(answer)
    except StopIteration as end:
        found: Answer = end.value
        return found


async def follow_async(plan: Plan[Answer], perform: Callable[[Step], Awaitable[Any]]) -> Answer:
    """The same for steps that are awaited."""
    try:
        step = next(plan)
        while True:
            try:
                answer = await perform(step)
            except LapwingError as error:
                step = plan.throw(error)
            else:
                step = plan.send(answer)
    except StopIteration as end:
        found: Answer = end.value
        return found


def every_probe(deadline: Deadline) -> Plan[list[results.Probe]]:
    """All probes, page by page."""
    found: list[results.Probe] = []
    token = ""
    while True:
        page, token = yield Ask(calls.probes_page(token), deadline)
        found += page
        if not token:
            return found


def patient(call: Call[Answer], deadline: Deadline) -> Plan[Answer]:
    """Asks again while the server has too much to do, when it says and as long as the deadline allows."""
    while True:
        try:
            answer: Answer = yield Ask(call, deadline)
        except Overloaded as error:
            if error.retry_after is None or error.retry_after >= deadline.left:
                raise
            yield Pause(max(error.retry_after, SHORTEST_PAUSE))
        else:
            return answer


def until_ready(target: str, deadline: Deadline) -> Plan[results.ServerInfo]:
    """Until the server is there and serving.

    The first attempt does not wait for the server, so that a mistake in how to reach it shows at once.
    """
    last, wait = f"nobody answers at {target}" if deadline.left > 0 else "there was no time to ask", False
    while deadline.left > 0:
        try:
            soon = Deadline(min(deadline.left, 1.0))
            if (yield Ask(calls.healthy(), soon, wait)):
                ready: results.ServerInfo = yield Ask(calls.server_info(), Deadline(max(deadline.left, 1.0)))
                return ready
            info = yield Ask(calls.server_info(), deadline)
        except (Cancelled, Unavailable, DeadlineExceeded, Overloaded, ServerError) as error:
            if error.message == CLOSED:
                raise
        else:
            last = info.message
            if info.state == "FAILED":
                message = f"{target} is not serving: {last}"
                raise Unavailable(message, reason="SERVER_FAILED", code="UNAVAILABLE")
        wait = True
        yield Pause(max(0.0, min(SHORTEST_PAUSE, deadline.left)))
    raise DeadlineExceeded(f"not ready after {deadline.seconds:g} s: {last}", code="DEADLINE_EXCEEDED")
