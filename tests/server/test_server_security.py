"""The whole door: every method of the descriptors, by every kind of token, over every kind of connection."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import replace
from security_world import (
    CANARY,
    CONNECTIONS,
    DENIED,
    EVERYWHERE,
    EXPECTED_SERVICES,
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
from service_fakes import Running, told
from test_server_lifecycle import start_and_stop

from lapwing.v1 import probes_pb2, probes_pb2_grpc
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
                lost = connection in ("mtls-without", "mtls-foreign")
                assert call(channel, method, token) == ((UNREACHED, "") if lost else cell), (path_of(method), name)
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
    assert told(caught.value).message == "ReloadProbes needs the scope admin; reader has read"


# Without tokens.


@pytest.mark.parametrize(
    ("settings", "allowed"), [({}, True), ({"host": EVERYWHERE, "insecure": True}, False)], ids=["loopback", "open"]
)
def test_without_tokens_only_this_machine_may_change_anything(settings: dict[str, Any], allowed: bool) -> None:
    with Running(**settings) as server, grpc.insecure_channel(server.target) as channel:
        assert code_of(channel, "GetServerInfo") is OK
        assert code_of(channel, "Score") is grpc.StatusCode.INVALID_ARGUMENT, "it got as far as the request"
        assert (code_of(channel, "ReloadProbes") is not DENIED) == allowed


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
        assert code_of(channel, "ListProbes") is UNKNOWN


def test_each_call_has_its_own_principal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Running(tokens_file=world.folder / TOKENS_FILE) as server,
        world.channel(server.port, "plain") as channel,
    ):
        seen = principals(server, monkeypatch)
        for name in ("reader", "user", "reader", "admin"):
            assert code_of(channel, "GetServerInfo", token_of(name)) is OK
    assert [one.name for one in seen] == ["reader", "user", "reader", "admin"]
    assert current_principal.get() is None
