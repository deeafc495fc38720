"""How a client reaches its server, and what it tells gRPC about that; the same for both clients. Makes no call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from lapwing_client import requests
from lapwing_client.addresses import Target
from lapwing_client.deadline import Deadline, Timeout
from lapwing_client.errors import LARGEST_REPLY, DeadlineExceeded, LapwingError, TooLarge, Unavailable, error_of_call
from lapwing_client.results import ServerInfo
from lapwing_client.retries import service_config
from lapwing_client.tls import TLS, Source, explain, speaks_of_tls

Answer = TypeVar("Answer")

RETRY_BUFFER = 2**20
"""Bytes of a request up to which gRPC keeps it for another attempt; by itself 256 KiB. A server reads that much in any
case and says itself what it does not take, with a push-back of -1; what gRPC refuses to read is larger and so not sent
again."""

PING, PING_TIMEOUT = 30.0, 10.0
"""Seconds of silence in a call after which the server is asked whether it is there, and that it has to answer. A
server that allows fewer pings (gRPC's own default is one in five minutes) makes gRPC ask less often."""

FIRST_RECONNECT, LONGEST_RECONNECT = 0.1, 0.5
"""Seconds between attempts to connect: a replica that comes back is found while calls are still tried again, for the
next one to restart may go at once."""

LOOK_SECONDS = 2.0
"""What finding out about a failed connection may take at each address."""


class Connection:
    """Address, encryption, token and patience of a client; see `Client` for the arguments."""

    def __init__(
        self,
        target: str | Sequence[str],
        token: str | None,
        tls: bool | Source | TLS | None,
        timeout: Timeout,
        retry: bool,
    ) -> None:
        self.where = Target.of(target)
        self.target = target if isinstance(target, str) else ",".join(target)
        self.timeout = timeout if isinstance(timeout, Deadline) else Deadline(timeout).seconds
        self.retry = truth(retry, "retry")
        self.tls = TLS.of(tls)
        self.metadata = headers(token, self.tls is not None, self.where, self.target)
        self._name = name_to_check(self.where, self.tls) if self.tls else ""
        self._answered = False
        self._largest_request = 0
        """Bytes; 0 while the server has not said it."""

    def __repr__(self) -> str:
        return f"{self.target!r}, {'unencrypted' if self.tls is None else 'TLS'}"

    def channel(self, library: Any) -> Any:
        """A channel of `grpc` or of `grpc.aio`."""
        if self.tls is None:
            return library.insecure_channel(self.where.uri, options=self.options())
        return library.secure_channel(self.where.uri, self.tls.credentials(), options=self.options())

    def options(self) -> list[tuple[str, Any]]:
        """What the channel is told."""
        return channel_options(self.retry, self.where.several, self._name)

    def deadline(self, timeout: Timeout | None) -> Deadline:
        """The deadline of one call."""
        return Deadline.of(self.timeout if timeout is None else timeout)

    def answered(self, answer: Answer) -> Answer:
        """Notes that there was an answer, and what it says of the server; returns it."""
        self._answered = True
        if isinstance(answer, ServerInfo):
            self._largest_request = answer.limits.max_request_bytes
        return answer

    def require_small(self, request: Any) -> None:
        """Refuses what the server would not take; as far as `server_info` was asked how much that is.

        Raises:
            TooLarge: the request has more bytes.
        """
        most = self._largest_request
        if most and isinstance(request, Message) and (size := request.ByteSize()) > most:
            message = f"the request has {size} bytes, the server takes {most} in one message (so server_info said)"
            raise TooLarge(f"{message}; send less at once", reason="TOO_LARGE", code="RESOURCE_EXHAUSTED")

    def error_of(self, error: Any, deadline: Deadline) -> LapwingError:
        """The error for a `grpc.RpcError` of a call with this deadline, of which gRPC says only that it passed."""
        found = error_of_call(error, self.target)
        self._answered |= bool(found.reason)
        if isinstance(found, DeadlineExceeded) and not found.reason:
            never = "" if self._answered else ", and nothing has answered there yet"
            message = f"the call to {self.target} had not ended after {deadline.seconds:g} s{never}; give it more time"
            return DeadlineExceeded(message, code=found.code)
        return found

    def puzzling(self, error: LapwingError) -> bool:
        """Whether `explained` should look for what was wrong: it was TLS, or no connection was made yet."""
        unsaid = isinstance(error, Unavailable) and not error.reason
        return unsaid and (not self._answered or speaks_of_tls(error.message))

    def explained(self, error: LapwingError, deadline: Deadline) -> LapwingError:
        """The error, or TLS's part in it. Connects and blocks; the deadline bounds it."""
        seconds = max(0.1, min(LOOK_SECONDS, deadline.left))
        return explain(self.where.places, self.tls, self._name, seconds, error.message) or error


def truth(value: Any, field: str) -> bool:
    """Refuses what is neither true nor false.

    Raises:
        InvalidRequest: it is something else.
    """
    if not isinstance(value, bool):
        raise requests.unusable(field, f"is {value!r:.40}; give True or False")
    return value


def headers(token: str | None, encrypted: bool, where: Target, target: str) -> tuple[tuple[str, str], ...]:
    """What is sent with every call.

    Raises:
        InvalidRequest: the token would leave this machine in the clear, or no header can hold it.
    """
    if token is None:
        return ()
    if not encrypted and not where.local:
        message = f"is {target!r}; a token goes only to this machine or over an encrypted connection: give tls="
        raise requests.unusable("target", message)
    if not isinstance(token, str) or not token:
        what = "empty" if token == "" else f"a {type(token).__name__}"
        raise requests.unusable("token", f"is {what}; give text, or leave it out where none is needed")
    if not (token.isascii() and token.isprintable() and token.strip() == token):
        raise requests.unusable("token", "has characters that no header can hold; give printable ASCII")
    return (("authorization", f"Bearer {token}"),)


def name_to_check(where: Target, tls: TLS) -> str:
    """The name that the certificate must have; empty for the host of the address.

    Raises:
        InvalidRequest: several replicas have no name in common.
    """
    if tls.server_name or not where.several:
        return tls.server_name
    hosts = {host for host, _ in where.places}
    if len(hosts) > 1:
        raise requests.unusable("tls", "needs the name that all replicas have in their certificate: TLS(server_name=)")
    return "".join(hosts)


def channel_options(retry: bool, several: bool = False, name: str = "") -> list[tuple[str, Any]]:
    """What gRPC is told about the connection."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", LARGEST_REPLY),
        ("grpc.enable_retries", int(retry)),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER),
        ("grpc.keepalive_time_ms", int(PING * 1000)),
        ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", int(FIRST_RECONNECT * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(LONGEST_RECONNECT * 1000)),
    ]
    if config := service_config(retry, several):
        options.append(("grpc.service_config", json.dumps(config)))
    return [*options, ("grpc.ssl_target_name_override", name)] if name else options
