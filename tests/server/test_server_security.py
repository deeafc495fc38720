"""The whole door: every method of the descriptors, by every kind of token, over every kind of connection."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Pair, replace
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from service_fakes import WAIT, Running, told
from test_server_lifecycle import start_and_stop
from test_server_tokens import entry

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_server.security.principals import Principal, current_principal, principal_of
from lapwing_server.security.scopes import SCOPES, UnlistedMethod
from lapwing_server.server import Settings

CANARY = "canary-4f1d"
EVERYWHERE = "0.0.0.0"  # noqa: S104
OK = grpc.StatusCode.OK
DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
UNREACHED = grpc.StatusCode.UNAVAILABLE

EXPECTED_SERVICES = {"lapwing.v1.Detector", "lapwing.v1.Probes", "grpc.health.v1.Health"}
PUBLIC_PACKAGES = ("grpc.health.", "grpc.reflection.")
ADMIN, READ = {"ActivateProbe", "ReloadProbes"}, {"GetServerInfo", "ListProbes", "GetProbe", "GetHeatmap"}


def needed(method: Any) -> str:
    """The policy, said once more."""
    if method.full_name.startswith(PUBLIC_PACKAGES):
        return "public"
    return "admin" if method.name in ADMIN else "read" if method.name in READ else "score"


def path_of(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def methods_of(channel: grpc.Channel, metadata: Any = ()) -> list[Any]:
    """Descriptor of every method of every service that the server itself names."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    [reply] = stub.ServerReflectionInfo(asked, timeout=WAIT, metadata=metadata)
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(one.name) for one in reply.list_services_response.service]
    return [method for service in services for method in service.methods]


def call(channel: grpc.Channel, method: Any, token: str | None = None) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call with an empty message, or with none where messages are streamed."""
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    answer_class = message_factory.GetMessageClass(method.output_type)
    rpc = getattr(channel, kind)(path_of(method), lambda message: message.SerializeToString(), answer_class.FromString)
    request = message_factory.GetMessageClass(method.input_type)()
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    try:
        answer = rpc(iter([]) if method.client_streaming else request, timeout=WAIT, metadata=metadata)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return outcome(error)
    return OK, ""


def outcome(error: Any) -> tuple[grpc.StatusCode, str]:
    """Code and reason; no token may be in anything that is told."""
    assert CANARY not in f"{error} {error.trailing_metadata()}"
    return error.code(), "" if error.code() is UNREACHED else told(error).reason


@dataclass(frozen=True)
class World:
    """Two authorities, certificates of both, and the files that a server reads."""

    folder: Path
    authority: Authority
    stranger: Authority
    server: Pair
    client: Pair
    foreign: Pair

    def settings(self, connection: str) -> dict[str, Any]:
        tls = {"tls_cert": self.folder / "cert.pem", "tls_key": self.folder / "key.pem"}
        if connection == "plain":
            return {}
        return tls if connection == "tls" else {**tls, "tls_client_ca": self.folder / "ca.pem"}

    def channel(self, port: int, connection: str, roots: bytes | None = None, pair: Pair | None = None) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if connection == "plain":
            return grpc.insecure_channel(f"127.0.0.1:{port}", options)
        shown = {"mtls": self.client, "mtls-foreign": self.foreign}.get(connection) or pair
        keys = (shown.key, shown.cert) if shown else (None, None)
        credentials = grpc.ssl_channel_credentials(roots or self.authority.pem, *keys)
        return grpc.secure_channel(f"localhost:{port}", credentials, options)


CONNECTIONS = ["plain", "tls", "mtls", "mtls-without", "mtls-foreign"]
TOKENS_FILE = "tokens.toml"
GRANTS = {
    "reader": ["read"],
    "scorer": ["score"],
    "user": ["read", "score"],
    "admin": ["admin"],
    "expired": ["admin"],
}
EXPIRY = "expires = 2020-01-01T00:00:00Z\n"
RIGHT = {"read": "reader", "score": "scorer", "admin": "admin", "public": "reader"}
OTHER = {"read": "scorer", "score": "reader", "admin": "user", "public": "reader"}


def token_of(name: str) -> str:
    return f"{CANARY}-{name}"


def tokens_text(*names: str) -> str:
    texts = (entry(name, token_of(name), *GRANTS[name]) + (EXPIRY if name == "expired" else "") for name in names)
    return "".join(texts)


@pytest.fixture
def world(tmp_path: Path) -> World:
    authority, stranger = Authority("ours"), Authority("another")
    made = World(
        tmp_path,
        authority,
        stranger,
        authority.issue("server.example.org"),
        authority.issue("client.example.org", ("alternative.example.org",)),
        stranger.issue("client.example.org"),
    )
    made.server.write(tmp_path / "cert.pem", tmp_path / "key.pem")
    replace(tmp_path / "ca.pem", authority.pem)
    replace(tmp_path / TOKENS_FILE, tokens_text(*GRANTS).encode())
    return made


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


def code_of(channel: grpc.Channel, name: str, token: str | None = None) -> grpc.StatusCode:
    methods = [*detector_pb2.DESCRIPTOR.services_by_name["Detector"].methods]
    methods += probes_pb2.DESCRIPTOR.services_by_name["Probes"].methods
    methods += health_pb2.DESCRIPTOR.services_by_name["Health"].methods
    return call(channel, next(method for method in methods if method.name == name), token)[0]


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


# What changes without a restart.


def reaches(channel: grpc.Channel) -> bool:
    with channel:
        return code_of(channel, "Check") is OK


def test_a_new_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = world.folder / "cert.pem", world.folder / "key.pem"
    renewed = world.stranger.issue("server.example.org")

    def trusted(server: Running) -> list[bool]:
        roots = (world.authority.pem, world.stranger.pem)
        return [reaches(world.channel(server.port, "tls", root)) for root in roots]

    with Running(**world.settings("tls")) as server, world.channel(server.port, "tls") as old:
        assert code_of(old, "Check") is OK
        assert trusted(server) == [True, False]
        replace(cert, renewed.cert)  # its key comes a moment later
        assert trusted(server) == [True, False]
        replace(key, renewed.key)
        assert trusted(server) == [False, True]
        assert code_of(old, "Check") is OK, "who is connected stays connected"
        for broken in (b"", b"nonsense", world.server.cert):
            replace(cert, broken)
            assert trusted(server) == [False, True]
        cert.unlink()
        assert trusted(server) == [False, True]
        world.server.write(cert, key)
        assert trusted(server) == [True, False]
    complaints = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(complaints) >= 5
    assert all("what was read before stays in use: " in one for one in complaints)


def test_new_authorities_of_clients_are_taken_without_a_restart(world: World) -> None:
    def let_in(server: Running) -> list[bool]:
        return [reaches(world.channel(server.port, "tls", pair=pair)) for pair in (world.client, world.foreign)]

    with Running(**world.settings("mtls")) as server:
        assert let_in(server) == [True, False]
        replace(world.folder / "ca.pem", world.authority.pem + world.stranger.pem)
        assert let_in(server) == [True, True]
        replace(world.folder / "ca.pem", b"nonsense")
        assert let_in(server) == [True, True]
        replace(world.folder / "ca.pem", world.stranger.pem)
        assert let_in(server) == [False, True]


@pytest.mark.parametrize("connection", ["plain", "tls"])
def test_tokens_come_and_go_without_a_restart(connection: str, world: World) -> None:
    path = world.folder / TOKENS_FILE
    settings = world.settings(connection) | {"tokens_file": path}

    def known(channel: grpc.Channel) -> list[bool]:
        return [code_of(channel, "GetServerInfo", token_of(name)) is OK for name in ("reader", "user", "expired")]

    with Running(**settings) as server, world.channel(server.port, connection) as channel:
        assert known(channel) == [True, True, False]
        replace(path, tokens_text("user").encode())
        assert known(channel) == [False, True, False]
        replace(path, b"[[tokens]]\nname = ")
        assert known(channel) == [False, True, False]
        replace(path, tokens_text("reader", "expired").replace("2020", "2120").encode())
        assert known(channel) == [True, False, True]


def test_control_a_server_on_a_broken_file_does_not_start(world: World) -> None:
    (world.folder / "cert.pem").write_bytes(world.foreign.cert)
    with pytest.raises(ValueError, match=r"cert\.pem and tls_key .*key\.pem can't be used together"):
        start_and_stop(Settings(port=0, **world.settings("tls")))


# Rates.


def pushed_back(error: Any) -> tuple[str, float, float]:
    """Reason of a refusal, and the seconds that it asks to wait, by details and by trailer."""
    trailers = dict(error.trailing_metadata())
    delay = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details:
        detail.Unpack(delay)
    seconds = delay.retry_delay.seconds + delay.retry_delay.nanos / 1e9
    return told(error).reason, seconds, int(trailers["grpc-retry-pushback-ms"]) / 1000


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_calls_too_often_is_told_how_long_to_wait(world: World) -> None:
    clock, settings = Clock(), {"requests_per_second": 0.7, "burst": 2, "tokens_file": world.folder / TOKENS_FILE}
    with Running(**settings) as server, world.channel(server.port, "plain") as channel:
        server.server.authenticator.rates.clock = clock
        stub = detector_pb2_grpc.DetectorStub(channel)

        def ask(name: str) -> None:
            metadata = [("authorization", f"Bearer {token_of(name)}")]
            stub.GetServerInfo(detector_pb2.GetServerInfoRequest(), timeout=WAIT, metadata=metadata)

        def waits(name: str) -> tuple[str, float, float]:
            with pytest.raises(grpc.RpcError) as caught:
                ask(name)
            return pushed_back(caught.value)

        ask("reader")
        ask("reader")
        assert waits("reader") == ("RATE_LIMITED", 1.429, 1.429), "1 / 0.7 s, rounded up to milliseconds"
        ask("user")  # another one is not slowed down
        clock.now += 1.0
        assert waits("reader") == ("RATE_LIMITED", 0.429, 0.429)
        assert [code_of(channel, "Check") for _ in range(5)] == [OK] * 5
        clock.now += 0.429
        ask("reader")
        samples = server.server.metrics.registry.collect()
        shed = [one.value for family in samples for one in family.samples if one.labels.get("reason") == "RATE_LIMITED"]
    assert 2.0 in shed


def test_the_rate_is_that_of_the_address_where_nobody_says_a_name() -> None:
    with Running(requests_per_second=0.001, burst=3) as server:
        codes = []
        for _ in range(5):  # each from another port
            with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                codes.append(code_of(channel, "GetServerInfo"))
    assert codes == [OK] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
