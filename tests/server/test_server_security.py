"""The whole door: every method of the descriptors, by every kind of token, over every kind of connection."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import replace
from engine_fakes import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from security_world import (
    CANARY,
    CONNECTIONS,
    DENIED,
    EVERYWHERE,
    EXPECTED_SERVICES,
    LOST,
    OK,
    OTHER,
    RIGHT,
    TOKENS_FILE,
    UNKNOWN,
    UNREACHED,
    World,
    a_world,
    call,
    code_of,
    methods_of,
    needed,
    path_of,
    token_of,
    tokens_text,
)
from service_fakes import WAIT, Gate, Running, told, wait_until
from test_server_lifecycle import start_and_stop

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_client import Client, LapwingError
from lapwing_server.detector_service import DetectorService
from lapwing_server.health import Health
from lapwing_server.limits import Limits
from lapwing_server.probes_service import ProbesService
from lapwing_server.security.principals import Principal, current_principal, principal_of
from lapwing_server.security.scopes import SCOPES, UnlistedMethod
from lapwing_server.server import Settings


@pytest.fixture
def world(tmp_path: Path) -> World:
    return a_world(tmp_path)


@pytest.fixture(scope="module")
def unguarded() -> Iterator[dict[str, tuple[grpc.StatusCode, str]]]:
    """What each method answers to whoever may call it: the oracle of the matrix."""
    with Running(reflection=True) as server, grpc.insecure_channel(server.target) as channel:
        yield {path_of(method): call(channel, method) for method in methods_of(channel)}


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_every_method_by_every_token_over_every_connection(
    connection: str,
    world: World,
    unguarded: dict[str, tuple[grpc.StatusCode, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = world.settings(connection.partition("-")[0]) | {"tokens_file": world.folder / TOKENS_FILE}
    cells = 0
    with (
        caplog.at_level(logging.DEBUG),
        Running(reflection=True, **settings) as server,
        world.channel(server.port, connection) as channel,
        world.channel(server.port, connection.partition("-")[0]) as good,
    ):
        methods = methods_of(good)
        assert {method.containing_service.full_name for method in methods} > EXPECTED_SERVICES
        assert {path_of(method) for method in methods} == unguarded.keys()
        for method in methods:
            scope, answer = needed(method), unguarded[path_of(method)]
            stranger = answer if scope == "public" else (UNKNOWN, "UNAUTHENTICATED")
            expected = {
                None: stranger,
                "nobody": stranger,
                "expired": stranger,
                OTHER[scope]: answer if scope == "public" else (DENIED, "MISSING_SCOPE"),
                RIGHT[scope]: answer,
                "admin": answer,
            }
            for name, cell in expected.items():
                token = token_of(name) if name else None
                assert call(channel, method, token) == ((UNREACHED, "") if connection in LOST else cell), (
                    path_of(method),
                    name,
                )
                cells += 1
    assert cells >= 5 * len(unguarded)
    assert CANARY not in caplog.text


def test_control_the_oracle_tells_methods_apart(unguarded: dict[str, tuple[grpc.StatusCode, str]]) -> None:
    assert len(set(unguarded.values())) >= 3
    assert not {code for code, _ in unguarded.values()} & {UNKNOWN, DENIED, UNREACHED}
    assert set(unguarded) <= SCOPES.keys()


def test_a_method_that_nobody_decided_about_stops_the_start(
    unguarded: dict[str, tuple[grpc.StatusCode, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(port=0, reflection=True)
    for method in unguarded:
        with monkeypatch.context() as patch:
            patch.delitem(SCOPES, method)
            with pytest.raises(UnlistedMethod, match=method):
                start_and_stop(settings)
    assert start_and_stop(settings), "control"


def test_a_handler_that_is_a_plain_function_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be found out by the first client that calls it."""

    def plain(self: object, request: object, context: object) -> None:
        """Would run in a pool of threads."""

    for service, method in [(ProbesService, "GetProbe"), (Health, "Watch"), (DetectorService, "Generate")]:
        with monkeypatch.context() as patch:
            patch.setattr(service, method, plain)
            with pytest.raises(TypeError, match=rf"/{method} is a plain function; make it async"):
                start_and_stop(Settings(port=0))
    assert start_and_stop(Settings(port=0)), "control"


@pytest.mark.parametrize("method", [name for name in SCOPES if name.startswith("/grpc.health.")])
def test_the_health_knows_every_method_that_is_decided_about(method: str) -> None:
    """Also those that only other versions of its package have: a plain function of theirs would stop the start."""
    behavior = getattr(Health, method.rpartition("/")[2])
    assert inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)


def test_only_what_is_registered_must_be_decided_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SCOPES, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    assert start_and_stop(Settings(port=0))


def test_the_missing_scope_is_named(world: World) -> None:
    metadata, request = [("authorization", f"Bearer {token_of('reader')}")], probes_pb2.ReloadProbesRequest()
    with (
        Running(tokens_file=world.folder / TOKENS_FILE) as server,
        world.channel(server.port, "plain") as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        probes_pb2_grpc.ProbesStub(channel).ReloadProbes(request, metadata=metadata)
    assert told(caught.value).message == (
        "ReloadProbes needs the scope admin; reader has read; "
        "make a token by lapwing token NAME --scope admin --into FILE"
    )


# Without tokens.


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"open_admin": False}, False), ({"open_admin": True}, True), ({"host": EVERYWHERE, "insecure": True}, False)],
    ids=["loopback", "asked", "everywhere"],
)
def test_without_tokens_nobody_may_change_anything_unless_that_is_asked_for(
    settings: dict[str, Any], allowed: bool
) -> None:
    """A proxy's clients come from loopback, too, so that being there says nothing."""
    with Running(**settings) as server, grpc.insecure_channel(server.target) as channel:
        assert code_of(channel, "GetServerInfo") is OK
        assert code_of(channel, "Score") is grpc.StatusCode.INVALID_ARGUMENT, "it got as far as the request"
        assert (code_of(channel, "ReloadProbes") is not DENIED) == allowed


def test_the_public_python_client_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(open_admin=False) as server, Client(server.target) as client:
        with pytest.raises(LapwingError, match=r"lapwing token NAME --scope admin .*--open-admin"):
            client.activate_probe("fake-probe")
        assert client.server_info(), "control"


def test_streams_that_need_no_token_are_no_way_in(world: World) -> None:
    """Whoever opens them without end is stopped, and everybody else goes on."""
    limits = Limits(public_streams=6, public_streams_per_client=4)
    settings = {"tokens_file": world.folder / TOKENS_FILE, "limits": limits, "reflection": True}
    with Running(**settings) as server, world.channel(server.port, "plain") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        open_ones = [watch(health_pb2.HealthCheckRequest(), timeout=WAIT) for _ in range(4)]
        assert [next(one).status for one in open_ones] == [health_pb2.HealthCheckResponse.SERVING] * 4
        for method in methods_of_public_streams():
            with pytest.raises(grpc.RpcError) as caught:
                next(iter(method(channel)))
            error = told(caught.value)
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert code_of(channel, "Check") is OK
        assert code_of(channel, "GetServerInfo", token_of("reader")) is OK
        for one in open_ones:
            one.cancel()
        wait_until(lambda: len(server.server.authenticator.visitors) == 0)  # type: ignore[arg-type]
        [again] = [next(method(channel)) for method in methods_of_public_streams()[:1]]
        assert again.status == health_pb2.HealthCheckResponse.SERVING


def methods_of_public_streams() -> list[Any]:
    """Calls that stay open, by a channel."""

    def reflect(channel: grpc.Channel) -> Any:
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        return reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=WAIT)

    return [
        lambda channel: health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT),
        reflect,
    ]


def test_calls_of_one_connection_have_a_bound() -> None:
    """Those that are too many wait, and are answered when there is room."""
    limits, gate = Limits(calls_per_connection=3), Gate()
    with Running(FakeEngine(before=gate), limits=limits) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        assert stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT), "the connection knows the bound"
        message = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
        calls = [stub.Score.future(message, timeout=WAIT) for _ in range(9)]
        assert gate.reached.wait(WAIT)
        wait_until(lambda: server.server.guard.in_flight == 3)
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as other:
            info = detector_pb2_grpc.DetectorStub(other).GetServerInfo
            assert info(detector_pb2.GetServerInfoRequest(), timeout=WAIT), "another connection has its own"
        wait_until(lambda: server.server.guard.in_flight == 3)
        gate.open()
        assert all(one.result() for one in calls)


def test_tokens_do_not_travel_in_the_open(world: World) -> None:
    with pytest.raises(ValueError, match="tokens would travel readable"):
        Settings(host=EVERYWHERE, insecure=True, tokens_file=world.folder / TOKENS_FILE)


def principals(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[Principal]:
    """Whoever is let in from now on, as the handlers see them."""
    seen: list[Principal] = []
    original = server.server.guard.admit
    assert original is not None

    def admit(method: str, context: Any) -> Any:
        found = original(method, context)
        assert current_principal.get() is found is principal_of(context)
        seen.append(found)
        return found

    monkeypatch.setattr(server.server.guard, "admit", admit)
    return seen


def test_a_certificate_is_somebody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(**world.settings("mtls")) as server, world.channel(server.port, "mtls") as channel:
        seen = principals(server, monkeypatch)
        codes = [code_of(channel, name) for name in ("GetServerInfo", "ReloadProbes", "Check")]
    assert codes == [OK, DENIED, OK]
    assert [one.name for one in seen] == ["client.example.org", "127.0.0.1"]
    assert seen[0].scopes == {"read", "score"}


@pytest.mark.parametrize("name", ["client.example.org", "alternative.example.org"])
def test_a_certificate_may_be_granted_more(name: str, world: World) -> None:
    text = f'[[certificates]]\nname = "{name}"\nscopes = ["admin"]\n' + tokens_text("reader")
    replace(world.folder / TOKENS_FILE, text.encode())
    settings = world.settings("mtls") | {"tokens_file": world.folder / TOKENS_FILE}
    with Running(**settings) as server, world.channel(server.port, "mtls") as channel:
        assert code_of(channel, "ReloadProbes") not in (DENIED, UNKNOWN)
        assert code_of(channel, "ReloadProbes", token_of("reader")) is DENIED, "a token that is shown decides"
        assert code_of(channel, "ListProbes", token_of("nobody")) is UNKNOWN
        replace(world.folder / TOKENS_FILE, tokens_text("reader").encode())
        server.server.watcher.look()
        assert code_of(channel, "ListProbes") is UNKNOWN


def test_each_call_has_its_own_principal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current_principal.get()
    with (
        Running(tokens_file=world.folder / TOKENS_FILE) as server,
        world.channel(server.port, "plain") as channel,
    ):
        seen = principals(server, monkeypatch)
        for name in ("reader", "user", "reader", "admin"):
            assert code_of(channel, "GetServerInfo", token_of(name)) is OK
    assert [one.name for one in seen] == ["reader", "user", "reader", "admin"]
    assert current_principal.get() is before, "nothing of it is left outside of the calls"
