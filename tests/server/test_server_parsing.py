"""A request is read when it is known who calls, and not built when it is too large; gRPC's own manners as control."""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from raw_calls import SECRET, good_score, send_raw
from service_fakes import WAIT, Running, told, wait_until

from lapwing.v1 import detection_pb2, detector_pb2
from lapwing_server import parsing
from lapwing_server.guard import Guard
from lapwing_server.limits import Limits
from lapwing_server.refusal import Refusal
from lapwing_server.security.tokens import digest_of

SCORE, BATCH = "/lapwing.v1.Detector/Score", "/lapwing.v1.Detector/ScoreBatch"
EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT
ITEM = b"\x0a\x00"
"""An empty item of a ScoreBatchRequest: two bytes on the wire."""


def nobody(method: str, context: Any) -> Any:
    raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "who are you?")


@contextmanager
def counting_server(*interceptors: Any, guard: Guard | None = None) -> Iterator[tuple[grpc.Channel, list[int]]]:
    """A server that notes the sizes of what its parser is given."""
    parsed: list[int] = []

    def parse(data: bytes) -> bytes:
        parsed.append(len(data))
        return data

    async def answer(request: bytes, context: Any) -> bytes:
        return b""

    async def answers(request: bytes, context: Any) -> Any:
        yield b""

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server(interceptors=interceptors)
        if guard is not None:
            server.add_generic_rpc_handlers((guard,))
        handlers = {
            "Score": grpc.unary_unary_rpc_method_handler(answer, parse),
            "Generate": grpc.unary_stream_rpc_method_handler(answers, parse),
        }
        (guard or server).add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("lapwing.v1.Detector", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    with Running() as running:  # for its loop
        server, port = running.call(start())
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel, parsed
        finally:
            running.call(server.stop(None))


def a_guard(admit: Any = None) -> Guard:
    """Its parser's thread ends with it."""
    parser = parsing.Parser()
    guard = Guard(admit=admit, parser=parser)
    weakref.finalize(guard, parser.close)
    return guard


LARGE = detector_pb2.ScoreRequest(probe="x" * 1_000_000).SerializeToString()


@pytest.mark.parametrize("name", ["Score", "Generate"])
def test_what_is_refused_at_the_door_is_never_parsed(name: str) -> None:
    path, stream = f"/lapwing.v1.Detector/{name}", name == "Generate"
    with counting_server(guard=a_guard(nobody)) as (channel, parsed):
        for _ in range(3):
            error = send_raw(channel, path, LARGE, responses=stream)
            assert told(error).reason == "UNAUTHENTICATED"
        assert parsed == []
    with counting_server(guard=a_guard()) as (channel, parsed):
        call = channel.unary_stream(path) if stream else channel.unary_unary(path)
        answer = call(LARGE, timeout=WAIT)
        assert (list(answer) if stream else [answer]) == [b""]
        assert parsed == [len(LARGE)], "control"


def test_control_grpc_alone_parses_before_it_calls_anybody() -> None:
    class Door(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = await continuation(details)

            async def refuse(request: Any, context: Any) -> None:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

            return grpc.unary_unary_rpc_method_handler(refuse, handler.request_deserializer)

    with counting_server(Door()) as (channel, parsed):
        assert send_raw(channel, SCORE, LARGE).code() is grpc.StatusCode.UNAUTHENTICATED
        assert parsed == [len(LARGE)]


def test_of_who_may_not_call_not_even_what_is_far_too_large_is_received(tmp_path: Path) -> None:
    """What gRPC would refuse for its size, had it read it, is refused for who sent it."""
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[tokens]]\nname = "somebody"\nsha256 = "{digest_of("right")}"\nscopes = ["score"]\n')
    payload = ITEM * 2_000_000
    codes = []
    with (
        Running(tokens_file=file, limits=Limits(request_bytes=1000)) as server,
        grpc.insecure_channel(server.target, compression=grpc.Compression.Gzip) as channel,
    ):
        for token in ("wrong", "right"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(BATCH)(payload, timeout=WAIT, metadata=[("authorization", f"Bearer {token}")])
            codes.append(caught.value.code())
    assert codes == [grpc.StatusCode.UNAUTHENTICATED, EXHAUSTED]


def test_a_call_without_a_request_says_so() -> None:
    with Running() as server, grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(SCORE)(iter([]), timeout=WAIT)
    assert (told(caught.value).code, told(caught.value).reason) == (INVALID, "NO_REQUEST")


@pytest.mark.parametrize(("timeout", "code"), [(None, "CANCELLED"), (0.2, "DEADLINE_EXCEEDED")])
def test_a_client_that_leaves_before_its_request_came_is_not_blamed(timeout: float | None, code: str) -> None:
    leaving = threading.Event()

    def nothing() -> Iterator[bytes]:
        leaving.wait(WAIT)
        yield from ()

    with Running() as server, grpc.insecure_channel(server.target) as channel:
        call = channel.stream_unary(SCORE).future(nothing(), timeout=timeout)
        wait_until(lambda: server.server.guard.in_flight == 1)
        if timeout is None:
            call.cancel()
        wait_until(lambda: counted(server, code) == 1)
        leaving.set()


@pytest.mark.parametrize("seconds", [0.2, WAIT], ids=["", "control: within the time it is waited for"])
@pytest.mark.parametrize("path", [SCORE, "/grpc.health.v1.Health/Check"])
def test_a_call_whose_request_does_not_come_is_not_kept_for_ever(path: str, seconds: float) -> None:
    """Nor one that needs no token, so that it can't be told who keeps so many."""
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(WAIT)
        yield from ()

    limits = Limits(stream_seconds=seconds)
    with Running(limits=limits, grace=0.0) as server, grpc.insecure_channel(server.target) as channel:
        call = channel.stream_unary(path).future(nothing(), timeout=WAIT)
        if seconds < WAIT:
            assert told(call.exception(WAIT)).reason == "NO_REQUEST"
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: in_flight(server, path) == 0)
        else:
            never.wait(0.5)
            assert in_flight(server, path) == 1
            call.cancel()
        never.set()


def in_flight(server: Running, path: str) -> float:
    """Calls of the method that have not ended."""
    return server.server.metrics.registry.get_sample_value("lapwing_calls_in_flight", {"method": path[1:]}) or 0.0


def counted(server: Running, code: str) -> float:
    """Calls of Score that ended so."""
    labels = {"method": SCORE[1:], "code": code}
    return server.server.metrics.registry.get_sample_value("lapwing_calls_total", labels) or 0.0


RETRIES = {
    "maxAttempts": 4,
    "initialBackoff": "0.01s",
    "maxBackoff": "0.01s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
}
RETRYING = [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRIES}]}))]


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
def test_a_message_that_is_too_large_is_refused_once_and_counted(compression: Any) -> None:
    request = detector_pb2.ScoreRequest(prompt={"text": SECRET * 100}, response={"text": "x"}).SerializeToString()
    assert len(zlib.compress(request)) < 1000, "on the wire it may be small"
    with (
        Running(limits=Limits(request_bytes=1000)) as server,
        grpc.insecure_channel(server.target, options=RETRYING, compression=compression) as channel,
    ):
        error = send_raw(channel, SCORE, request)
        server.settle()
        wait_until(lambda: counted(server, "RESOURCE_EXHAUSTED") > 0)
        assert counted(server, "RESOURCE_EXHAUSTED") == 1, "a client's retries know that it is of no use"
        assert channel.unary_unary(SCORE)(good_score(), timeout=WAIT), "the server takes the next one"
    assert (told(error).code, told(error).reason) == (EXHAUSTED, "TOO_LARGE")
    assert f"has {len(request)} bytes, the server takes 1000 in one message" in error.details()
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    assert SECRET not in str(error)


def test_the_limit_is_exact() -> None:
    most = len(good_score())
    for limit, fits in ((most, True), (most - 1, False)):
        limits = Limits(request_bytes=limit)
        with Running(limits=limits) as server, grpc.insecure_channel(server.target) as channel:
            if fits:
                assert channel.unary_unary(SCORE)(good_score(), timeout=WAIT)
            else:
                assert told(send_raw(channel, SCORE, good_score())).reason == "TOO_LARGE"


def test_a_message_of_a_stream_that_is_too_large_is_refused_too() -> None:
    request = detector_pb2.ScoreAttentionRequest(header={"probe": "x" * 2000}).SerializeToString()
    with Running(limits=Limits(request_bytes=1000)) as server, grpc.insecure_channel(server.target) as channel:
        error = send_raw(channel, "/lapwing.v1.Detector/ScoreAttention", request, requests=True, responses=True)
    assert (told(error).code, told(error).reason) == (EXHAUSTED, "TOO_LARGE")


def test_what_grpc_itself_refuses_is_counted_too_and_bounds_what_a_message_unpacks_to() -> None:
    """Far above our own limit, in its words."""
    with Running(limits=Limits(request_bytes=1000)) as server:
        most = dict(server.server.settings.options)["grpc.max_receive_message_length"]
        assert 1000 + 2**20 <= most <= 2 * 2**20
        with grpc.insecure_channel(server.target, compression=grpc.Compression.Gzip) as channel:
            error = send_raw(channel, SCORE, b"x" * (most + 1))
            assert told(send_raw(channel, SCORE, b"x" * most)).reason == "TOO_LARGE", "control"
        server.settle()
        wait_until(lambda: counted(server, "CANCELLED") + counted(server, "RESOURCE_EXHAUSTED") == 2)
    assert error.code() is EXHAUSTED
    assert f"larger than max ({most + 1} vs. {most})" in error.details()


def test_the_largest_limit_that_can_be_set_is_one_that_grpc_takes() -> None:
    with Running(limits=Limits(request_bytes=2**31 - 1)) as server, grpc.insecure_channel(server.target) as channel:
        assert channel.unary_unary(SCORE)(good_score(), timeout=WAIT)


class Watching:
    """Stands for generated code."""

    def __init__(self, parse: Callable[[bytes], Any]) -> None:
        self.parsed = 0
        self._parse = parse

    def __call__(self, data: bytes) -> Any:
        self.parsed += 1
        return self._parse(data)


def read(data: bytes, path: str, parse: Callable[[bytes], Any], **limits: Any) -> tuple[Any, int]:
    """The request, or its refusal, and how often something was parsed for it."""
    watching, parser = Watching(parse), parsing.Parser(Limits(**limits))
    try:
        return asyncio.run(parser.request(data, path, watching)), watching.parsed
    except Refusal as refusal:
        return refusal, watching.parsed
    finally:
        parser.close()


def test_a_million_empty_items_are_refused_and_none_is_built() -> None:
    refusal, parsed = read(ITEM * 1_000_000, BATCH, detector_pb2.ScoreBatchRequest.FromString)
    assert (refusal.code, refusal.reason, refusal.field) == (INVALID, "BATCH_SIZE", "items")
    assert "more than 64 items" in refusal.message
    assert parsed == 0


def test_a_million_empty_items_are_refused_by_a_server() -> None:
    with Running() as server, grpc.insecure_channel(server.target) as channel:
        error = send_raw(channel, BATCH, ITEM * 1_000_000)
    assert (told(error).code, told(error).reason, told(error).field) == (INVALID, "BATCH_SIZE", "items")


def inside(number: int, data: bytes) -> bytes:
    """A field that holds a message."""
    size = detection_pb2.Response(text="x" * len(data)).SerializeToString()[1 : -len(data)]
    return bytes([number << 3 | 2]) + size + data


MANY: dict[str, tuple[str, Any, bytes]] = {
    "turns": (SCORE, detector_pb2.ScoreRequest, inside(1, b"\x12\x00" * 1_000_000)),
    "turns of an item": (BATCH, detector_pb2.ScoreBatchRequest, inside(1, inside(1, b"\x12\x00" * 1_000_000))),
    "stop strings": ("/lapwing.v1.Detector/Generate", detector_pb2.GenerateRequest, b"\x3a\x00" * 1_000_000),
    "the same field": (SCORE, detector_pb2.ScoreRequest, b"\x22\x00" * 1_000_000),
    "fields of another version": (SCORE, detector_pb2.ScoreRequest, b"\xf8\x7f\x00" * 1_000_000),
}


@pytest.mark.parametrize("what", MANY)
def test_a_million_of_anything_is_too_large(what: str) -> None:
    path, kind, data = MANY[what]
    refusal, parsed = read(data, path, kind.FromString)
    assert (refusal.code, refusal.reason, refusal.never_retry) == (EXHAUSTED, "TOO_LARGE", True)
    assert parsed == 0
    assert kind.FromString(data), "control: it is a message of this type"


def test_the_largest_batch_that_may_be_is_taken() -> None:
    turns = [detection_pb2.ChatMessage(role="user", content="x" * 30)] * 1000
    item = detector_pb2.ScoreItem(prompt={"messages": turns}, response={"text": "x"})
    data = detector_pb2.ScoreBatchRequest(items=[item] * 64).SerializeToString()
    request, parsed = read(data, BATCH, detector_pb2.ScoreBatchRequest.FromString)
    assert (len(request.items), parsed) == (64, 1)


@pytest.mark.parametrize("size", [parsing.SMALL - 100, parsing.SMALL + 100])
def test_only_what_is_large_leaves_the_event_loop(size: int) -> None:
    threads: list[str] = []

    def parse(data: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return detector_pb2.ScoreRequest.FromString(data)

    data = detector_pb2.ScoreRequest(probe="x" * size).SerializeToString()
    request, _ = read(data, SCORE, parse)
    assert len(request.probe) == size
    assert (threads == ["lapwing-parser"]) == (size > parsing.SMALL)


@pytest.mark.parametrize("data", [b"\xff" * 100_000, ITEM * 50_000 + b"\x0a\x05", b"\x0b" * 100_000])
def test_what_is_large_and_no_message_is_malformed(data: bytes) -> None:
    refusal, parsed = read(data, BATCH, detector_pb2.ScoreBatchRequest.FromString, batch_items=100_000)
    assert (refusal.code, refusal.reason) == (INVALID, "MALFORMED")
    assert parsed == 0
