"""Requests from bytes, once it is known who calls; what is too large or unreadable is refused in our words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.descriptor import Descriptor
from grpc import StatusCode

from lapwing.v1 import detector_pb2
from lapwing_server.context import Context
from lapwing_server.limits import Limits
from lapwing_server.patience import Patience
from lapwing_server.refusal import Refusal, invalid
from lapwing_server.wire import Unreadable, fields, request_type
from lapwing_server.worker import Worker

Parse = Callable[[bytes], Any]

SMALL: Final = 64 * 2**10
"""Bytes up to which a request is parsed on the event loop: whatever they hold, it takes less than a millisecond."""

NEWS: Final = 0.1
"""Seconds in which gRPC says that a client left; at first it shows that as the end of what was sent."""

BATCH: Final = detector_pb2.ScoreBatchRequest.DESCRIPTOR
ITEMS: Final = BATCH.fields_by_name["items"].number

FIELDS_OF_ITEM: Final = 16
FIELDS_OF_TURN: Final = 3
"""On the wire, with room: an item has five beside its turns; a turn has its role, its content and itself."""


class Parser:
    """Reads the requests of all methods; large ones in a thread of its own, one after another.

    Args:
        limits: of the server.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._worker = Worker("lapwing-parser")
        self._patience = Patience(self._limits.stream_seconds)

    def close(self) -> None:
        """Ends its thread and its timer."""
        self._worker.close()
        self._patience.close()

    async def only(self, context: Context, method: str, parse: Parse) -> Any:
        """The request of a call that has one.

        Nothing of it was received before: gRPC does not even unpack what nobody reads.

        Raises:
            Refusal: it never came, or not in the time that a stream may take, is too large or can't be parsed.
        """
        try:
            with self._patience:
                data = await context.read()
        except TimeoutError:
            message = f"the request did not come within {self._limits.stream_seconds:g} s; call when it is there"
            raise Refusal(StatusCode.DEADLINE_EXCEEDED, "NO_REQUEST", message) from None
        if data is grpc.aio.EOF:
            await asyncio.sleep(NEWS)  # ends here if the client left, or if gRPC itself found the request too large
            raise Refusal(StatusCode.INVALID_ARGUMENT, "NO_REQUEST", "the call ended before its request came")
        return await self.request(data, method, parse)

    async def each(self, requests: AsyncIterator[bytes], method: str, parse: Parse) -> AsyncIterator[Any]:
        """Every request of a stream; raises like `request`."""
        async for data in requests:
            yield await self.request(data, method, parse)

    async def request(self, data: bytes, method: str, parse: Parse) -> Any:
        """The request that the bytes are.

        Args:
            data: as they came.
            method: path of the method that is called.
            parse: of the generated code.

        Raises:
            Refusal: it is too large or can't be parsed.
        """
        most = self._limits.request_bytes
        if len(data) > most:
            raise too_large(f"has {len(data)} bytes", f"{most} in one message")
        if len(data) <= SMALL:
            return parsed(data, parse)
        return await self._worker.run(partial(self._large, data, method, parse))

    def _large(self, data: bytes, method: str, parse: Parse) -> Any:
        kind = request_type(method)
        if kind is not None:
            self._count(data, kind)
        return parsed(data, parse)

    def _count(self, data: bytes, kind: Descriptor) -> None:
        """Refuses what would be built of too many parts, without building one."""
        limits, items = self._limits, 0
        most_items = limits.batch_items
        most = most_items * (FIELDS_OF_TURN * limits.messages + FIELDS_OF_ITEM)
        try:
            for total, (depth, number) in enumerate(fields(data, kind), 1):
                items += kind is BATCH and depth == 0 and number == ITEMS
                if items > most_items:
                    raise invalid("items", f"has more than {most_items} items; give 1 to {most_items}", "BATCH_SIZE")
                if total > most:
                    raise too_large(f"has more than {most} fields", str(most))
        except Unreadable:
            raise malformed() from None


def parsed(data: bytes, parse: Parse) -> Any:
    """The same; grpc.aio would answer UNKNOWN with the text of the parser."""
    try:
        return parse(data)
    except Exception:
        raise malformed() from None


def malformed() -> Refusal:
    """The refusal of what is no message."""
    return Refusal(StatusCode.INVALID_ARGUMENT, "MALFORMED", "the request is not a valid protobuf message of this type")


def too_large(what: str, most: str) -> Refusal:
    """The refusal of what would be too large however little else there is to do."""
    message = f"the request {what}, the server takes {most}; send less at once (GetServerInfo has the limits)"
    return Refusal(StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", message, never_retry=True)
