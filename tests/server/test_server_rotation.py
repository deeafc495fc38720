"""What changes at the door without a restart, and how often one may knock."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import replace
from google.rpc import error_details_pb2, status_pb2
from security_world import OK, TOKENS_FILE, World, a_world, code_of, token_of, tokens_text
from service_fakes import WAIT, Running, told, wait_until
from test_server_lifecycle import start_and_stop

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_server.server import Settings


@pytest.fixture
def world(tmp_path: Path) -> World:
    return a_world(tmp_path)


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
        server.server.watcher.look()
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
        server.server.watcher.look()
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

    def known(server: Running, channel: grpc.Channel) -> list[bool]:
        server.server.watcher.look()
        return [code_of(channel, "GetServerInfo", token_of(name)) is OK for name in ("reader", "user", "expired")]

    with Running(**settings) as server, world.channel(server.port, connection) as channel:
        assert known(server, channel) == [True, True, False]
        replace(path, tokens_text("user").encode())
        assert known(server, channel) == [False, True, False]
        replace(path, b"[[tokens]]\nname = ")
        assert known(server, channel) == [False, True, False]
        replace(path, tokens_text("reader", "expired").replace("2020", "2120").encode())
        assert known(server, channel) == [True, False, True]


def test_the_server_itself_sees_that_files_changed(world: World) -> None:
    """Nobody but its own watcher looks here."""
    path = world.folder / TOKENS_FILE
    with Running(**world.settings("tls"), tokens_file=path) as server, world.channel(server.port, "tls") as channel:
        assert code_of(channel, "GetServerInfo", token_of("reader")) is OK
        replace(path, tokens_text("user").encode())
        wait_until(lambda: code_of(channel, "GetServerInfo", token_of("reader")) is not OK)
        world.stranger.issue("server.example.org").write(world.folder / "cert.pem", world.folder / "key.pem")
        wait_until(lambda: reaches(world.channel(server.port, "tls", world.stranger.pem)))


def test_the_metrics_say_which_file_is_stale(world: World) -> None:
    with Running(**world.settings("mtls"), tokens_file=world.folder / TOKENS_FILE) as server:

        def stale() -> dict[str, float | None]:
            server.server.watcher.look()
            value = server.server.metrics.registry.get_sample_value
            return {name: value("lapwing_stale_file", {"file": name}) for name in ("tokens_file", "tls_cert")}

        assert stale() == {"tokens_file": 0.0, "tls_cert": 0.0}
        replace(world.folder / TOKENS_FILE, b"nonsense")
        assert stale() == {"tokens_file": 1.0, "tls_cert": 0.0}
        replace(world.folder / "ca.pem", b"nonsense")
        replace(world.folder / TOKENS_FILE, tokens_text("reader").encode())
        assert stale() == {"tokens_file": 0.0, "tls_cert": 1.0}
        replace(world.folder / "ca.pem", world.authority.pem)
        assert stale() == {"tokens_file": 0.0, "tls_cert": 0.0}


def test_a_disk_that_hangs_holds_up_no_call(world: World) -> None:
    """In place of the file there is a pipe, which nobody writes to, so that whoever reads it waits."""
    path = world.folder / TOKENS_FILE
    with Running(tokens_file=path) as server, world.channel(server.port, "plain") as channel:
        path.unlink()
        os.mkfifo(path)
        try:
            wait_until(lambda: server.server.watcher.files["tokens_file"]._looking_since is not None)
            codes = [code_of(channel, "GetServerInfo", token_of(name)) for name in ("reader", "nobody") * 3]
            assert codes == [OK, grpc.StatusCode.UNAUTHENTICATED] * 3
            assert server.server.watcher.files["tokens_file"]._looking_since is not None, (
                "control: it hangs all the while"
            )
            server.close()
        finally:
            os.close(os.open(path, os.O_WRONLY))


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
