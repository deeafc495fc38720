"""The context of a call, typed, what is known of the call, and what is done when it ends."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
else:  # gRPC's own classes take no arguments
    Context = grpc.aio.ServicerContext
    Handler = grpc.RpcMethodHandler

REQUEST_ID: Final = "x-request-id"
"""The metadata in which a client may name its call, and in which it is told the name."""

NAME: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")
"""A name that a client may give; another one is replaced, so that no log holds what it likes."""


@dataclass(slots=True)
class CallRecord:
    """What the log says of one call. Nothing in it is what somebody wrote."""

    method: str
    """Without the leading slash."""

    request_id: str
    begun: float = field(default_factory=time.monotonic)
    principal: str = ""
    """Who calls; empty before that is known."""

    notes: dict[str, str | int | float] = field(default_factory=dict)
    """What the handler notes: the probe that answers, sizes, fingerprints."""

    code: str = "CANCELLED"
    """How it ended; a call whose handler never came to an end was left by its client."""

    def known(self) -> dict[str, str | int | float]:
        """What is known of it by now, by name."""
        named = {"principal": self.principal} if self.principal else {}
        return {"request_id": self.request_id, **named, **self.notes}


current_call: ContextVar[CallRecord | None] = ContextVar("current_call", default=None)
"""The call whose handler runs; None outside of one, and in the worker."""


def note(**values: str | int | float) -> None:
    """Adds values to what the log says of the current call: never a text, at most its length and a short hash."""
    call = current_call.get()
    if call is not None:
        call.notes.update(values)


def answered_by(name: str, revision: str) -> None:
    """Notes for the log which probe answers the current call."""
    note(probe=f"{name}@{revision}")


def request_id_of(context: Context) -> str:
    """The client's name of the call if it may be one, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and NAME.fullmatch(value):
            return value
    return secrets.token_hex(8)


def at_end(context: Context, callback: Callable[[], None]) -> None:
    """Calls back as soon as the call is over: answered and sent, failed, or left by the client."""

    def done(ctx: Context) -> None:
        callback()

    context.add_done_callback(done)  # type: ignore[arg-type]  # types-grpcio made the callback generic
