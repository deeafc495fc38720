"""Streams of attention to a server, for programs that block and for programs that await."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from threading import Condition
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc

from lapwing_client import replies, results
from lapwing_client.async_end import End
from lapwing_client.attention_messages import Request, score_now_request, slice_requests
from lapwing_client.errors import DeadlineExceeded, LapwingError, ServerError
from lapwing_client.requests import unusable

AHEAD = 2
"""Messages that wait for gRPC to take them; `send` waits for room, and gRPC for the server."""


class Over(Exception):
    """The call has ended, so nothing more can be sent."""


class Outbox(Iterator[Request]):
    """Messages on their way to gRPC, which takes them in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._changed = Condition()
        self._ended = self._over = False

    def put(self, request: Request) -> None:
        """Waits until there is room; raises Over when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._waiting) < AHEAD)
            if self._over:
                raise Over
            self._waiting.append(request)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def drop(self) -> None:
        """Nobody will take anything more."""
        with self._changed:
            self._over = True
            self._waiting.clear()
            self._changed.notify_all()

    def __next__(self) -> Request:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended or self._over)
            if not self._waiting:
                raise StopIteration
            request = self._waiting.popleft()
            self._changed.notify_all()
            return request


class AttentionStream:
    """Attention on its way to a server. A context; leaving it before `finish` drops what was sent. For one thread."""

    def __init__(
        self, header: Request, begin: Callable[[Outbox], Any], error_of: Callable[[grpc.RpcError], LapwingError]
    ) -> None:
        """Made by `Client.attention_stream`.

        Args:
            header: the first message.
            begin: begins the call with the messages that it sends.
            error_of: the error for one of gRPC's.
        """
        self._error_of = error_of
        self._outbox = Outbox()
        self._ending = False
        self._result: results.Detection | None = None
        self._call = begin(self._outbox)
        if not self._call.add_callback(self._outbox.drop):
            self._outbox.drop()
        self._put(header)

    def send(self, chunk: Any) -> None:
        """Sends consecutive rows of some heads of some layers; waits while the server is behind.

        Args:
            chunk: anything with the attributes or keys `first_layer` (place in `layers`), `first_head`, `first_token`
                (all rows of these heads before it were sent) and either

                - `diagonal` (layers, heads, rows) and `received` (layers, heads, first_token + rows), both float32:
                  attention of each row's token to itself, and what every token receives from these rows; or
                - `weights` (layers, heads, rows, first_token + rows), float32 or float16: the rows themselves. Float16
                  loses what is below 6e-8, so a probe that takes logarithms needs `diagonal` in float32 beside it.

                All of them with the buffer protocol, as numpy's arrays have it. Large ones go in several messages. NaN
                is taken in heads that the probe does not read.

        Raises:
            InvalidRequest: the chunk can't be sent, or the server refused it or one before; `field` says what of it.
            LapwingError: the call failed.
        """
        for request in slice_requests(chunk):
            self._put(request)

    def score_now(self) -> results.Detection:
        """The score of what was sent so far, of which every head must have the same number of rows.

        Raises:
            LapwingError: see `send`.
        """
        self._put(score_now_request())
        return self._answer()

    def finish(self) -> results.Detection:
        """Ends the response; the score of the whole. Again it returns the same.

        Raises:
            InvalidRequest: something is missing, `INCOMPLETE`.
            LapwingError: see `send`.
        """
        if self._result is None:
            self._ending = True
            self._outbox.end()
            detection = self._answer()
            if self._reply() is not None:
                raise_unexpected()
            self._result = detection
        return self._result

    def close(self) -> None:
        """Ends the call; as often as one likes."""
        self._call.cancel()  # first: messages that end are a stream that is whole, which the server would score
        self._outbox.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, request: Request) -> None:
        require_open(self._ending)
        try:
            self._outbox.put(request)
        except Over:
            self._answer()
            raise_unexpected()

    def _answer(self) -> results.Detection:
        reply = self._reply()
        return raise_unexpected() if reply is None else replies.detection_of(reply.detection)

    def _reply(self) -> Any:
        """What the server says next; None when it has ended the call."""
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            raise explained(self._error_of(error)) from None


class AsyncAttentionStream:
    """The same for programs that await; every method as in `AttentionStream`. For one task."""

    def __init__(
        self, header: Request, begin: Callable[[], Any], read: Callable[[Awaitable[Any]], Awaitable[Any]]
    ) -> None:
        """Made by `AsyncClient.attention_stream`.

        Args:
            header: the first message.
            begin: begins the call.
            read: awaits something of the call and raises a LapwingError for one of gRPC's.
        """
        self._header = header
        self._begin = begin
        self._read = read
        self._call: Any = None
        self._ending = False
        self._result: results.Detection | None = None

    async def send(self, chunk: Any) -> None:
        """Sends rows; waits while the server is behind."""
        for request in slice_requests(chunk):
            await self._put(request)

    async def score_now(self) -> results.Detection:
        """The score of what was sent so far."""
        await self._put(score_now_request())
        return await self._answer()

    async def finish(self) -> results.Detection:
        """Ends the response; the score of the whole."""
        if self._result is None:
            call, self._ending = await self._opened(), True
            await self._wait(call.done_writing())
            detection = await self._answer()
            if await self._wait(call.read()) is not grpc.aio.EOF:
                raise_unexpected()
            self._result = detection
        return self._result

    async def close(self) -> None:
        """Ends the call; as often as one likes."""
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _opened(self) -> Any:
        if self._call is None:
            self._call = self._begin()
            self._end = End(self._call)
            await self._wait(self._call.write(self._header))
        return self._call

    async def _put(self, request: Request) -> None:
        require_open(self._ending)
        call = await self._opened()
        await self._wait(call.write(request))

    async def _wait(self, step: Awaitable[Any]) -> Any:
        """What the call does next."""
        try:
            return await self._read(self._end.or_what_ended(step))
        except DeadlineExceeded as error:
            raise explained(error) from None

    async def _answer(self) -> results.Detection:
        reply = await self._wait(self._call.read())
        return raise_unexpected() if reply is grpc.aio.EOF else replies.detection_of(reply.detection)


def require_open(ending: bool) -> None:
    """Refuses to send after the end.

    Raises:
        InvalidRequest: it is finished.
    """
    if ending:
        raise unusable("chunk", "comes after finish(); begin another stream")


def explained(error: LapwingError) -> LapwingError:
    """The error; where the deadline passed, with what it is for: gRPC says no more than that it did."""
    if not isinstance(error, DeadlineExceeded) or error.reason:
        return error
    message = "the stream took longer than its timeout, which must also hold the time in which the model writes"
    return DeadlineExceeded(f"{message}; give timeout=", code=error.code)


def raise_unexpected() -> NoReturn:
    """The server ended the call well, but not with one score for the whole."""
    raise ServerError("the server did not end the stream with one score; update the client", code="INTERNAL")
