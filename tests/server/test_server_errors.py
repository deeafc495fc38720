"""What a client is told when something goes wrong; grpc.aio's own manners beside ours as the control."""

from __future__ import annotations

import collections
import inspect
import logging
import random
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from attention_fakes import a_header, a_summary, requests, some_maps
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from raw_calls import GARBAGE, METHODS, SECRET, bare_server, good_score, path_of, send_raw
from service_fakes import WAIT, FakeEngine, Running, refused, told

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2
from lapwing_server.attention_assembly import Assembly
from lapwing_server.detector_service import DetectorService
from lapwing_server.health import Health
from lapwing_server.probes_service import ProbesService


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
    forwards = iter(["prompt", "first token", "second token"])

    def fail() -> None:
        if next(forwards, "over") == "over":
            raise RuntimeError(SECRET)

    request = detector_pb2.GenerateRequest(prompt={"text": "hello"})
    with Running(FakeEngine(before=fail)) as server, grpc.insecure_channel(server.target) as channel:
        answers = detector_pb2_grpc.DetectorStub(channel).Generate(request)
        assert [next(answers).token.index for _ in range(2)] == [0, 1]
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(caught.value)


def no_answer(*_: Any) -> None:
    raise TimeoutError(SECRET)


@pytest.mark.parametrize("method", ["Score", "Generate", "ScoreAttention"])
def test_a_timeout_of_the_models_own_is_not_that_of_the_call(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a disk that does not answer, from which the weights are read."""
    monkeypatch.setattr(Assembly, "add_summary", no_answer)
    sent: Any = {
        "Score": detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"}),
        "Generate": detector_pb2.GenerateRequest(prompt={"text": "hello"}),
        "ScoreAttention": requests(a_header(), a_summary(some_maps(5))),
    }[method]
    with Running(FakeEngine(before=no_answer)) as server, grpc.insecure_channel(server.target) as channel:
        error = refused(getattr(detector_pb2_grpc.DetectorStub(channel), method), sent)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert error.error_id


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
