"""The client and its connection: deadlines, leaving, waiting until ready, tokens, trying again."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from service_fakes import WAIT, FakeEngine, Gate, Running, a_shelf
from wire_server import WireServer

from lapwing_client import (
    AsyncClient,
    Client,
    Deadline,
    DeadlineExceeded,
    InvalidRequest,
    LapwingError,
    PermissionDenied,
    Unavailable,
)
from lapwing_client.addresses import Target, is_local
from lapwing_client.connection import channel_options
from lapwing_detector.errors import ProbeCorrupt
from lapwing_server.engine import Loaded
from lapwing_server.refusal import Refusal
from lapwing_server.server import Settings

# Time.


@pytest.mark.parametrize("call", ["score", "score_batch", "generate"])
def test_every_call_has_a_deadline(call: str) -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate)) as server, Client(server.target, timeout=0.05) as client:
        calls: dict[str, Callable[[], object]] = {
            "score": lambda: client.score("hello", "world"),
            "score_batch": lambda: client.score_batch([("hello", "world")]),
            "generate": lambda: next(client.generate("hello")),
        }
        with pytest.raises(DeadlineExceeded):
            calls[call]()
        gate.open()
        assert client.score("hello", "world", timeout=WAIT).probability, "a call may be given its own"


def test_calls_that_share_a_deadline_share_its_time() -> None:
    gate = threading.Event()

    def before(method: str, context: object) -> None:
        gate.wait(WAIT)

    with WireServer(before) as server, Client(server.target) as client:
        deadline = Deadline(0.2)
        for call in (client.score, client.score_batch, client.generate):
            arguments = {"score": ("a", "b"), "score_batch": ([("a", "b")],), "generate": ("a",)}[call.__name__]
            with pytest.raises(DeadlineExceeded):
                list(call(*arguments, timeout=deadline))  # type: ignore[operator, call-overload]
        assert len(server.calls) <= 1, "no time was left for the others"
        gate.set()
        assert client.score("a", "b", timeout=WAIT).logit == 1


def test_all_pages_share_one_deadline() -> None:
    def before(method: str, context: object) -> None:
        if len(server.calls) > 1:
            threading.Event().wait(0.4)

    with WireServer(before) as server, Client(server.target) as client:
        with pytest.raises(DeadlineExceeded):
            client.probes(timeout=0.3)
        assert server.calls[:2] == ["ListProbes"] * 2


def test_an_error_says_how_long_was_waited_and_whether_anything_ever_answered() -> None:
    release = threading.Event()

    def before(method: str, context: object) -> None:
        if method == "Score":
            release.wait(WAIT)

    async def ask(target: str) -> None:
        async with AsyncClient(target) as client:
            await client.score("a", "b", timeout=0.25)

    with WireServer(before) as server, Client(server.target) as client:
        try:
            early = rf"the call to {server.target} had not ended after 0.25 s, and nothing has answered there yet"
            with pytest.raises(DeadlineExceeded, match=early):
                client.score("a", "b", timeout=0.25)
            with pytest.raises(DeadlineExceeded, match=early):
                asyncio.run(ask(server.target))
            client.server_info()
            with pytest.raises(DeadlineExceeded, match=r"after 0.25 s; give it more time"):
                client.score("a", "b", timeout=0.25)
        finally:
            release.set()


@pytest.mark.parametrize("retry", ["no", None, 0])
def test_whether_to_try_again_is_true_or_false(retry: Any) -> None:
    with pytest.raises(InvalidRequest, match="give True or False") as caught:
        Client("localhost:1", retry=retry)
    assert caught.value.field == "retry"


def test_no_time_to_wait_is_not_nobody_there() -> None:
    with Running() as server, Client(server.target) as client:
        with pytest.raises(DeadlineExceeded, match="there was no time to ask"):
            client.wait_until_ready(0)
        assert client.wait_until_ready(WAIT).state == "SERVING", "control"


def test_a_deadline_may_be_the_clients_own() -> None:
    with WireServer() as server, Client(server.target, timeout=Deadline(0.0)) as client:
        for call in (lambda: client.score("a", "b"), lambda: client.generate("a")):
            with pytest.raises(DeadlineExceeded, match="the deadline of 0 s had passed before the call began"):
                call()
        assert server.calls == []
        assert client.score("a", "b", timeout=Deadline(WAIT)).logit == 1


# Leaving.


def leave_by_closing(client: Client, computing: Any) -> None:
    stream = client.generate("hello", max_new_tokens=200)
    next(stream)
    computing()
    stream.close()
    stream.close()
    with pytest.raises(LapwingError):
        next(stream)


def leave_by_with(client: Client, computing: Any) -> None:
    with client.generate("hello", max_new_tokens=200) as stream:
        next(stream)
        computing()


def leave_by_dropping(client: Client, computing: Any) -> None:
    for _ in client.generate("hello", max_new_tokens=200):
        computing()
        break
    gc.collect()


def leave_by_raising(client: Client, computing: Any) -> None:
    with suppress(KeyError), client.generate("hello", max_new_tokens=200) as stream:
        next(stream)
        computing()
        raise KeyError


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_with, leave_by_dropping, leave_by_raising])
def test_leaving_a_generation_stops_the_model(leave: Any) -> None:
    gate, forwards = Gate(), itertools.count()

    def before() -> None:
        if next(forwards) >= 2:  # the prompt and the first token have been computed
            gate()

    def computing() -> None:
        assert gate.reached.wait(WAIT), "the second token is being computed"

    engine = FakeEngine(before=before)
    with Running(engine) as server, Client(server.target) as client:
        leave(client, computing)
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        gate.open()
        server.settle()
    assert engine.steps == 2, "the one that was read and the one that was being computed"


# Readiness.


def test_waiting_for_a_server_that_is_ready() -> None:
    with Running() as server, Client(server.target) as client:
        assert client.wait_until_ready(WAIT).state == "SERVING"


def test_waiting_for_a_server_that_is_loading() -> None:
    gate = Gate()

    def load() -> Loaded:
        gate()
        return Loaded(FakeEngine(), a_shelf())

    with Running(load=load, ready=False) as server, Client(server.target) as client:
        with pytest.raises(DeadlineExceeded, match=r"not ready after 0.2 s: model and probe are being loaded"):
            client.wait_until_ready(0.2)
        threading.Timer(0.1, gate.open).start()
        assert client.wait_until_ready(WAIT).state == "SERVING"


def test_waiting_for_a_server_that_is_not_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(DeadlineExceeded, match=r"nobody answers at 127\.0\.0\.1:1"):
        client.wait_until_ready(0.2)


def test_waiting_for_a_server_that_failed_ends_at_once() -> None:
    def load() -> Loaded:
        raise ProbeCorrupt("the probe is torn")

    with Running(load=load) as server, Client(server.target) as client, pytest.raises(Unavailable, match="is torn"):
        client.wait_until_ready(60.0)


@contextmanager
def a_server_that_answers(code: grpc.StatusCode) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the methods that it was asked for so far."""
    asked: list[str] = []

    class Refusing(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            asked.append(details.method)
            return grpc.unary_unary_rpc_method_handler(lambda request, context: context.abort(code, "no"))

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", asked
    finally:
        server.stop(None)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_who_may_not_ask_does_not_wait(code: grpc.StatusCode) -> None:
    with a_server_that_answers(code) as (target, asked), Client(target) as client:
        with pytest.raises(PermissionDenied):
            client.wait_until_ready(WAIT)
        assert len(asked) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
def test_waiting_pauses_after_every_failure(code: grpc.StatusCode) -> None:
    with a_server_that_answers(code) as (target, asked), Client(target) as client:
        with pytest.raises(DeadlineExceeded):
            client.wait_until_ready(1.5)
        assert 2 <= len(asked) <= 31, "one pause of 0.05 s after each"


def test_a_value_error_of_an_open_client_is_not_called_a_closed_one() -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("something else")

    with Client("localhost:1") as client:
        with pytest.raises(ValueError, match="something else"):
            client._call(broken, b"", None)
        client.close()
        with pytest.raises(LapwingError, match="the client is closed"):
            client._call(broken, b"", None)


def test_a_client_outlives_a_restart_of_its_server() -> None:
    with Running() as first, Client(first.target) as client:
        assert client.score("hello", "world").probability
        first.close()
        with pytest.raises(Unavailable):
            client.score("hello", "world")
        with Running(port=first.port):
            client.wait_until_ready(WAIT)
            assert client.score("hello", "world").probability


# The connection.


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("unix:/run/lapwing", True),
        ("example.org:50051", False),
        ("127.0.0.1.example.org:50051", False),
        ("localhost.example.org:50051", False),
        ("192.0.2.1:50051", False),
        ("dns:///localhost:50051", False),
    ],
)
def test_a_token_stays_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) == local
    if local:
        Client(target, token="secret").close()
    else:
        with pytest.raises(
            InvalidRequest, match="a token goes only to this machine or over an encrypted connection"
        ) as caught:
            Client(target, token="secret")
        assert caught.value.field == "target"
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["secret\n", "sécret", "sec\x00ret"])
def test_a_token_that_no_header_holds_is_the_callers_fault(token: str) -> None:
    with pytest.raises(InvalidRequest, match="token: has characters that no header can hold") as caught:
        Client("localhost:1", token=token)
    assert caught.value.field == "token"
    assert token not in str(caught.value)
    Client("localhost:1", token="All of ~!this").close()


@pytest.mark.parametrize(("token", "said"), [("", "is empty"), (b"secret", "is a bytes"), (5, "is a int")])
def test_a_token_is_text(token: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"token: {said}; give text") as caught:
        Client("localhost:1", token=token)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        *("", " ", ":1", "host:", "host:abc", "host:99999", "host:1:2", "[::1", "[host]:1", "a:1,b", "a:1,,b:2", []),
        *("no such host:1", "http://host:1", "host:1/x", "user@host:1"),
    ],
)
def test_what_is_no_address_is_the_callers_fault(target: Any) -> None:
    """gRPC would take host:99999 for another port, and say of the rest that no server answers there."""
    with pytest.raises(InvalidRequest, match="give HOST:PORT, without http://") as caught:
        Client(target)
    assert caught.value.field == "target"


@pytest.mark.parametrize("target", [None, 5, b"host:1", {"host": 1}, {"host:1"}, [5], [None]])
def test_an_address_is_text(target: Any) -> None:
    with pytest.raises(InvalidRequest, match="target: is") as caught:
        Client(target)
    assert caught.value.field == "target"


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("host", ("host", 443)),
        (" host:1 ", ("host", 1)),
        ("my_host.example-1.org.:65535", ("my_host.example-1.org.", 65535)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("::1", ("::1", 443)),
        ("[::1]", ("::1", 443)),
        ("[fe80::1%lo]:1", ("fe80::1%lo", 1)),
        ("höst:1", ("höst", 1)),
    ],
)
def test_control_what_is_an_address_is_taken(target: str, place: tuple[str, int]) -> None:
    assert Target.of(target).places == (place,)


@pytest.mark.parametrize("timeout", [1e9, 1e12, 1e300])
def test_a_long_time_is_no_time_that_has_passed(timeout: float) -> None:
    with WireServer() as server, Client(server.target, timeout=timeout) as client:
        assert client.score("a", "b").logit == 1


@pytest.mark.parametrize("timeout", [math.inf, math.nan, "5", True])
def test_a_timeout_is_a_finite_number(timeout: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client("localhost:1", timeout=timeout)
    assert caught.value.field == "timeout"
    with Client("localhost:1") as client:
        for call in (client.server_info, client.wait_until_ready):
            with pytest.raises(InvalidRequest, match="timeout: is"):
                call(timeout=timeout)


def test_the_token_is_sent_with_every_call() -> None:
    with WireServer() as server, Client(server.target, token="secret") as client:
        client.wait_until_ready(WAIT)
        client.score("hello", "world")
        list(client.generate("hello", max_new_tokens=1))
        list(client.score_many([("hello", "world")]))
        client.probes()
    assert {call.get("authorization") for call in server.metadata} == {"Bearer secret"}
    assert {"GetServerInfo", "Score", "Generate", "ListProbes"} <= set(server.calls)


def test_a_silent_server_is_asked_no_oftener_than_it_allows() -> None:
    """Else it would end the connection, for too many pings."""
    ours, theirs = dict(channel_options(True)), dict(Settings().options)
    assert ours["grpc.keepalive_time_ms"] >= theirs["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert ours["grpc.keepalive_timeout_ms"] < ours["grpc.keepalive_time_ms"]
    assert "grpc.keepalive_permit_without_calls" not in ours


@pytest.mark.parametrize("retry", [True, False])
def test_a_call_that_was_refused_once_succeeds_only_with_retries(retry: bool) -> None:
    refusals = iter([True])

    def before() -> None:
        if next(refusals, False):
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING", "going away")

    with Running(FakeEngine(before=before)) as server, Client(server.target, retry=retry) as client:
        if retry:
            assert client.score("hello", "world").probability
        else:
            with pytest.raises(Unavailable, match="going away"):
                client.score("hello", "world")
