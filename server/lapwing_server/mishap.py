"""What is told of an error, to the log and to the client, when nobody knows what its text quotes."""

from __future__ import annotations

import logging
import secrets

from grpc import StatusCode

from lapwing_detector.errors import DetectorError
from lapwing_server.logs import described
from lapwing_server.refusal import Refusal, code_and_reason, refusal_of

log = logging.getLogger("lapwing.server")


class Panic(Exception):
    """Stands for what is no `Exception` and yet belongs to one request, as a panic in a library written in Rust."""


def as_exception(error: BaseException) -> Exception:
    """The error as one that may be handed to whoever waits.

    Raises:
        BaseException: it is one that ends a process.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    return caught(error)


def caught(error: BaseException) -> Exception:
    """The same of any error, for those who are the last to see it."""
    return error if isinstance(error, Exception) else Panic(type(error).__name__).with_traceback(error.__traceback__)


def new_error_id() -> str:
    """A name for one entry of the log."""
    return secrets.token_hex(6)


def report(error: BaseException, method: str) -> str:
    """Logs an error that nobody foresaw, and returns its id.

    The text of the error is not logged at the default level, because it may quote a prompt: its type and the lines of
    code that it passed through are.
    """
    error_id = new_error_id()
    log.error("error %s in %s", error_id, method, extra={"error_id": error_id, **described(error)})
    log.debug("error %s says: %s", error_id, error)
    return error_id


def is_ours(error: Exception) -> bool:
    """Whether it is a failure of the server itself, and no refusal of what was asked."""
    if isinstance(error, Refusal):
        return error.code is StatusCode.INTERNAL
    return not isinstance(error, DetectorError) or code_and_reason(error)[0] is StatusCode.INTERNAL


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
