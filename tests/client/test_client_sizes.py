"""A request that is too large is refused as early as can be, in words that help, and is not sent again."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from wire_server import WAIT, WireServer

from lapwing_client import AsyncClient, Client, Detection, TooLarge, Unavailable
from lapwing_client.connection import RETRY_BUFFER
from lapwing_server.limits import Limits
from lapwing_server.settings import Settings

LIMIT = 10_000
LONG = "x" * LIMIT

CALLS: dict[str, Any] = {
    "Score": lambda client, text: client.score(text, "b"),
    "ScoreBatch": lambda client, text: client.score_batch([(text, "b")]),
    "Generate": lambda client, text: list(client.generate(text)),
}


@pytest.mark.parametrize("method", CALLS)
def test_what_the_server_said_it_does_not_take_is_not_sent(method: str) -> None:
    with WireServer(max_request_bytes=LIMIT) as server, Client(server.target) as client:
        CALLS[method](client, LONG)
        assert server.arrived == [method], "control: nobody knows the limit yet"
        client.server_info()
        with pytest.raises(TooLarge, match="the server takes 10000 in one message") as caught:
            CALLS[method](client, LONG)
        assert (caught.value.reason, caught.value.code) == ("TOO_LARGE", "RESOURCE_EXHAUSTED")
        assert server.arrived.count(method) == 1
        CALLS[method](client, LONG[:-100])
        server.max_request_bytes = 2 * LIMIT
        client.wait_until_ready(WAIT)
        CALLS[method](client, LONG)
    assert server.arrived.count(method) == 3


def test_a_server_that_says_no_limit_has_none() -> None:
    with WireServer() as server, Client(server.target) as client:
        assert client.server_info().limits.max_request_bytes == 0
        assert client.score(LONG, "b").logit == 1


def test_the_asynchronous_client_does_not_send_it_either() -> None:
    async def run(target: str) -> None:
        async with AsyncClient(target) as client:
            await client.server_info()
            with pytest.raises(TooLarge):
                await client.score(LONG, "b")
            with pytest.raises(TooLarge):
                client.generate(LONG)
            await client.score("a", "b")

    with WireServer(max_request_bytes=LIMIT) as server:
        asyncio.run(run(server.target))
    assert (server.calls, server.arrived) == (["GetServerInfo", "Score"],) * 2


def test_of_many_only_the_one_that_is_too_large_fails() -> None:
    items = [("a", "b"), (LONG, "b"), ("a", "b")]
    with WireServer(max_request_bytes=LIMIT) as server, Client(server.target) as client:
        client.server_info()
        outcomes = [type(outcome) for _, outcome in client.score_many(items, progress=False)]
    assert outcomes == [Detection, TooLarge, Detection]


@pytest.mark.parametrize("method", CALLS)
def test_what_grpc_refuses_to_read_is_sent_once(method: str) -> None:
    """However small the limit of a server is, it reads as much as is kept for another attempt."""
    reads = dict(Settings(limits=Limits(request_bytes=1)).options)["grpc.max_receive_message_length"]
    with WireServer(reads_bytes=reads) as server, Client(server.target) as client:
        with pytest.raises(TooLarge, match=f"the server reads no message of more than {reads}") as caught:
            CALLS[method](client, "x" * reads)
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert (server.calls, server.arrived) == ([], [method])


def test_control_what_is_kept_for_another_attempt_would_be_sent_again() -> None:
    with WireServer(reads_bytes=1000) as server, Client(server.target) as client, pytest.raises(TooLarge):
        client.score(LONG, "b")
    assert server.arrived.count("Score") > 1


@pytest.mark.parametrize(("size", "attempts"), [(RETRY_BUFFER - 10_000, 2), (RETRY_BUFFER + 10_000, 1)])
def test_how_large_a_request_may_be_to_be_tried_again(size: int, attempts: int) -> None:
    def refuse_once(method: str, context: Any) -> None:
        if len(server.calls) == 1:
            context.set_trailing_metadata([("grpc-retry-pushback-ms", "1")])
            context.abort(grpc.StatusCode.UNAVAILABLE, "no")

    with WireServer(refuse_once) as server, Client(server.target) as client:
        if attempts == 1:
            with pytest.raises(Unavailable):
                client.score("x" * size, "b")
        else:
            assert client.score("x" * size, "b").logit == 1
    assert server.calls == ["Score"] * attempts
