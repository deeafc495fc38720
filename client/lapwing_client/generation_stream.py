"""A response while it is written, for programs that block and for programs that await."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from lapwing_client import results
from lapwing_client.calls import Call
from lapwing_client.deadline import Deadline
from lapwing_client.errors import LapwingError
from lapwing_client.retries import Beginning

if TYPE_CHECKING:
    from lapwing_client.caller import AsyncCaller, Caller

GenerationEvent = results.GeneratedToken | results.Generation


class GenerationStream(Iterator[GenerationEvent]):
    """A response while it is written. A stream that is dropped is closed, because gRPC cancels a call that is."""

    def __init__(self, client: Caller, call: Call[GenerationEvent], deadline: Deadline) -> None:
        self._client = client
        self._what = call
        self._deadline = deadline
        self._beginning = Beginning(client._connection.retry)
        self._left = Event()
        self._call = self._begin()

    def __next__(self) -> GenerationEvent:
        while True:
            try:
                reply = next(self._call)
            except grpc.RpcError as error:
                found = self._client._error_of(error, self._deadline)
                pause = self._beginning.pause_after(found)
                if pause is None or self._left.wait(pause):
                    raise found from None
                self._call = self._begin()
            else:
                self._beginning.begun()
                return self._what.read(reply)

    def close(self) -> None:
        """Stops the model; as often as one likes."""
        self._left.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> Any:
        call = self._client._call(self._what.method(self._client._stubs), self._what.request, self._deadline)
        if self._left.is_set():
            call.cancel()
        return call


class AsyncGenerationStream(AsyncIterator[GenerationEvent]):
    """A response while it is written. A stream that is dropped is closed."""

    def __init__(self, client: AsyncCaller, call: Call[GenerationEvent], deadline: Deadline) -> None:
        self._client = client
        self._what = call
        self._deadline = deadline
        self._beginning = Beginning(client._connection.retry)
        self._left = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._call = client._begin(call, deadline)

    async def __anext__(self) -> GenerationEvent:
        while True:
            try:
                reply = await self._client._read(self._call.read(), self._deadline)
            except LapwingError as error:
                pause = self._beginning.pause_after(error)
                if pause is None or await self._left_within(pause):
                    raise
                self._call = self._client._begin(self._what, self._deadline)
            else:
                if reply is grpc.aio.EOF:
                    raise StopAsyncIteration
                self._beginning.begun()
                return self._what.read(reply)

    async def close(self) -> None:
        """Stops the model; as often as one likes."""
        self._left.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # gRPC holds on to a call that runs, and this may be any thread's garbage.
        if (call := getattr(self, "_call", None)) is not None:
            with suppress(RuntimeError):  # the loop is closed, and its calls are with it
                self._loop.call_soon_threadsafe(call.cancel)

    async def _left_within(self, seconds: float) -> bool:
        try:
            return await asyncio.wait_for(self._left.wait(), seconds)
        except TimeoutError:
            return False
