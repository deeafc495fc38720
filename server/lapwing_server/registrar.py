"""Hands the handlers of services to the guard, and remembers which methods it has by then."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from lapwing_server.context import Handler
    from lapwing_server.guard import Guard


class Registrar:
    """Stands for a server where generated code adds a service to one."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._services: set[str] = set()
        self._methods: set[str] = set()

    @property
    def methods(self) -> frozenset[str]:
        """Full name of every method; of a service that does not say which it has, /SERVICE/*."""
        told = {method.split("/")[1] for method in self._methods}
        return frozenset(self._methods | {f"/{service}/*" for service in self._services - told})

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Called by generated code for each service."""
        self._services |= {
            one.service_name() if isinstance(one, grpc.ServiceRpcHandler) else type(one).__name__ for one in handlers
        }
        self._guard.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Called by generated code for each service.

        Raises:
            TypeError: a handler is a plain function, which gRPC would run in a pool of threads.
        """
        for method, handler in handlers.items():
            if not is_asynchronous(handler):
                raise TypeError(f"/{service}/{method} is a plain function; make it async")
        # Not told to gRPC, which would wait for each method by itself, so that every call is dearer: the guard finds
        # them by the generic handlers.
        self._methods |= {f"/{service}/{method}" for method in handlers}


def is_asynchronous(handler: Handler) -> bool:
    """Whether the event loop runs it itself."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    [behavior] = filter(None, kinds)
    return inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)
