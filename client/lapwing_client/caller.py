"""How calls are made, for programs that block and for programs that await; which calls there are, the clients know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from lapwing_client.calls import Call, Stubs
from lapwing_client.connection import Connection
from lapwing_client.deadline import Deadline, Timeout
from lapwing_client.errors import CLOSED, Cancelled, LapwingError
from lapwing_client.many_threads import Hands
from lapwing_client.plans import Ask, Pause, Step

Answer = TypeVar("Answer")


class Caller:
    """Makes calls and waits for their answers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._closed = False
        self._channel: grpc.Channel = connection.channel(grpc)
        self._stubs = Stubs(self._channel)

    def close(self) -> None:
        """Ends every call and the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection})"

    def _ask(self, call: Call[Answer], timeout: Timeout | None) -> Answer:
        found: Answer = self._perform(Ask(call, self._connection.deadline(timeout)))
        return found

    def _perform(self, step: Step, hands: Hands | None = None) -> Any:
        """Does one step of a plan, in this thread or, where several work together, by their hands."""
        if isinstance(step, Pause):
            return time.sleep(step.seconds) if hands is None else hands.pause(step)
        method = step.call.method(self._stubs)
        around = method if hands is None else hands.around(method)
        reply = self._call(around, step.call.request, step.deadline, wait_for_ready=step.wait_for_server)
        return self._connection.answered(step.call.read(reply))

    def _call(self, method: Callable[..., Answer], request: Any, timeout: Timeout | None, **options: Any) -> Answer:
        """Makes a call of any kind with what every call carries."""
        deadline = self._connection.deadline(timeout)
        self._connection.require_small(request)
        try:
            return method(request, timeout=deadline.time(), metadata=self._connection.metadata, **options)
        except grpc.RpcError as error:
            raise self._error_of(error, deadline) from None
        except ValueError:  # what gRPC raises for a closed channel, and for other things
            if not self._closed:
                raise
            raise Cancelled(CLOSED, code="CANCELLED") from None

    def _error_of(self, error: grpc.RpcError, deadline: Deadline) -> LapwingError:
        found = self._connection.error_of(error, deadline)
        if self._closed and isinstance(found, Cancelled):
            return Cancelled(CLOSED, code="CANCELLED")
        return self._connection.explained(found, deadline) if self._connection.puzzling(found) else found


class AsyncCaller:
    """The same for one event loop, the one in which it is first used."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: tuple[grpc.aio.Channel, Stubs] | None = None

    async def close(self) -> None:
        """Ends every call and the connection."""
        self._closed = True
        if self._opened is not None:
            await self._opened[0].close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection})"

    async def _ask(self, call: Call[Answer], timeout: Timeout | None) -> Answer:
        found: Answer = await self._perform(Ask(call, self._connection.deadline(timeout)))
        return found

    async def _perform(self, step: Step) -> Any:
        """Does one step of a plan."""
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        call = self._begin(step.call, step.deadline, wait_for_ready=step.wait_for_server)
        reply = await self._read(call, step.deadline)
        return self._connection.answered(step.call.read(reply))

    def _begin(self, call: Call[Any], deadline: Deadline, **options: Any) -> Any:
        """Begins a call of any kind with what every call carries."""
        self._connection.require_small(call.request)
        method = call.method(self._open())
        return method(call.request, timeout=deadline.time(), metadata=self._connection.metadata, **options)

    async def _read(self, answer: Any, deadline: Deadline) -> Any:
        """What a call answers, or the next thing that a stream says."""
        try:
            return await answer
        except grpc.RpcError as error:
            found = self._connection.error_of(error, deadline)
            if self._connection.puzzling(found):
                found = await asyncio.to_thread(self._connection.explained, found, deadline)
            raise found from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the call was ended by this client", code="CANCELLED") from None

    def _open(self) -> Stubs:
        if self._closed:
            raise Cancelled(CLOSED, code="CANCELLED")
        loop = asyncio.get_running_loop()
        if self._opened is None:
            channel: grpc.aio.Channel = self._connection.channel(grpc.aio)
            self._opened, self._loop = (channel, Stubs(channel)), loop
        if loop is not self._loop:
            raise RuntimeError("an AsyncClient belongs to the event loop in which it is first used; make another one")
        return self._opened[1]
