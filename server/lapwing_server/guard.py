"""Stands around every handler: nothing unforeseen reaches a client, and every call is counted and logged."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from grpc import StatusCode

from lapwing_detector.errors import DetectorError
from lapwing_server.context import Context, Handler, at_end
from lapwing_server.refusal import Refusal, answer, refusal_of

log = logging.getLogger("lapwing.server")

OURS: Final = "/lapwing."

ASKED_ALL_THE_TIME: Final = "/lapwing.v1.Detector/GetServerInfo"
"""A client that waits for the model asks again and again; the log is not filled with it."""


class Malformed:
    """Stands for a message that could not be parsed."""


MALFORMED: Final = Malformed()


def parser(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """A deserializer that never raises: grpc.aio would answer UNKNOWN with the text of the parser."""

    def parse_or_sentinel(data: bytes) -> Any:
        try:
            return parse(data) if parse else data
        except Exception:
            return MALFORMED

    return parse_or_sentinel


def well_formed(request: Any) -> Any:
    """The request.

    Raises:
        Refusal: it could not be parsed.
    """
    if request is MALFORMED:
        raise Refusal(
            StatusCode.INVALID_ARGUMENT, "MALFORMED", "the request is not a valid protobuf message of this type"
        )
    return request


async def well_formed_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Every request of a stream; raises like `well_formed`."""
    async for request in requests:
        yield well_formed(request)


def new_error_id() -> str:
    """A name for one entry of the log."""
    return secrets.token_hex(6)


def report(error: BaseException, method: str) -> str:
    """Logs an error that nobody foresaw, and returns its id.

    The text of the error is not logged at the default level, because it may quote a prompt: its type and the lines of
    code that it passed through are.
    """
    error_id = new_error_id()
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("error %s in %s: %s at\n%s", error_id, method, type(error).__qualname__, frames)
    log.debug("error %s says: %s", error_id, error)
    return error_id


def to_refusal(error: Exception, method: str) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, DetectorError):
        refusal = refusal_of(error, "")
        return refusal if refusal.code is StatusCode.INVALID_ARGUMENT else refusal_of(error, report(error, method))
    error_id = report(error, method)
    message = f"internal error {error_id}; the server's log has the rest"
    return Refusal(StatusCode.INTERNAL, "INTERNAL", message, error_id=error_id)


class Guard(grpc.aio.ServerInterceptor):
    """Wraps every handler of the server."""

    def __init__(self) -> None:
        self.in_flight = 0
        """Calls of our own services that are not answered yet; of all others none is waited for."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._handlers: dict[str, Handler] = {}

    async def idle(self) -> None:
        """Waits until no call is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler with the guard around it."""
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return handler  # gRPC itself answers UNIMPLEMENTED
            self._handlers[method] = self._guarded(handler, method)
        return self._handlers[method]

    def _guarded(self, handler: Any, method: str) -> Handler:
        kind = (
            ("stream" if handler.request_streaming else "unary")
            + "_"
            + ("stream" if handler.response_streaming else "unary")
        )
        behavior = getattr(handler, kind)
        checked = well_formed_each if handler.request_streaming else well_formed
        if not (inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)):
            raise TypeError(f"{method} is a plain function and would run in gRPC's thread pool; make it async")

        async def unary(request: Any, context: Context) -> Any:
            self._enter(method, context)
            try:
                return await behavior(checked(request), context)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                await answer(context, to_refusal(error, method))

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            self._enter(method, context)
            try:
                async for response in behavior(checked(request), context):
                    yield response
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                await answer(context, to_refusal(error, method))

        make: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            stream if inspect.isasyncgenfunction(behavior) else unary,  # a stream may also write by itself
            request_deserializer=parser(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _enter(self, method: str, context: Context) -> None:
        begun = time.monotonic()
        counted = method.startswith(OURS)
        if counted:
            self.in_flight += 1
            self._idle.clear()

        def leave() -> None:
            if counted:
                self.in_flight -= 1
                if self.in_flight == 0:
                    self._idle.set()
            level = logging.INFO if counted and method != ASKED_ALL_THE_TIME else logging.DEBUG
            log.log(level, "%s %s %.1f ms", method, code_name(context), 1000 * (time.monotonic() - begun))

        at_end(context, leave)


def code_name(context: Context) -> str:
    """How a call ended, for the log."""
    if context.cancelled():
        return "CANCELLED"
    code = context.code()
    return code.name if isinstance(code, StatusCode) else "OK"
