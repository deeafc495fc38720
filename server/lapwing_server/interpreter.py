"""How Python itself runs in the process of a server."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

try:
    import uvloop
except ModuleNotFoundError:  # there is none for Windows
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop

Result = TypeVar("Result")

TURN: Final = 0.0005
"""Seconds after which a thread that runs Python lets another one run; Python's own are ten times as long."""


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Like `asyncio.run`, on the event loop that takes less of each call."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def take_short_turns() -> None:
    """Has the threads of the whole process take short turns.

    The event loop, gRPC's poller and the worker need the interpreter one after the other to refuse a call or to answer
    a health check; with Python's own 5 ms a turn, four of them are 20 ms.
    """
    sys.setswitchinterval(TURN)


def for_good(load: Callable[[], Result]) -> Callable[[], Result]:
    """The same, after which the collector no longer looks at anything that is there by then.

    What a server has loaded stays. To go through all of it, again and again, stops every thread each time: for 40 ms
    with the libraries alone, for 150 ms with a model.
    """

    def loaded() -> Result:
        result = load()
        gc.collect()
        gc.freeze()
        return result

    return loaded
