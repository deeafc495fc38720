"""Encryption: what works, and what every mistake is called: at the first connection, without trying again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from odd_certificates import Certificate, issue
from wire_server import WAIT, WireServer

from lapwing_client import TLS, AsyncClient, Client, InvalidRequest, LapwingError, TLSError, Unavailable, retries, tls

AUTHORITY, STRANGER = issue("authority"), issue("stranger")
HOSTS = ("localhost", "127.0.0.1")
GOOD = issue("server", AUTHORITY, hosts=HOSTS)
OURS, THEIRS = issue("ours", AUTHORITY), issue("theirs", STRANGER)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC takes a handshake that fails for a server that is away, and tries five times."""
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)


def served_by(certificate: Certificate, *, wants: Certificate | None = None) -> grpc.ServerCredentials:
    """With `wants`, clients must show a certificate of this authority."""
    pairs = [(certificate.key, certificate.pem)]
    return grpc.ssl_server_credentials(pairs, wants.pem if wants else None, wants is not None)


def mine(certificate: Certificate, **more: Any) -> TLS:
    return TLS(ca=AUTHORITY.pem, certificate=certificate.pem, key=certificate.key, **more)


def ask(client: Client) -> object:
    return client.score("a", "b")


def wait(client: Client) -> object:
    return client.wait_until_ready(WAIT)


def write(client: Client) -> object:
    return list(client.generate("a"))


def many(client: Client) -> object:
    return list(client.score_many([("a", "b")] * 50))


# What works.


def test_a_score_over_tls_with_a_token() -> None:
    with WireServer(credentials=served_by(GOOD)) as server:
        with Client(server.target, tls=AUTHORITY.pem, token="secret") as client:
            assert client.wait_until_ready(WAIT).state == "SERVING"
            assert client.score("a", "bcd").logit == 3
        assert server.metadata[-1]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("form", [bytes, str, Path])
def test_the_authority_may_be_bytes_or_a_file(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "authority.pem"
    path.write_bytes(AUTHORITY.pem)
    given = AUTHORITY.pem if form is bytes else form(path)
    with WireServer(credentials=served_by(GOOD)) as server, Client(server.target, tls=given) as client:
        assert client.score("a", "b").logit == 1


def test_a_client_that_says_who_it_is() -> None:
    served = served_by(GOOD, wants=AUTHORITY)
    with WireServer(credentials=served) as server, Client(server.target, tls=mine(OURS)) as client:
        assert client.score("a", "b").logit == 1


def test_a_server_with_another_name_is_taken_by_that_name() -> None:
    elsewhere = issue("server", AUTHORITY, hosts=("lapwing.example.org",))
    trust = TLS(ca=AUTHORITY.pem, server_name="lapwing.example.org")
    with WireServer(credentials=served_by(elsewhere)) as server, Client(server.target, tls=trust) as client:
        assert client.score("a", "b").logit == 1


def test_a_token_goes_to_another_machine_only_encrypted() -> None:
    Client("example.org:50051", token="secret", tls=True).close()
    with pytest.raises(InvalidRequest, match=r"only to this machine or over an encrypted connection: give tls="):
        Client("example.org:50051", token="secret")
    with pytest.raises(InvalidRequest, match="give tls="):
        Client("example.org:50051", token="secret", tls=False)


# What does not.


MISTAKES: dict[str, tuple[grpc.ServerCredentials | None, Any, str]] = {
    "UNKNOWN_AUTHORITY": (served_by(GOOD), STRANGER.pem, "local issuer certificate; give the certificate of its autho"),
    "CERTIFICATE_EXPIRED": (
        served_by(issue("server", AUTHORITY, ends=-1, hosts=HOSTS)),
        AUTHORITY.pem,
        "certificate has expired; its operator must renew it",
    ),
    "CERTIFICATE_NOT_YET_VALID": (
        served_by(issue("server", AUTHORITY, begins=5, hosts=HOSTS)),
        AUTHORITY.pem,
        "certificate is not yet valid",
    ),
    "WRONG_NAME": (
        served_by(issue("server", AUTHORITY, hosts=("example.org",))),
        AUTHORITY.pem,
        "not valid for '127.0.0.1'.*that name as TLS",
    ),
    "SERVER_SPEAKS_TLS": (served_by(GOOD), None, "speaks TLS and this client does not; give tls="),
    "SERVER_SPEAKS_NO_TLS": (None, AUTHORITY.pem, "does not speak TLS; leave out tls="),
    "CERTIFICATE_WANTED": (served_by(GOOD, wants=AUTHORITY), AUTHORITY.pem, "wants a client certificate"),
    "CERTIFICATE_REFUSED": (served_by(GOOD, wants=AUTHORITY), mine(THEIRS), "does not accept this client's cert"),
}


@pytest.mark.parametrize("reason", MISTAKES)
@pytest.mark.parametrize("call", [ask, wait, write, many])
def test_every_mistake_has_its_name(reason: str, call: Callable[[Client], object]) -> None:
    credentials, given, words = MISTAKES[reason]
    with WireServer(credentials=credentials) as server, Client(server.target, tls=given) as client:
        with pytest.raises(TLSError, match=words) as caught:
            call(client)
        assert (caught.value.reason, caught.value.code) == (reason, "UNAVAILABLE")
        assert server.target in caught.value.message
        assert server.calls == []


@pytest.mark.parametrize("reason", MISTAKES)
def test_the_asynchronous_client_says_the_same(reason: str) -> None:
    credentials, given, words = MISTAKES[reason]

    async def ask_in_every_way(target: str) -> list[LapwingError]:
        async with AsyncClient(target, tls=given) as client:
            found = []
            for call in (client.score("a", "b"), client.wait_until_ready(WAIT), anext(client.generate("a"))):
                with pytest.raises(TLSError, match=words) as caught:
                    await call
                found.append(caught.value)
            return found

    with WireServer(credentials=credentials) as server:
        found = asyncio.run(ask_in_every_way(server.target))
    assert [error.reason for error in found] == [reason] * 3


@contextlib.contextmanager
def counting(port: int) -> Iterator[tuple[str, list[int]]]:
    """A way to the port that counts the connections made through it."""
    made: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pass_on() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                made.append(1)
                far = socket.create_connection(("127.0.0.1", port))
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=(a, b), daemon=True).start()

        threading.Thread(target=pass_on, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", made


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("call", [ask, write])
def test_a_mistake_is_not_tried_again(call: Callable[[Client], object]) -> None:
    """One connection of gRPC's, perhaps the next one that was under way already, and one to find out."""
    credentials, given, _ = MISTAKES["UNKNOWN_AUTHORITY"]
    with WireServer(credentials=credentials) as server, counting(server.port) as (target, made):
        with Client(target, tls=given) as client, pytest.raises(TLSError):
            call(client)
        assert 2 <= len(made) <= 6


def test_control_a_good_connection_is_looked_at_by_nobody() -> None:
    with WireServer(credentials=served_by(GOOD)) as server, counting(server.port) as (target, made):
        with Client(target, tls=AUTHORITY.pem) as client:
            for _ in range(5):
                ask(client)
        assert len(made) == 1


def test_nobody_there_is_no_mistake_of_tls() -> None:
    for given in (None, AUTHORITY.pem):
        with Client("127.0.0.1:1", tls=given) as client, pytest.raises(Unavailable, match="no Lapwing server answers"):
            client.score("a", "b")


def test_a_server_that_goes_later_is_no_mistake_of_tls() -> None:
    with WireServer(credentials=served_by(GOOD)) as server, Client(server.target, tls=AUTHORITY.pem) as client:
        assert client.score("a", "b").logit == 1
        server.stop()
        with pytest.raises(Unavailable):
            client.score("a", "b")


def test_https_is_not_grpc(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (tmp_path / "both.pem").write_bytes(GOOD.pem + GOOD.key)
        context.load_cert_chain(tmp_path / "both.pem")
        context.set_alpn_protocols(["http/1.1"])

        def answer() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as secure:
                    secure.recv(1000)

        threading.Thread(target=answer, daemon=True).start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with Client(target, tls=AUTHORITY.pem) as client, pytest.raises(TLSError) as caught:
            client.score("a", "b")
    assert caught.value.reason == "NO_HTTP2"


def test_what_only_grpc_saw_is_still_called_tls() -> None:
    said = "failed to connect: Ssl handshake failed: SSL_ERROR_SSL"
    found = tls.explain([], TLS(ca=AUTHORITY.pem), "", 1.0, said)
    assert found is not None
    assert (found.reason, said in found.message) == ("TLS_FAILED", True)
    assert tls.explain([], TLS(ca=AUTHORITY.pem), "", 1.0, "Connection refused") is None
    assert tls.explain([], None, "", 1.0, said) is None


# What can't even be tried.


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({"ca": b"nonsense"}, "tls.ca", "holds no certificate in PEM form"),
        ({"ca": GOOD.key}, "tls.ca", "holds no certificate in PEM form"),
        (
            {"ca": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
            "tls.ca",
            "no readable certificate",
        ),
        ({"ca": "/no/such/file"}, "tls.ca", "/no/such/file can't be read: No such file"),
        ({"certificate": OURS.pem}, "tls", "give both or none"),
        ({"key": OURS.key}, "tls", "give both or none"),
        ({"certificate": OURS.pem, "key": OURS.pem}, "tls.key", "holds no private key in PEM form"),
        (
            {"certificate": OURS.pem, "key": b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA\n"},
            "tls.key",
            "is encrypted, which gRPC can't read",
        ),
    ],
)
def test_a_bad_file_is_named_before_anything_is_sent(arguments: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        TLS(**arguments)
    assert caught.value.field == field


def test_a_key_is_not_shown() -> None:
    shown = repr(mine(OURS, server_name="lapwing"))
    assert shown == "TLS(server_name='lapwing')"
    with Client("localhost:1", token="secret", tls=mine(OURS)) as client:
        assert repr(client) == "Client('localhost:1', TLS)"


def test_replicas_need_a_name_in_common() -> None:
    Client("127.0.0.1:1,127.0.0.1:2", tls=AUTHORITY.pem).close()
    Client(["127.0.0.1:1", "127.0.0.2:2"], tls=TLS(ca=AUTHORITY.pem, server_name="lapwing")).close()
    with pytest.raises(InvalidRequest, match="the name that all replicas have in their certificate"):
        Client(["127.0.0.1:1", "127.0.0.2:2"], tls=AUTHORITY.pem)


def test_replicas_over_tls_are_verified() -> None:
    with (
        WireServer(credentials=served_by(GOOD)) as one,
        WireServer(credentials=served_by(GOOD)) as two,
        Client([one.target, two.target], tls=AUTHORITY.pem) as client,
    ):
        for _ in range(20):
            ask(client)
        assert one.calls.count("Score") > 0
        assert two.calls.count("Score") > 0
    with (
        WireServer(credentials=served_by(GOOD)) as one,
        WireServer(credentials=served_by(GOOD)) as two,
        Client([one.target, two.target], tls=STRANGER.pem) as client,
        pytest.raises(TLSError) as caught,
    ):
        ask(client)
    assert caught.value.reason == "UNKNOWN_AUTHORITY"


def test_the_authorities_of_this_system_are_those_that_python_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "authority.pem"
    path.write_bytes(AUTHORITY.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with WireServer(credentials=served_by(GOOD)) as server, Client(server.target, tls=True) as client:
        assert client.score("a", "b").logit == 1
    path.write_bytes(STRANGER.pem)
    with (
        WireServer(credentials=served_by(GOOD)) as server,
        Client(server.target, tls=True) as client,
        pytest.raises(TLSError) as caught,
    ):
        client.score("a", "b")
    assert caught.value.reason == "UNKNOWN_AUTHORITY"
