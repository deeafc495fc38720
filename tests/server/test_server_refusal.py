"""What is told of each error: the table is total, details are small and whole, and say whether to try again."""

from __future__ import annotations

import json

import grpc
import pytest
from google.rpc import error_details_pb2
from raw_calls import SECRET, good_score, send_raw
from service_fakes import FakeEngine, Running, told

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector import errors
from lapwing_server.refusal import TRANSLATION, Refusal, invalid, refusal_of, request_field


def family(root: type[errors.DetectorError]) -> set[type[errors.DetectorError]]:
    """The class and all below it."""
    return {root}.union(*(family(child) for child in root.__subclasses__() if child.__module__ == errors.__name__))


def test_the_translation_is_total() -> None:
    assert set(TRANSLATION) == family(errors.DetectorError)
    assert len({reason for _, reason in TRANSLATION.values()}) == len(TRANSLATION), "each has a reason of its own"


MADE: dict[type[errors.DetectorError], errors.DetectorError] = {
    errors.InvalidInput: errors.InvalidInput("prompt_ids[3]", "is 9"),
    errors.TooLong: errors.TooLong("response", "has 9 tokens"),
    errors.TooShort: errors.TooShort(2, 10),
    errors.UnknownProbe: errors.UnknownProbe("name", SECRET),
}


@pytest.mark.parametrize("kind", sorted(TRANSLATION, key=lambda kind: kind.__name__))
def test_every_error_of_the_detector_arrives(kind: type[errors.DetectorError]) -> None:
    raised = MADE.get(kind) or kind(SECRET)

    def fail() -> None:
        raise raised

    with Running(FakeEngine(before=fail)) as server, grpc.insecure_channel(server.target) as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Score", good_score())
    assert (told(error).code, told(error).reason) == TRANSLATION[kind]
    assert SECRET not in str(error) + str(error.trailing_metadata())
    spoke_for_itself = told(error).code is grpc.StatusCode.INVALID_ARGUMENT
    assert bool(told(error).error_id) != spoke_for_itself


def test_an_error_that_is_not_in_the_table_goes_by_its_ancestor() -> None:
    class StillTooLong(errors.TooLong):
        pass

    assert refusal_of(StillTooLong("prompt", "is long"), "id").reason == "TOO_LONG"


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("prompt", "prompt"),
        ("prompt_ids[3]", "prompt.token_ids[3]"),
        ("response_ids[0]", "response.token_ids[0]"),
        ("messages[1].role", "prompt.messages[1].role"),
        ("temperature", "temperature"),
    ],
)
def test_arguments_of_the_detector_become_fields_of_the_request(argument: str, field: str) -> None:
    assert request_field(argument) == field


def test_a_refusal_of_an_item_names_the_item() -> None:
    assert invalid("prompt.text", "is empty").under("items[4]").field == "items[4].prompt.text"
    ours = Refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "x", error_id="id").under("items[4]")
    assert (ours.error_id, ours.field) == ("id", "")


@pytest.mark.parametrize(("text", "field"), [("!", ""), ("", "items[1].response.text")])
def test_only_an_item_that_is_to_blame_is_blamed(text: str, field: str) -> None:
    """A failure of the server's own is no wrong input of the item that it met."""
    items = [{"prompt": {"text": "hello"}, "response": {"text": one}} for one in ("world", text)]
    with Running(FakeEngine(poison=ord("!"))) as server, grpc.insecure_channel(server.target) as channel:
        request = detector_pb2.ScoreBatchRequest(items=items)
        [_, result] = detector_pb2_grpc.DetectorStub(channel).ScoreBatch(request).results
    blamed = error_details_pb2.BadRequest()
    found = [detail for detail in result.error.details if detail.Unpack(blamed)]
    assert [one.field for one in blamed.field_violations] == ([field] if field else [])
    assert len(found) == bool(field)


@pytest.mark.parametrize("count", [900, 100_000])
@pytest.mark.parametrize("character", ["x", "ü", "鳥", "🐦", "\ud800"])
def test_details_stay_small_whatever_the_message(character: str, count: int) -> None:
    text = character * count
    code = grpc.StatusCode.INVALID_ARGUMENT
    refusal = Refusal(code, "INVALID_INPUT", text, field=text, error_id="0123456789ab", retry_after=1.5)
    [(_, details), _] = refusal.trailers()
    assert 1000 < len(details) < 4096
    assert refusal.message == text or refusal.message.endswith("…")


def test_a_long_message_reaches_the_client_whole() -> None:
    def fail() -> None:
        raise errors.InvalidInput("prompt", "鳥" * 100_000)

    with Running(FakeEngine(before=fail)) as server, grpc.insecure_channel(server.target) as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Score", good_score())
    assert told(error).code is grpc.StatusCode.INVALID_ARGUMENT
    assert told(error).message.startswith("prompt: 鳥鳥鳥")


def test_trying_again_later_is_said_in_both_languages() -> None:
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", "x", retry_after=1.5)
    trailers = dict(refusal.trailers())
    assert trailers["grpc-retry-pushback-ms"] == "1500"
    assert "x-request-id" not in trailers
    retry = error_details_pb2.RetryInfo()
    assert refusal.status().details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == 1_500_000_000


@pytest.mark.parametrize("never", [False, True])
def test_what_never_succeeds_stops_a_clients_retries(never: bool) -> None:
    """The retries of gRPC's service config obey the trailer: the handler is called once, or as often as they go."""
    calls = 0

    def refuse() -> None:
        nonlocal calls
        calls += 1
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA", "used up", never_retry=never)

    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    options = [("grpc.service_config", config)]
    with Running() as server, grpc.insecure_channel(server.target, options=options) as channel:
        server.server.guard.admit = lambda method, context: refuse()  # type: ignore[assignment, func-returns-value]
        error = send_raw(channel, "/lapwing.v1.Detector/Score", good_score())
    assert told(error).reason == "QUOTA"
    assert calls == (1 if never else 3)
    assert Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA", "x", never_retry=True).under("items[1]").never_retry


def test_the_words_of_a_chat_template_stay_here() -> None:
    """They are another library's, and may quote a message."""
    quoting = errors.InvalidInput("messages", f"the template says: unknown role {SECRET}")
    quoting.__cause__ = ValueError(SECRET)
    refusal = refusal_of(quoting, "")
    assert (refusal.reason, refusal.field) == ("INVALID_INPUT", "prompt.messages")
    assert "chat template (ValueError)" in refusal.message
    assert SECRET not in refusal.message
    quoting.__cause__ = None
    assert SECRET in refusal_of(quoting, "").message, "control: our own words are passed on"
