"""What can go wrong with a call, as one tree; every error says who must act."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

DETAILS = "grpc-status-details-bin"

SIZES = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")
"""How gRPC says that it does not read a message."""

LARGEST_REPLY = 64 * 2**20
"""Bytes; gRPC's default of 4 MiB is less than a batch of long texts answers with."""

CLOSED = "the client is closed; make another one"
"""What a closed client says of every call."""


class LapwingError(Exception):
    """A call that was not answered.

    Attributes:
        message: what happened, in words.
        reason: the same for programs, such as `UNKNOWN_PROBE`; empty when the server did not get to say one.
        code: name of the gRPC status, such as `NOT_FOUND`.
        field: path of the field of the request that is to blame, such as `response.token_ids[3]`; empty for none.
        error_id: what the operator finds in the server's log; empty for none.
        retry_after: seconds after which trying again makes sense; None when the server did not say.
    """

    who_acts: ClassVar[str] = "nobody knows: see the message"
    """Who must do something, and what."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        field: str = "",
        error_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.code = code
        self.field = field
        self.error_id = error_id
        self.retry_after = retry_after

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
            "field": self.field,
            "error_id": self.error_id,
            "retry_after": self.retry_after,
            "who_acts": self.who_acts,
        }


class InvalidRequest(LapwingError):
    """The request can't be worked with; `field` says what of it."""

    who_acts = "the caller: change the named field"


class TooLarge(InvalidRequest):
    """The request has more than the server takes at once, however little else it has to do."""

    who_acts = "the caller: send fewer or shorter items"


class NotFound(LapwingError):
    """There is no such probe or method."""

    who_acts = "the caller: ask for one that probes() lists"


class PermissionDenied(LapwingError):
    """The token is missing, unknown or not allowed to do this."""

    who_acts = "the caller: give token= (lapwing score: --token-file or LAPWING_TOKEN) with the right scope"


class PreconditionFailed(LapwingError):
    """The server's model or probe can't do this."""

    who_acts = "the caller, where the message says what to do; else the server's operator: see error_id in its log"


class Unimplemented(LapwingError):
    """This server does not have this yet."""

    who_acts = "the caller: do without it, or the operator: update the server"


class Overloaded(LapwingError):
    """The server has more to do than it takes."""

    who_acts = "the caller: try again after retry_after; the operator, if it stays so: add servers"


class Unavailable(LapwingError):
    """Nobody answers there, or the server is not ready."""

    who_acts = "the caller: check the address and wait; the operator: start the server, or see its log"


class TLSError(LapwingError):
    """No encrypted connection could be made, or an unencrypted one where an encrypted one is needed.

    Known after the attempts that gRPC makes by itself, which take a second or two; never tried again after that.
    `reason` is one of `UNKNOWN_AUTHORITY`, `WRONG_NAME`, `CERTIFICATE_EXPIRED`, `CERTIFICATE_NOT_YET_VALID`,
    `CERTIFICATE_WANTED`, `CERTIFICATE_REFUSED`, `SERVER_SPEAKS_TLS`, `SERVER_SPEAKS_NO_TLS`, `NO_HTTP2`, `TLS_FAILED`.
    """

    who_acts = "the caller: change tls= as the message says; the operator, if the certificate is no longer good"


class DeadlineExceeded(LapwingError):
    """No answer within the timeout."""

    who_acts = "the caller: give more time or less work"


class Cancelled(LapwingError):
    """The call was cancelled before its answer."""

    who_acts = "nobody, if it was meant"


class ServerError(LapwingError):
    """Something unforeseen happened in the server."""

    who_acts = "the server's operator: look for error_id in its log"


BY_CODE: dict[StatusCode, type[LapwingError]] = {
    StatusCode.INVALID_ARGUMENT: InvalidRequest,
    StatusCode.OUT_OF_RANGE: InvalidRequest,
    StatusCode.NOT_FOUND: NotFound,
    StatusCode.ALREADY_EXISTS: PreconditionFailed,
    StatusCode.PERMISSION_DENIED: PermissionDenied,
    StatusCode.UNAUTHENTICATED: PermissionDenied,
    StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    StatusCode.ABORTED: PreconditionFailed,
    StatusCode.UNIMPLEMENTED: Unimplemented,
    StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    StatusCode.UNAVAILABLE: Unavailable,
    StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    StatusCode.CANCELLED: Cancelled,
    StatusCode.INTERNAL: ServerError,
    StatusCode.UNKNOWN: ServerError,
    StatusCode.DATA_LOSS: ServerError,
}
"""Every status but OK."""

_BY_NUMBER = {code.value[0]: code for code in StatusCode}


def error_of_call(error: Any, target: str) -> LapwingError:
    """The error for a `grpc.RpcError` of a call to the target."""
    code: StatusCode = error.code()
    text = error.details() or code.name
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS:
            return error_of_status(status_pb2.Status.FromString(value))
    if code is StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return TooLarge(larger_than_read(text), code=code.name, reason="MESSAGE_TOO_LARGE")
    if code is StatusCode.UNAVAILABLE:
        text = f"no Lapwing server answers at {target} ({text}); start one: lapwing serve"
    return BY_CODE[code](text, code=code.name)


def larger_than_read(said: str) -> str:
    """What gRPC says when it does not even read a message, in words that help."""
    found = SIZES.search(said)
    size, most = found.groups() if found else ("more", "less")
    if most == str(LARGEST_REPLY):
        return f"the answer has {size} bytes, this client reads {most}; ask for less at once: fewer or shorter items"
    return (
        f"the request has {size} bytes, the server reads no message of more than {most}; send fewer or shorter items "
        "at once: server_info().limits.max_request_bytes says how much it takes"
    )


def error_of_status(status: status_pb2.Status) -> LapwingError:
    """The error that a google.rpc.Status describes."""
    code = _BY_NUMBER.get(status.code, StatusCode.UNKNOWN)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_after = None
    for detail in status.details:
        detail.Unpack(info) or detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    kind = BY_CODE.get(code, ServerError)
    if kind is Overloaded and info.reason and retry_after is None:  # trying again would never help
        kind = TooLarge
    return kind(
        status.message,
        reason=info.reason,
        code=code.name,
        field=bad.field_violations[0].field if bad.field_violations else "",
        error_id=info.metadata.get("error_id", ""),
        retry_after=retry_after,
    )
