"""Errors as they go over the wire: one class, one table for the detector's errors, one way to make a status."""

from __future__ import annotations

import math
import re
from typing import Final

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from lapwing_detector import errors
from lapwing_server.context import REQUEST_ID, Context

DOMAIN: Final = "lapwing"

LONGEST_MESSAGE: Final = 1000
"""Bytes of a message, which travels twice. Details over 16 KiB make gRPC replace the status; ours stay under 4."""

PUSHBACK: Final = "grpc-retry-pushback-ms"
"""The trailer that a client's retries obey; -1 stops them."""

LONGEST_FIELD: Final = 200
"""Bytes of a field path."""


class Refusal(Exception):
    """A request that is answered with an error, and all that the client is told about it."""

    def __init__(
        self,
        code: StatusCode,
        reason: str,
        message: str,
        *,
        field: str = "",
        error_id: str = "",
        retry_after: float | None = None,
        never_retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        """UPPER_SNAKE_CASE, stable: what programs look at."""
        self.message = clipped(message, LONGEST_MESSAGE)
        self.field = clipped(field, LONGEST_FIELD)
        """Path of the field of the request, such as `items[1].prompt`; empty unless it is to blame."""
        self.error_id = error_id
        """What to look for in the server's log; empty unless something was logged."""
        self.retry_after = retry_after
        """Seconds after which trying again makes sense; None if it makes none or nobody knows."""
        self.never_retry = never_retry
        """Whether the same request can never succeed, though clients try its code again: a size, a quota."""

    def status(self, request_id: str = "") -> status_pb2.Status:
        """The same as a google.rpc.Status.

        Args:
            request_id: name of the refused call; empty for a refused part of one.
        """
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)
        for name, value in (("error_id", self.error_id), ("request_id", request_id)):
            if value:
                info.metadata[name] = value
        details: list[any_pb2.Any] = [packed(info)]
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(packed(error_details_pb2.BadRequest(field_violations=[violation])))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after * 1e9))
            details.append(packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=details)

    def trailers(self, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
        """The metadata that carry the status of a call of this name."""
        details = self.status(request_id).SerializeToString()
        trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", details)]
        if request_id:
            trailers.append((REQUEST_ID, request_id))
        if self.never_retry:
            trailers.append((PUSHBACK, "-1"))
        elif self.retry_after is not None:
            trailers.append((PUSHBACK, str(math.ceil(round(self.retry_after * 1000, 6)))))  # too early is refused again
        return tuple(trailers)

    def under(self, prefix: str) -> Refusal:
        """The same refusal of a request that holds the refused one at `prefix`; where no field is to blame, none is."""
        field = f"{prefix}.{self.field}" if self.field else ""
        return Refusal(
            self.code,
            self.reason,
            self.message,
            field=field,
            error_id=self.error_id,
            retry_after=self.retry_after,
            never_retry=self.never_retry,
        )


def clipped(text: str, most: int) -> str:
    """The text, or its beginning in at most so many bytes; what UTF-8 can't hold is shown as an escape."""
    data = text.encode("utf-8", "backslashreplace")
    return data.decode() if len(data) <= most else data[: most - 3].decode("utf-8", "ignore") + "…"


def packed(
    detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    """A detail in the envelope in which a status carries it."""
    envelope = any_pb2.Any()
    envelope.Pack(detail)
    return envelope


def invalid(field: str, message: str, reason: str = "INVALID_INPUT") -> Refusal:
    """The refusal of one field of a request."""
    return Refusal(StatusCode.INVALID_ARGUMENT, reason, f"{field}: {message}", field=field)


TRANSLATION: Final[dict[type[errors.DetectorError], tuple[StatusCode, str]]] = {
    errors.DetectorError: (StatusCode.INTERNAL, "DETECTOR_FAILED"),
    errors.InvalidInput: (StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    errors.TooLong: (StatusCode.INVALID_ARGUMENT, "TOO_LONG"),
    errors.TooShort: (StatusCode.INVALID_ARGUMENT, "TOO_SHORT"),
    errors.UnsupportedModel: (StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_MODEL"),
    errors.UnsupportedGeneration: (StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_GENERATION"),
    errors.CaptureError: (StatusCode.INTERNAL, "CAPTURE_FAILED"),
    errors.ProbeMismatch: (StatusCode.FAILED_PRECONDITION, "PROBE_MISMATCH"),
    errors.ProbeCorrupt: (StatusCode.FAILED_PRECONDITION, "PROBE_CORRUPT"),
    errors.RegistryError: (StatusCode.FAILED_PRECONDITION, "REGISTRY_FAILED"),
    errors.UnknownProbe: (StatusCode.NOT_FOUND, "UNKNOWN_PROBE"),
}
"""Every error of the detector: its code and reason. Only INVALID_ARGUMENT lets the error speak for itself."""

FIELDS: Final = {"prompt_ids": "prompt.token_ids", "response_ids": "response.token_ids", "messages": "prompt.messages"}
"""Arguments of the detector that have another name in a request."""


def code_and_reason(error: errors.DetectorError) -> tuple[StatusCode, str]:
    """The row of the table for an error, or for its nearest ancestor."""
    return next(TRANSLATION[kind] for kind in type(error).__mro__ if kind in TRANSLATION)


def refusal_of(error: errors.DetectorError, error_id: str) -> Refusal:
    """The translation of an error of the detector.

    Args:
        error: what the detector raised.
        error_id: names the error's entry in the log, where the client is not told more.
    """
    code, reason = code_and_reason(error)
    if code is not StatusCode.INVALID_ARGUMENT:
        return Refusal(
            code, reason, f"scoring failed, error {error_id}; the server's log has the rest", error_id=error_id
        )
    if isinstance(error, errors.InvalidInput):
        # What comes from another library, such as a chat template, may quote the request.
        refused = f"is not accepted by the model's tokenizer or chat template ({type(error.__cause__).__name__})"
        return invalid(request_field(error.field), refused if error.__cause__ else error.reason, reason)
    return Refusal(code, reason, str(error), field="response")


def request_field(argument: str) -> str:
    """The path in a request of an argument of the detector: prompt_ids[3] -> prompt.token_ids[3]."""
    name = re.split(r"[\[.]", argument, maxsplit=1)[0]
    return FIELDS.get(name, name) + argument[len(name) :]


async def answer(context: Context, refusal: Refusal, request_id: str = "") -> None:
    """Ends the call of this name with the refusal."""
    await context.abort(refusal.code, refusal.message, refusal.trailers(request_id))
