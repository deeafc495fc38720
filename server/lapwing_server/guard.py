"""Stands around every handler: nothing unforeseen reaches a client, and every call is counted and logged."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Protocol

import grpc
from grpc import StatusCode

from lapwing_server.context import REQUEST_ID, CallRecord, Context, Handler, at_end, current_call, request_id_of
from lapwing_server.metrics import METHODS, OTHER, Metrics
from lapwing_server.mishap import to_refusal
from lapwing_server.parsing import Parser
from lapwing_server.refusal import Refusal, answer

log = logging.getLogger("lapwing.server")

OURS: Final = "/lapwing."

ASKED_ALL_THE_TIME: Final = "/lapwing.v1.Detector/GetServerInfo"
"""A client that waits for the model asks again and again; the log is not filled with it."""


class Named(Protocol):
    """Whoever calls."""

    @property
    def name(self) -> str:
        """May stand in a log."""


Admit = Callable[[str, Context], Named]
"""Says who calls the method of this path, before the request is looked at; raises Refusal if they may not, or if
nothing would come of it."""


class Guard(grpc.GenericRpcHandler):
    """Answers every call of the server, by the handlers that it was given, each of them wrapped once.

    No interceptor: for one, gRPC makes a continuation at every call, and awaits the answer.
    """

    def __init__(
        self, metrics: Metrics | None = None, admit: Admit | None = None, parser: Parser | None = None
    ) -> None:
        self.in_flight = 0
        """Calls of our own services that are not answered yet; of all others none is waited for."""
        self.metrics = metrics or Metrics()
        self.admit = admit
        self._parser = parser or Parser()
        self._idle = asyncio.Event()
        self._idle.set()
        self._services: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, Handler] = {}
        self._unknown = self._guarded(grpc.stream_stream_rpc_method_handler(unknown), OTHER)

    async def idle(self) -> None:
        """Waits until no call is in flight."""
        await self._idle.wait()

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Takes the handlers of a service, as a server would."""
        self._services += handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """The handler of a method, with the guard around it; one that says so of a method that is not there."""
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is None:
            found = filter(None, (one.service(handler_call_details) for one in self._services))
            if (handler := next(found, None)) is None:
                return self._unknown
            guarded = self._handlers[method] = self._guarded(handler, method)
        return guarded

    def enter(self, method: str) -> None:
        """Counts a call that began."""
        self.metrics.in_flight(method, 1)
        if method.startswith(OURS):
            self.in_flight += 1
            self._idle.clear()

    def leave(self, method: str, call: CallRecord) -> None:
        """Counts and logs a call that ended."""
        seconds = time.monotonic() - call.begun
        self.metrics.in_flight(method, -1)
        self.metrics.call_ended(method, call.code, seconds)
        ours = method.startswith(OURS)
        if ours:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()
        level = logging.INFO if ours and method != ASKED_ALL_THE_TIME else logging.DEBUG
        if log.isEnabledFor(level):
            known = {"code": call.code, "milliseconds": round(1000 * seconds, 2), **call.known()}
            log.log(level, "%s %s", call.method, call.code, extra=known)

    def _guarded(self, handler: Any, method: str) -> Handler:
        """The handler as one that takes a stream, whatever it takes: such a one gRPC calls before it reads a request.

        On the wire the two are the same.
        """
        answers = "stream" if handler.response_streaming else "unary"
        behavior = getattr(handler, f"{'stream' if handler.request_streaming else 'unary'}_{answers}")
        if not (inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)):
            raise TypeError(f"{method} is a plain function and would run in gRPC's thread pool; make it async")
        parse = handler.request_deserializer or (lambda data: data)

        async def request(requests: AsyncIterator[bytes], context: Context) -> Any:
            if handler.request_streaming:
                return self._parser.each(requests, method, parse)
            return await self._parser.only(context, method, parse)

        async def unary(requests: AsyncIterator[bytes], context: Context) -> Any:
            async with GuardedCall(self, method, context):
                return await behavior(await request(requests, context), context)

        async def stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async with GuardedCall(self, method, context):
                async for response in behavior(await request(requests, context), context):
                    yield response

        make: Callable[..., Handler] = getattr(grpc, f"stream_{answers}_rpc_method_handler")
        return make(
            stream if inspect.isasyncgenfunction(behavior) else unary,  # a stream may also write by itself
            response_serializer=handler.response_serializer,
        )


class GuardedCall:
    """The inside of one call, from the first look at who calls to the answer."""

    __slots__ = ("_call", "_context", "_guard", "_method")

    def __init__(self, guard: Guard, method: str, context: Context) -> None:
        self._guard, self._method, self._context = guard, method, context
        self._call = CallRecord(METHODS.get(method, OTHER), request_id_of(context))

    async def __aenter__(self) -> None:
        call, context = self._call, self._context
        current_call.set(call)  # gRPC gives each call a task, whose context ends with it
        self._guard.enter(self._method)
        at_end(context, lambda: self._guard.leave(self._method, call))
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        if self._guard.admit is not None:
            try:
                call.principal = self._guard.admit(self._method, context).name
            except Exception as error:
                await self._refuse(error)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, grpc.aio.AbortError):
            self._call.code = code_name(self._context)
        elif isinstance(error, Exception):
            await self._refuse(error)
        else:  # left by the client, or by its deadline
            remaining = self._context.time_remaining()
            self._call.code = "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"

    async def _refuse(self, error: Exception) -> None:
        refusal = to_refusal(error, self._call.method)
        self._call.code = refusal.code.name
        await answer(self._context, refusal, self._call.request_id)


def code_name(context: Context) -> str:
    """The code that a handler itself ended a call with: OK as long as it set none."""
    code = context.code()
    return code.name if isinstance(code, StatusCode) else "OK"


async def unknown(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    """What a method that is not there answers; grpc.aio's own answer carries no reason."""
    raise Refusal(
        StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD", "this server has no such method; its version may be older"
    )
    yield  # makes it a stream
