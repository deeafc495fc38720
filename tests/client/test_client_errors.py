"""The error tree: total over gRPC's codes, readable by people and by programs."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import lapwing_client
from lapwing_client import errors
from lapwing_client.errors import BY_CODE, LapwingError, error_of_call, error_of_status
from lapwing_server.refusal import Refusal


class FakeRpcError:
    """What gRPC raises, as far as it is read."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailers: Any = ()) -> None:
        self._answers = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._answers[0]

    def details(self) -> str | None:
        return self._answers[1]

    def trailing_metadata(self) -> Any:
        return self._answers[2]


def tree(root: type[LapwingError]) -> list[type[LapwingError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


def test_every_code_but_ok_has_an_error() -> None:
    assert set(BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("kind", tree(LapwingError)[1:], ids=lambda kind: kind.__name__)
def test_every_error_says_who_must_act_and_can_be_imported(kind: type[LapwingError]) -> None:
    assert kind.who_acts != LapwingError.who_acts
    assert "who_acts" in vars(kind)
    assert getattr(lapwing_client, kind.__name__) is kind


@pytest.mark.parametrize("code", BY_CODE, ids=lambda code: code.name)
def test_what_the_server_refuses_arrives_whole(code: grpc.StatusCode) -> None:
    refusal = Refusal(code, "SOME_REASON", "words", field="items[1].prompt", error_id="0123", retry_after=1.5)
    for error in (
        error_of_call(FakeRpcError(code, "words", refusal.trailers()), "here"),
        error_of_status(refusal.status()),
    ):
        assert type(error) is BY_CODE[code]
        assert (error.message, error.reason, error.code) == ("words", "SOME_REASON", code.name)
        assert (error.field, error.error_id, error.retry_after) == ("items[1].prompt", "0123", 1.5)


@pytest.mark.parametrize("code", BY_CODE, ids=lambda code: code.name)
def test_an_error_without_details_is_still_one_of_ours(code: grpc.StatusCode) -> None:
    for text in ("words", None):
        error = error_of_call(FakeRpcError(code, text, None), "here")
        assert type(error) is BY_CODE[code]
        assert error.reason == ""
        assert str(error)


def test_nobody_there_names_the_address_and_the_mend() -> None:
    error = error_of_call(FakeRpcError(grpc.StatusCode.UNAVAILABLE, "refused"), "example.org:1")
    assert str(error) == "no Lapwing server answers at example.org:1 (refused); start one: lapwing serve"


def test_a_code_that_nobody_knows_is_an_error_of_the_server() -> None:
    assert type(error_of_status(status_pb2.Status(code=99, message="x"))) is errors.ServerError


def test_details_that_are_not_ours_are_passed_over() -> None:
    status = status_pb2.Status(code=3, message="x")
    status.details.add().Pack(error_details_pb2.Help())
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="R"))
    error = error_of_status(status)
    assert isinstance(error, errors.InvalidRequest)
    assert (error.reason, error.field, error.retry_after) == ("R", "", None)


@pytest.mark.parametrize(
    ("reason", "retry_after", "kind"),
    [
        ("QUEUE_FULL", 0.5, errors.Overloaded),
        ("RATE_LIMITED", 0.5, errors.Overloaded),
        ("TOO_MANY_STREAMS", 0.5, errors.Overloaded),
        ("QUEUE_FULL", None, errors.TooLarge),  # more items than the queue ever holds
        ("", None, errors.Overloaded),  # of somebody else, who says nothing
    ],
)
def test_who_must_act_when_it_is_too_much(reason: str, retry_after: float | None, kind: type[LapwingError]) -> None:
    """What passes is the server's business; what never passes is the caller's."""
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, "too much", retry_after=retry_after)
    for error in (
        error_of_call(FakeRpcError(refusal.code, "too much", refusal.trailers()), "here"),
        error_of_status(refusal.status()),
    ):
        assert type(error) is kind
        assert (error.reason, error.retry_after) == (reason, retry_after)
        assert ("try again" in error.who_acts) == (kind is errors.Overloaded)


@pytest.mark.parametrize("who", ["", "SERVER: ", "CLIENT: "])
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("(9 vs. 8)", "the request has 9 bytes, the server reads no message of more than 8"),
        (f"(99 vs. {errors.LARGEST_REPLY})", "the answer has 99 bytes, this client reads 67108864; ask for less"),
        ("in words of another version", "server_info().limits.max_request_bytes says how much it takes"),
    ],
)
def test_grpc_itself_may_find_a_message_too_large(who: str, sizes: str, said: str) -> None:
    text = f"{who}Received message larger than max {sizes}"
    error = error_of_call(FakeRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, text), "here")
    assert type(error) is errors.TooLarge
    assert (error.reason, error.retry_after) == ("MESSAGE_TOO_LARGE", None)
    assert said in error.message


def test_an_error_becomes_json() -> None:
    error = errors.Overloaded("too much", reason="QUEUE_FULL", code="RESOURCE_EXHAUSTED", retry_after=0.5)
    assert json.loads(json.dumps(error.to_dict())) == {
        "error": "Overloaded",
        "message": "too much",
        "reason": "QUEUE_FULL",
        "code": "RESOURCE_EXHAUSTED",
        "field": "",
        "error_id": "",
        "retry_after": 0.5,
        "who_acts": errors.Overloaded.who_acts,
    }
