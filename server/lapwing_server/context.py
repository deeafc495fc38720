"""The context of a call, typed, and what is done when the call ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
else:  # gRPC's own classes take no arguments
    Context = grpc.aio.ServicerContext
    Handler = grpc.RpcMethodHandler


def at_end(context: Context, callback: Callable[[], None]) -> None:
    """Calls back as soon as the call is over: answered and sent, failed, or left by the client."""

    def done(ctx: Context) -> None:
        callback()

    context.add_done_callback(done)  # type: ignore[arg-type]  # types-grpcio made the callback generic
