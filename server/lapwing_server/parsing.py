"""Requests from bytes, in a way that an unreadable one is refused in our words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from grpc import StatusCode

from lapwing_server.refusal import Refusal


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
