"""What an asynchronous call with a stream of requests really ended with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import grpc

Value = TypeVar("Value")

MADE_UP = "Internal error from Core"
"""Details of the status that grpc.aio puts in the place of the real one when a message can't be written, since the call
has ended: https://github.com/grpc/grpc/issues/36066. Sometimes the real one comes later, more often it came before."""

LOOKS, LOOK_SECONDS = 100, 0.01
"""How often, and how far apart, a real status is looked for that has not come."""


EARLY = (grpc.aio.Metadata(), grpc.aio.Metadata(), "the server ended the call well before all was sent")


class End:
    """Keeps the status of a call as the server sent it.

    Args:
        call: one that was just begun.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._status: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def or_what_ended(self, step: Awaitable[Value]) -> Value:
        """What the step of the call gives.

        Raises:
            grpc.aio.AioRpcError: what the call ended with, if it did.
        """
        try:
            return await step
        except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            status = await self._real()
            if status is None:
                raise
            if status.code() is grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, *EARLY) from None
            raise status from None

    async def _real(self) -> grpc.aio.AioRpcError | None:
        """The status; None for a call that goes on."""
        for _ in range(LOOKS):
            if self._call.done():
                self._note(self._call)
            if self._status is not None and self._status.details() != MADE_UP:
                break
            await asyncio.sleep(LOOK_SECONDS)
        return self._status

    def _note(self, call: Any) -> None:
        if self._status is None or self._status.details() == MADE_UP:
            code, initial, trailing, details = (
                at_once(part()) for part in (call.code, call.initial_metadata, call.trailing_metadata, call.details)
            )
            self._status = grpc.aio.AioRpcError(code, initial, trailing, details)


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for, as those that ask an ended call for its status."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    finally:
        coroutine.close()
    raise RuntimeError("the call has not ended")
