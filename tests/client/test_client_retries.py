"""What is tried again, by whom, and how often; counted by a server that refuses as often as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from wire_server import WAIT, WireServer

from lapwing.v1 import detector_pb2, probes_pb2
from lapwing_client import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    LapwingError,
    Overloaded,
    TooLarge,
    Unavailable,
    retries,
)
from lapwing_client.connection import channel_options
from lapwing_client.retries import ATTEMPTS, Beginning, service_config

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


class Refusing:
    """Refuses the first calls of a method."""

    def __init__(self, method: str, times: int, code: grpc.StatusCode, **push_back: Any) -> None:
        self.method = method
        self.left = times
        self.code = code
        self.trailers = refusal(code, **push_back)

    def __call__(self, method: str, context: grpc.ServicerContext) -> None:
        if method == self.method and self.left > 0:
            self.left -= 1
            context.set_trailing_metadata(self.trailers)
            context.abort(self.code, "no")


def refusal(code: grpc.StatusCode, *, milliseconds: int | None = None, retry_after: float | None = None) -> Any:
    """The metadata of a refusal, with a push-back for gRPC and one for us."""
    status = status_pb2.Status(code=code.value[0], message="no")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NO", domain="lapwing"))
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    trailers: list[Any] = [("grpc-status-details-bin", status.SerializeToString())]
    return trailers if milliseconds is None else [*trailers, ("grpc-retry-pushback-ms", str(milliseconds))]


def scores(server: WireServer) -> int:
    return server.calls.count("Score")


# Calls with one answer, which gRPC tries again.


@pytest.mark.parametrize("code", [UNAVAILABLE, EXHAUSTED, grpc.StatusCode.CANCELLED])
def test_a_call_that_was_refused_four_times_succeeds(code: grpc.StatusCode) -> None:
    with WireServer(Refusing("Score", 4, code, milliseconds=1)) as server, Client(server.target) as client:
        assert client.score("a", "b").logit == 1
    assert scores(server) == ATTEMPTS == 5


def test_five_refusals_are_the_end() -> None:
    refusing = Refusing("Score", 99, EXHAUSTED, milliseconds=1, retry_after=0.001)
    with WireServer(refusing) as server, Client(server.target) as client:
        with pytest.raises(Overloaded) as caught:
            client.score("a", "b")
        assert (caught.value.retry_after, scores(server)) == (0.001, 5)
        with pytest.raises(Overloaded):
            client.score("a", "b")
    assert scores(server) == 10, "there is no memory between calls"


def test_a_server_may_say_never() -> None:
    """What is too large for it or beyond a quota stays so; push-back -1 says that."""
    with WireServer(Refusing("Score", 9, EXHAUSTED, milliseconds=-1)) as server, Client(server.target) as client:
        with pytest.raises(TooLarge) as caught:
            client.score("a", "b")
        assert caught.value.retry_after is None
    assert scores(server) == 1


def test_the_push_back_is_kept_to() -> None:
    """A push-back beyond the deadline leaves no time for a second attempt."""
    with WireServer(Refusing("Score", 1, EXHAUSTED, milliseconds=60_000)) as server:
        with Client(server.target) as client, pytest.raises((DeadlineExceeded, Overloaded)):
            client.score("a", "b", timeout=0.5)
        assert scores(server) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_what_would_fail_again_is_not_tried_again(code: grpc.StatusCode) -> None:
    refusing = Refusing("Score", 1, code)
    with WireServer(refusing) as server, Client(server.target) as client, pytest.raises(LapwingError):
        client.score("a", "b")
    assert scores(server) == 1


@pytest.mark.parametrize("code", [UNAVAILABLE, EXHAUSTED])
def test_without_retries_once_is_enough(code: grpc.StatusCode) -> None:
    refusing = Refusing("Score", 1, code, milliseconds=1, retry_after=0.001)
    with (
        WireServer(refusing) as server,
        Client(server.target, retry=False) as client,
        pytest.raises((Unavailable, Overloaded)),
    ):
        client.score("a", "b")
    assert scores(server) == 1


def test_every_call_but_a_stream_is_named_to_grpc() -> None:
    [config] = json.loads(dict(channel_options(True))["grpc.service_config"])["methodConfig"]
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"]
    named = {(one["service"], one["method"]) for one in config["name"]}
    assert named | set(streams()) == set(methods())
    assert not named & set(streams())
    assert "grpc.service_config" not in dict(channel_options(False))


def methods() -> Iterator[tuple[str, str]]:
    for file in (detector_pb2, probes_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield service.full_name, method.name


def streams() -> list[tuple[str, str]]:
    return [("lapwing.v1.Detector", "Generate"), ("lapwing.v1.Detector", "ScoreAttention")]


def test_replicas_take_turns_also_without_retries() -> None:
    config = service_config(retry=False, several=True)
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["healthCheckConfig"] == {"serviceName": "lapwing.v1.Detector"}
    assert "methodConfig" not in config


# Streams, which we begin again ourselves.


@pytest.mark.parametrize("code", [UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_stream_that_was_not_begun_is_begun_again(code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    with WireServer(Refusing("Generate", 4, code)) as server, Client(server.target) as client:
        assert len(list(client.generate("a"))) == 4
    assert server.calls == ["Generate"] * ATTEMPTS


def test_the_asynchronous_client_begins_it_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)

    async def read(target: str) -> int:
        async with AsyncClient(target) as client:
            return len([event async for event in client.generate("a")])

    with WireServer(Refusing("Generate", 4, UNAVAILABLE)) as server:
        assert asyncio.run(read(server.target)) == 4
    assert server.calls == ["Generate"] * ATTEMPTS


@pytest.mark.parametrize(
    ("refusing", "retry", "calls", "kind"),
    [
        (Refusing("Generate", 9, UNAVAILABLE), True, 5, Unavailable),
        (Refusing("Generate", 9, UNAVAILABLE), False, 1, Unavailable),
        (Refusing("Generate", 9, EXHAUSTED, milliseconds=1, retry_after=0.001), True, 1, Overloaded),
    ],
)
def test_how_often_a_stream_is_begun(
    refusing: Refusing, retry: bool, calls: int, kind: type[LapwingError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    with WireServer(refusing) as server, Client(server.target, retry=retry) as client, pytest.raises(kind):
        next(client.generate("a"))
    assert server.calls == ["Generate"] * calls


def test_a_stream_that_has_begun_is_not_begun_again() -> None:
    """Else a reader would get tokens twice."""
    with WireServer(Refusing("token", 0, UNAVAILABLE)) as server, Client(server.target) as client:
        stream = client.generate("a", max_new_tokens=100)
        next(stream)
        server.before.left = 1  # type: ignore[attr-defined]
        with pytest.raises(Unavailable):
            list(stream)
    assert server.calls == ["Generate"]


def test_a_stream_that_is_left_while_it_waits_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", WAIT)
    with WireServer(Refusing("Generate", 9, UNAVAILABLE)) as server, Client(server.target) as client:
        stream = client.generate("a")
        found: list[LapwingError] = []

        def read() -> None:
            with pytest.raises(LapwingError) as caught:
                next(stream)
            found.append(caught.value)

        reader = threading.Thread(target=read)
        reader.start()
        while not server.calls:
            reader.join(0.01)
        stream.close()
        reader.join(WAIT / 2)
        assert not reader.is_alive()
    assert isinstance(found[0], Unavailable | Cancelled)
    assert server.calls == ["Generate"]


def test_the_pauses_grow_and_end() -> None:
    beginning = Beginning(True)
    gone = Unavailable("gone")
    assert [beginning.pause_after(gone) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, None, None]
    assert Beginning(True).pause_after(Overloaded("busy", retry_after=0.1)) is None
    assert Beginning(False).pause_after(gone) is None
    begun = Beginning(True)
    begun.begun()
    assert begun.pause_after(gone) is None
