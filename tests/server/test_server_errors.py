"""What a client is told when something goes wrong; grpc.aio's own manners beside ours as the control."""

from __future__ import annotations

import asyncio
import collections
import inspect
import json
import logging
import random
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from service_fakes import WAIT, FakeEngine, Running, told

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2
from lapwing_detector import errors
from lapwing_server.detector_service import DetectorService
from lapwing_server.health import Health
from lapwing_server.limits import Limits
from lapwing_server.probes_service import ProbesService
from lapwing_server.refusal import TRANSLATION, Refusal, invalid, refusal_of, request_field

SECRET = "the key is in /root/secret"
GARBAGE = b"\xff\xff\xff"

METHODS = [
    method
    for file in (detector_pb2.DESCRIPTOR, probes_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]


def path_of(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def send_raw(channel: grpc.Channel, path: str, data: bytes, requests: bool = False, responses: bool = False) -> Any:
    """The error that these bytes are answered with."""
    kind = f"{'stream' if requests else 'unary'}_{'stream' if responses else 'unary'}"
    try:
        answer = getattr(channel, kind)(path)(iter([data]) if requests else data, timeout=WAIT)
        answers = list(answer) if responses else [answer]
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"the bytes were answered with {answers}")


@contextmanager
def bare_server() -> Iterator[grpc.Channel]:
    """grpc.aio without our guard: the control."""

    class Service(detector_pb2_grpc.DetectorServicer):
        async def Score(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise RuntimeError(SECRET)

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server()
        detector_pb2_grpc.add_DetectorServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(WAIT)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT)
        loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running(reflection=True) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_malformed_bytes_are_the_callers_fault(channel: grpc.Channel, method: Any) -> None:
    error = send_raw(channel, path_of(method), GARBAGE, method.client_streaming, method.server_streaming)
    assert (told(error).code, told(error).reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED")


def test_malformed_bytes_to_health_and_reflection_are_the_callers_fault(channel: grpc.Channel) -> None:
    check = send_raw(channel, "/grpc.health.v1.Health/Check", GARBAGE)
    watch = send_raw(channel, "/grpc.health.v1.Health/Watch", GARBAGE, responses=True)
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    reflect = send_raw(channel, path, GARBAGE, requests=True, responses=True)
    for error in (check, watch, reflect):
        assert (told(error).code, told(error).reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED")


def test_control_malformed_bytes_without_the_guard() -> None:
    with bare_server() as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Score", GARBAGE)
    assert error.code() is grpc.StatusCode.UNKNOWN


def good_score() -> bytes:
    request = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    return request.SerializeToString()


def test_an_exception_becomes_an_id_that_the_log_knows(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError(SECRET)

    with Running(FakeEngine(before=fail)) as server, grpc.insecure_channel(server.target) as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Score", good_score())
    assert (told(error).code, told(error).reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    error_id = told(error).error_id
    assert error_id in error.details()
    assert SECRET not in str(error) + str(error.trailing_metadata())
    [entry] = [record for record in caplog.records if error_id in record.getMessage()]
    assert vars(entry)["error"] == "RuntimeError"
    assert vars(entry)["at"][-1].endswith(" fail"), "the way through the code is logged"
    assert all(SECRET not in str(vars(record)) for record in caplog.records), "an error's text may quote a prompt"


def test_the_text_of_an_exception_is_logged_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError(SECRET)

    caplog.set_level(logging.DEBUG, "lapwing.server")
    with Running(FakeEngine(before=fail)) as server, grpc.insecure_channel(server.target) as channel:
        send_raw(channel, "/lapwing.v1.Detector/Score", good_score())
    assert SECRET in caplog.text


def test_control_an_exception_without_the_guard_leaks() -> None:
    with bare_server() as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Score", good_score())
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert SECRET in error.details()


def test_an_exception_in_a_stream_becomes_an_id() -> None:
    steps = iter([None, None])

    def fail() -> None:
        if next(steps, "over") == "over":
            raise RuntimeError(SECRET)

    request = detector_pb2.GenerateRequest(prompt={"text": "hello"})
    with Running(FakeEngine(before=fail)) as server, grpc.insecure_channel(server.target) as channel:
        answers = detector_pb2_grpc.DetectorStub(channel).Generate(request)
        assert [next(answers).token.index for _ in range(2)] == [0, 1]
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("path", ["/lapwing.v1.Detector/Nope", "/no.Service/Nope", "nope"])
def test_an_unknown_method_says_so(channel: grpc.Channel, path: str, requests: bool, responses: bool) -> None:
    error = send_raw(channel, path, GARBAGE, requests, responses)
    assert (told(error).code, told(error).reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD")
    assert "nope" not in error.details().lower()


def test_control_an_unknown_method_without_the_guard_has_no_details() -> None:
    with bare_server() as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Nope", b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.trailing_metadata() in (None, ())


def test_an_unknown_service_of_the_health_is_not_found(channel: grpc.Channel) -> None:
    error = send_raw(
        channel, "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="nope").SerializeToString()
    )
    assert (told(error).code, told(error).reason, told(error).field) == (
        grpc.StatusCode.NOT_FOUND,
        "UNKNOWN_SERVICE",
        "service",
    )


def test_a_message_that_is_too_large_is_refused_by_grpc_itself_in_words_without_the_message() -> None:
    """It carries no details: gRPC ends the call before a handler sees it."""
    request = detector_pb2.ScoreRequest(prompt={"text": SECRET * 100}, response={"text": "x"}).SerializeToString()
    limits = Limits(request_bytes=1000)
    with Running(limits=limits) as server, grpc.insecure_channel(server.target) as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/Score", request)
        assert send_raw(channel, "/lapwing.v1.Detector/Score", GARBAGE).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"larger than max ({len(request)} vs. 1000)" in error.details()
    assert SECRET not in error.details()


def test_a_large_message_that_is_compressed_is_refused_too() -> None:
    request = detector_pb2.ScoreRequest(prompt={"text": "x" * 100_000}, response={"text": "x"})
    gzip = grpc.Compression.Gzip
    with Running(limits=Limits(request_bytes=1000)) as server:
        channel = grpc.insecure_channel(server.target, compression=gzip)
        with channel, pytest.raises(grpc.RpcError) as caught:
            detector_pb2_grpc.DetectorStub(channel).Score(request, timeout=WAIT)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(zlib.compress(request.SerializeToString())) < 1000, "control: on the wire it was small"


NAMES = {"given": "trace-7.a/b", "long": "x" * 65, "odd": "two words", "empty": ""}


@pytest.mark.parametrize("path", ["/lapwing.v1.Detector/GetServerInfo", "/lapwing.v1.Detector/Score", "/no/such"])
@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_every_call_has_a_name(channel: grpc.Channel, path: str, name: str) -> None:
    metadata = (("x-request-id", NAMES[name]),) if name in NAMES else ()
    try:
        _, call = channel.unary_unary(path).with_call(b"", timeout=WAIT, metadata=metadata)
    except grpc.RpcError as error:
        call = error  # type: ignore[assignment]  # it is a call, too
        info = error_details_pb2.ErrorInfo()
        status = status_pb2.Status.FromString(dict(call.trailing_metadata())["grpc-status-details-bin"])
        assert status.details[0].Unpack(info)
        assert info.metadata["request_id"] == dict(call.trailing_metadata())["x-request-id"]
    found = dict(call.trailing_metadata())["x-request-id"]
    assert (found == NAMES.get(name)) == (name == "given")
    assert name == "given" or re.fullmatch("[0-9a-f]{16}", found)


def test_two_calls_have_two_names(channel: grpc.Channel) -> None:
    calls = [
        channel.unary_unary("/lapwing.v1.Detector/GetServerInfo").with_call(b"", timeout=WAIT)[1] for _ in range(20)
    ]
    assert len({dict(call.trailing_metadata())["x-request-id"] for call in calls}) == 20


def test_no_handler_is_a_plain_function() -> None:
    """gRPC would run it in a thread pool that all calls share."""
    for service in (DetectorService, ProbesService, Health):
        rpcs = [value for name, value in vars(service).items() if name[0].isupper()]
        assert rpcs
        assert all(inspect.iscoroutinefunction(rpc) or inspect.isasyncgenfunction(rpc) for rpc in rpcs)


def test_every_method_of_the_wire_is_written() -> None:
    for method in METHODS:
        service = DetectorService if method.containing_service.name == "Detector" else ProbesService
        assert method.name in vars(service)


def test_a_plain_function_is_refused(server: Running) -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    with pytest.raises(TypeError, match="/x is a plain function"):
        server.server.guard._guarded(handler, "/x")


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
    assert Refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "x", error_id="id").under("items[4]").error_id == "id"


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


VALID = {
    "Score": good_score(),
    "ScoreBatch": detector_pb2.ScoreBatchRequest(
        items=[
            {"prompt": {"text": "hello"}, "response": {"token_ids": [1, 2, 3]}},
            {"prompt": {"messages": [{"role": "user", "content": "hi"}]}, "response": {"text": "world"}},
        ],
        false_positive_rate=0.05,
    ).SerializeToString(),
    "Generate": detector_pb2.GenerateRequest(
        prompt={"text": "hello"}, max_new_tokens=2, temperature=0.5, top_p=0.9, seed=1
    ).SerializeToString(),
    "ListProbes": probes_pb2.ListProbesRequest(page_size=3, page_token="after:a").SerializeToString(),
    "GetProbe": probes_pb2.GetProbeRequest(name="fake-probe").SerializeToString(),
    "GetHeatmap": probes_pb2.GetHeatmapRequest(
        probe="fake-probe", feature="laplacian_eigenvalues.v1", statistic=1
    ).SerializeToString(),
}


@pytest.mark.parametrize("method", [method for method in METHODS if method.name in VALID], ids=lambda one: one.name)
def test_mutated_payloads_are_answered_or_refused(channel: grpc.Channel, method: Any) -> None:
    generator = random.Random(11)
    kind = "unary_stream" if method.server_streaming else "unary_unary"
    call = getattr(channel, kind)(path_of(method))
    codes: collections.Counter[str] = collections.Counter()
    for _ in range(300):
        data = bytearray(VALID[method.name])
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data))
            data[place : place + generator.randint(0, 2)] = generator.randbytes(generator.randint(0, 2))
            data = data or bytearray(b"\0")
        codes[code_of(call, bytes(data))] += 1
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}, codes
    assert codes["INVALID_ARGUMENT"] > 50, codes


def code_of(call: Any, data: bytes) -> str:
    """How the bytes are answered; a refusal must have all its parts."""
    try:
        answer = call(data, timeout=WAIT)
        _ = answer if isinstance(answer, bytes) else list(answer)
    except grpc.RpcError as error:
        return told(error).code.name
    return "OK"
