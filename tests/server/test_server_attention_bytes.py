"""All streams of attention together hold no more than fits, and what one of them held is free when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from attention_fakes import HEADS, READ_HEADS, a_header, a_summary, requests, score_now, some_maps
from door_fakes import a_file, entry
from metrics_pages import registry_page
from service_fakes import WAIT, Running, told, wait_until

from lapwing.v1 import detector_pb2
from lapwing_server.admission import STREAM_PUSHBACK
from lapwing_server.attention_bytes import AttentionBytes
from lapwing_server.attention_sums import TOKEN_BYTES
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.refusal import Refusal

TOKENS = 13
MAPS = some_maps(TOKENS)
WHOLE = READ_HEADS * TOKENS * TOKEN_BYTES
"""Bytes of one sequence."""


def counted(most: int, each: int | None = None) -> tuple[AttentionBytes, Metrics]:
    metrics = Metrics()
    limits = Limits(attention_total_bytes=most, attention_bytes_per_client=each)
    return AttentionBytes(limits, metrics), metrics


def test_streams_share_what_there_is() -> None:
    held, metrics = counted(100)
    with held.share("me") as mine, held.share("you") as yours:
        mine(60)
        yours(40)
        for more in (41, 10**12):
            with pytest.raises(Refusal, match="other streams hold 60 of at most 100") as caught:
                yours(more)
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (caught.value.reason, caught.value.retry_after) == ("ATTENTION_FULL", STREAM_PUSHBACK)
        assert held.held == 100, "what is refused is not held"
        mine(10)
        yours(90)
        assert registry_page(metrics)("attention_bytes") == held.held == 100
    assert registry_page(metrics)("attention_bytes") == held.held == 0
    assert registry_page(metrics)("shed_total", reason="ATTENTION_FULL") == 2


@pytest.mark.parametrize("each", [50, None], ids=["half", "control: all"])
def test_one_client_holds_no_more_than_its_part(each: int | None) -> None:
    held, _ = counted(100, each)
    with held.share("me") as first, held.share("me") as second, held.share("you") as yours:
        first(30)
        second(20)
        if each:
            with pytest.raises(Refusal, match="other streams of this client hold 30 of at most 50 bytes") as caught:
                second(21)
            assert caught.value.reason == "ATTENTION_FULL"
        else:
            second(70)
            second(20)
        yours(50)
        first(0)
        second(50)
        assert held.held == 100


def test_after_an_error_nothing_is_held_and_a_late_reader_holds_nothing() -> None:
    """The thread that reads may be in the middle of a slice when the stream ends."""
    held, _ = counted(100)
    readers: list[Callable[[int], None]] = []

    def read() -> None:
        with held.share("me") as hold:
            readers.append(hold)
            hold(100)
            raise KeyError

    with pytest.raises(KeyError):
        read()
    [late] = readers
    late(100)
    late(1000)
    assert held.held == 0
    with held.share("me") as next_one:
        next_one(100)


class Open:
    """A stream of which the first rows have been taken in."""

    def __init__(self, server: Running, timeout: float = WAIT, last: int = 6, token: str = "") -> None:
        self.channel = grpc.insecure_channel(server.target)
        self.outgoing = SimpleQueue[Any]()
        method = "/lapwing.v1.Detector/ScoreAttention"
        self.call = self.channel.stream_stream(
            method,
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=detector_pb2.ScoreAttentionResponse.FromString,
        )(iter(self.outgoing.get, None), timeout=timeout, metadata=[("authorization", f"Bearer {token}")])
        self.send(a_header(), a_summary(MAPS, 0, last), score_now())

    def send(self, *parts: Any) -> None:
        for part in requests(*parts):
            self.outgoing.put(part)

    def running(self) -> Any:
        return next(self.call)

    def code(self) -> grpc.StatusCode:
        """How it ended."""
        with suppress(grpc.RpcError):
            list(self.call)
        code: grpc.StatusCode = self.call.code()
        return code

    def close(self) -> None:
        self.outgoing.put(None)
        self.channel.close()


def ok(stream: Open) -> None:
    stream.send(a_summary(MAPS, 6))
    stream.outgoing.put(None)
    assert stream.code() is grpc.StatusCode.OK


def cancel(stream: Open) -> None:
    stream.call.cancel()


def error(stream: Open) -> None:
    stream.send(a_summary(MAPS, 7))
    assert stream.code() is grpc.StatusCode.INVALID_ARGUMENT


def incomplete(stream: Open) -> None:
    stream.send(a_summary(MAPS, 6, layers=slice(0, 1), heads=slice(0, HEADS)))
    stream.outgoing.put(None)
    assert stream.code() is grpc.StatusCode.INVALID_ARGUMENT


def malformed(stream: Open) -> None:
    stream.outgoing.put(b"\xff\xff")
    assert stream.code() is grpc.StatusCode.INVALID_ARGUMENT


def deadline(stream: Open) -> None:
    assert stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def gone(stream: Open) -> None:
    stream.channel.close()


ENDS: dict[str, Callable[[Open], None]] = {
    one.__name__: one for one in (ok, cancel, error, incomplete, malformed, deadline, gone)
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Has room for one whole sequence and a little more."""
    limits = Limits(attention_total_bytes=WHOLE + 1, attention_bytes=WHOLE)
    with Running(limits=limits) as server:
        yield server


def bytes_of(server: Running) -> float:
    return registry_page(server.server.metrics)("attention_bytes")


def held_until(server: Running, how: str) -> Open:
    """A stream that holds its first rows."""
    for timeout in (0.2, 1.0, 5.0) if how == "deadline" else (WAIT,):
        stream = Open(server, timeout)
        with suppress(grpc.RpcError):  # a deadline that passes before they came shows nothing
            if stream.running().running and bytes_of(server):
                return stream
        stream.close()
        wait_until(lambda: bytes_of(server) == 0)
    raise AssertionError("it never held anything")


@pytest.mark.parametrize("how", ENDS)
def test_however_a_stream_ends_what_it_held_is_free(server: Running, how: str) -> None:
    stream = held_until(server, how)
    try:
        ENDS[how](stream)
        wait_until(lambda: bytes_of(server) == 0)
    finally:
        stream.close()


def test_control_what_an_open_stream_holds_is_counted(server: Running) -> None:
    stream = held_until(server, "ok")
    assert bytes_of(server) == READ_HEADS * 6 * TOKEN_BYTES
    stream.close()
    wait_until(lambda: bytes_of(server) == 0)


def test_a_stream_that_took_too_long_holds_nothing() -> None:
    with Running(limits=Limits(stream_seconds=0.2)) as server:
        stream = Open(server)
        assert stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: bytes_of(server) == 0)
        stream.close()


@pytest.mark.parametrize("tokens", [["my-token", "my-token"], ["my-token", "your-token"]], ids=["one", "control: two"])
def test_one_client_leaves_room_for_others(tmp_path: Path, tokens: list[str]) -> None:
    """Where clients say who they are, half of all there is."""
    file = a_file(tmp_path, entry("me", "my-token", "score") + entry("you", "your-token", "score"))
    limits = Limits(attention_total_bytes=2 * WHOLE, attention_bytes=WHOLE)
    with Running(limits=limits, tokens_file=file) as server:
        first = Open(server, last=TOKENS, token=tokens[0])
        assert first.running().running
        second = Open(server, token=tokens[1])
        if tokens[0] == tokens[1]:
            assert second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        else:
            assert second.running().running
        for stream in (first, second):
            stream.close()


@pytest.mark.parametrize("room", [1, 2], ids=["one", "control: two"])
def test_what_does_not_fit_beside_others_is_refused_and_may_come_again(room: int) -> None:
    limits = Limits(attention_total_bytes=room * WHOLE, attention_bytes=WHOLE)
    with Running(limits=limits) as server:
        first, second = Open(server, last=TOKENS), None
        try:
            assert first.running().running
            second = Open(server)
            if room == 2:
                assert second.running().running
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    second.running()
                assert told(caught.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert told(caught.value).reason == "ATTENTION_FULL"
                assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
                assert bytes_of(server) == WHOLE, "the first one is unharmed"
                first.outgoing.put(None)
                assert first.code() is grpc.StatusCode.OK
                wait_until(lambda: bytes_of(server) == 0)
                again = Open(server)
                assert again.running().running
                again.close()
        finally:
            for stream in (first, second):
                if stream is not None:
                    stream.close()
        wait_until(lambda: bytes_of(server) == 0)
