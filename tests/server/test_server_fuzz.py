"""Payloads that no client of ours would send: each is answered by a code that blames it, and the server lives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from attention_fakes import a_header, a_summary, requests, score_now, some_maps, some_rows
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_fakes import WAIT, FakeEngine, Running

from lapwing.v1 import detection_pb2, detector_pb2, probes_pb2
from lapwing_server.limits import Limits

EXAMPLES = 10_000 if os.environ.get("LAPWING_SOAK") == "1" else 120
"""Payloads for each rpc."""

SERVICES = [
    service for file in (detector_pb2.DESCRIPTOR, probes_pb2.DESCRIPTOR) for service in file.services_by_name.values()
]
METHODS = {method.name: method for service in SERVICES for method in service.methods}

BLAMES_THE_PAYLOAD = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
"""The last for what is too large."""


PROMPT, RESPONSE = detection_pb2.Prompt(text="Where is it?"), detection_pb2.Response(text="In Oslo.")
MAPS = some_maps(5)
VALID: dict[str, list[Message]] = {
    "Score": [
        detector_pb2.ScoreRequest(prompt=PROMPT, response=RESPONSE, false_positive_rate=0.05),
        detector_pb2.ScoreRequest(
            prompt=detection_pb2.Prompt(token_ids=[1, 2, 3]), response=detection_pb2.Response(token_ids=[4, 5])
        ),
    ],
    "ScoreBatch": [
        detector_pb2.ScoreBatchRequest(items=[detector_pb2.ScoreItem(prompt=PROMPT, response=RESPONSE)] * 2)
    ],
    "Generate": [
        detector_pb2.GenerateRequest(
            prompt=detection_pb2.Prompt(messages=[detection_pb2.ChatMessage(role="user", content="Where?")]),
            max_new_tokens=3,
            temperature=0.5,
            top_p=0.9,
            seed=1,
            stop_strings=["."],
            stop_when_probability_above=0.9,
            minimum_tokens=2,
            score_every=2,
        )
    ],
    "ScoreAttention": [
        *requests(a_header(), a_summary(MAPS), some_rows(MAPS), a_summary(MAPS, 0, 3), some_rows(MAPS, 3), score_now())
    ],
    "GetServerInfo": [detector_pb2.GetServerInfoRequest()],
    "ListProbes": [probes_pb2.ListProbesRequest(page_size=2, page_token="after:a")],
    "GetProbe": [probes_pb2.GetProbeRequest(name="fake-probe")],
    "GetHeatmap": [
        probes_pb2.GetHeatmapRequest(statistic=probes_pb2.STATISTIC_AUROC, image_format=probes_pb2.IMAGE_FORMAT_PNG)
    ],
    "ActivateProbe": [
        probes_pb2.ActivateProbeRequest(name="fake-probe"),
        probes_pb2.ActivateProbeRequest(name="fake-probe", revision="0"),
    ],
    "ReloadProbes": [probes_pb2.ReloadProbesRequest()],
}


def mutated(valid: list[Message]) -> st.SearchStrategy[bytes]:
    """A valid message that something happened to."""

    def change(data: bytes, place: int, kind: str, extra: bytes) -> bytes:
        at = place % (len(data) + 1)
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + extra + data[at:]
        if kind == "overwrite":
            return data[:at] + extra + data[at + len(extra) :]
        if kind == "repeat":
            return data[:at] + data[at:] * 3
        flipped = bytearray(data or b"\0")
        flipped[place % len(flipped)] ^= 1 << (place % 8)
        return bytes(flipped)

    return st.builds(
        change,
        st.sampled_from([message.SerializeToString() for message in valid]),
        st.integers(0, 10_000),
        st.sampled_from(["cut", "insert", "overwrite", "repeat", "flip"]),
        st.binary(min_size=1, max_size=12),
    )


def payloads(method: str) -> st.SearchStrategy[bytes]:
    return st.one_of(mutated(VALID[method]), st.binary(max_size=60))


def calls(method: Any) -> st.SearchStrategy[list[bytes]]:
    """The messages of a call, some of them valid; of a stream mostly the first ones are, so that it gets further."""
    valid = [message.SerializeToString() for message in VALID[method.name]]
    some = st.lists(st.one_of(payloads(method.name), st.sampled_from(valid)), min_size=1, max_size=1)
    if not method.client_streaming:
        return some
    header, summary, _, half, *_ = valid
    more = st.lists(st.one_of(mutated(VALID[method.name]), st.sampled_from(valid)), max_size=3)
    return st.one_of(
        some,
        more.map(lambda rest: [header, *rest]),
        more.map(lambda rest: [header, *rest, summary]),
        more.map(lambda rest: [header, half, *rest]),
    )


def outcome(channel: grpc.Channel, method: Any, messages: list[bytes]) -> grpc.RpcError | None:
    """How the call ended; None well."""
    sends, answers = method.client_streaming, method.server_streaming
    kind = f"{'stream' if sends else 'unary'}_{'stream' if answers else 'unary'}"
    call: Callable[..., Any] = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
    try:
        reply = call(iter(messages) if sends else messages[0], timeout=WAIT)
        if answers:
            list(reply)
    except grpc.RpcError as error:
        return error
    return None


def explained(error: Any) -> tuple[str, str]:
    """(reason, field) of a refusal."""
    details = dict(error.trailing_metadata()).get("grpc-status-details-bin")
    if details is None:  # gRPC's own: the message is too large
        return "MESSAGE_TOO_LARGE", ""
    status = status_pb2.Status.FromString(details)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info) or detail.Unpack(bad)
    return info.reason, bad.field_violations[0].field if bad.field_violations else ""


def parses(method: Any, data: bytes) -> bool:
    try:
        GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        return False
    return True


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    engine = FakeEngine()
    with Running(engine, limits=Limits(new_tokens=8)) as server, grpc.insecure_channel(server.target) as channel:
        yield channel
        server.settle()


def test_every_rpc_is_fuzzed() -> None:
    assert set(VALID) == set(METHODS)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.timeout(3600)
def test_whatever_comes_is_answered_and_the_payload_blamed(name: str, channel: grpc.Channel) -> None:
    method, codes, blamed = METHODS[name], Counter[str](), Counter[str]()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(calls(method))
    def answered(messages: list[bytes]) -> None:
        error = outcome(channel, method, messages)
        code = "OK" if error is None else error.code().name  # type: ignore[attr-defined]
        assert code in BLAMES_THE_PAYLOAD, (code, error)
        codes[code] += 1
        if error is None:
            assert parses(method, messages[0])
            return
        reason, field = explained(error)
        blamed[field.split(".")[0]] += 1
        if not parses(method, messages[0]):
            assert (code, reason) == ("INVALID_ARGUMENT", "MALFORMED")
        elif code == "INVALID_ARGUMENT" and reason != "MALFORMED":
            assert field, error  # a semantic error says where

    answered()
    valid = [message.SerializeToString() for message in VALID[name][: 2 if method.client_streaming else 1]]
    assert outcome(channel, method, valid) is None, "control: without a change it comes all the way through"
    assert codes["INVALID_ARGUMENT"] > EXAMPLES // 10, "control: many did not"
    if name == "ScoreAttention":
        assert min(blamed[part] for part in ("header", "summary", "rows")) > EXAMPLES // 100, "wherever they came to"
    score = METHODS["Score"]
    assert outcome(channel, score, [VALID["Score"][0].SerializeToString()]) is None  # it lives


def test_control_a_server_that_lets_the_decoder_speak_is_caught() -> None:
    """The same check on gRPC's own behaviour: an exception of the deserializer becomes UNKNOWN or INTERNAL."""
    from concurrent.futures import ThreadPoolExecutor

    method = METHODS["Score"]
    handler = grpc.unary_unary_rpc_method_handler(
        lambda request, context: detector_pb2.ScoreResponse(),
        request_deserializer=detector_pb2.ScoreRequest.FromString,
        response_serializer=detector_pb2.ScoreResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(method.containing_service.full_name, {"Score": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            error: Any = outcome(channel, method, [b"\x0a\xff"])
            assert error.code().name not in BLAMES_THE_PAYLOAD
    finally:
        server.stop(None)
