"""Several servers that answer alike, behind one client: turns, health, and restarts in which nothing is lost."""

from __future__ import annotations

import collections
import socket
import threading
import time
from typing import Any

import pytest
from wire_server import WAIT, WireServer

from lapwing_client import Client, InvalidRequest, LapwingError, Unavailable, addresses
from lapwing_client.addresses import Target


def ask(client: Client, times: int) -> None:
    for _ in range(times):
        assert client.score("a", "bc").logit == 2


@pytest.mark.parametrize("form", ["list", "commas", "ipv4"])
def test_replicas_take_turns(form: str) -> None:
    with WireServer() as one, WireServer() as two:
        targets = [one.target, two.target]
        forms: dict[str, Any] = {"list": targets, "commas": ",".join(targets), "ipv4": "ipv4:" + ",".join(targets)}
        with Client(forms[form]) as client:
            client.wait_until_ready(WAIT)
            while not (one.calls.count("Score") and two.calls.count("Score")):
                ask(client, 1)
            before = one.calls.count("Score"), two.calls.count("Score")
            ask(client, 20)
        assert (one.calls.count("Score"), two.calls.count("Score")) == (before[0] + 10, before[1] + 10)


def test_control_one_address_has_one_connection() -> None:
    with WireServer() as one, Client(one.target) as client:
        ask(client, 5)
        assert len(one.peers) == 1
        assert "grpc.service_config" in dict(client._connection.options())
        assert "round_robin" not in dict(client._connection.options())["grpc.service_config"]


def test_a_replica_that_is_not_serving_gets_no_calls() -> None:
    with WireServer() as one, WireServer(serving=False) as two, Client([one.target, two.target]) as client:
        ask(client, 20)
        assert "Score" not in two.calls
        two.serving.set()
        while "Score" not in two.calls:
            ask(client, 1)
        one.serving.clear()
        seen = -1
        while seen != (seen := one.calls.count("Score")):
            ask(client, 10)
        ask(client, 10)
        assert one.calls.count("Score") == seen


def test_when_none_is_serving_the_client_waits_until_one_is() -> None:
    with (
        WireServer(serving=False) as one,
        WireServer(serving=False) as two,
        Client([one.target, two.target]) as client,
    ):
        with pytest.raises(Unavailable):
            ask(client, 1)
        threading.Timer(0.1, two.serving.set).start()
        assert client.wait_until_ready(WAIT).state == "SERVING"
        ask(client, 1)
        assert "Score" not in one.calls


def test_a_rolling_restart_loses_nothing() -> None:
    """20 callers, scores and streams; each replica says NOT_SERVING, finishes what it has, ends, and comes back."""

    def slowly(method: str, context: object) -> None:
        time.sleep(0.002)

    replicas = [WireServer(slowly).__enter__(), WireServer(slowly).__enter__()]
    ports = [replica.port for replica in replicas]
    failed: list[LapwingError] = []
    done = collections.Counter[str]()
    stop = threading.Event()

    def call(client: Client, streams: bool) -> None:
        while not stop.is_set():
            try:
                done["stream" if streams else "score"] += bool(
                    list(client.generate("a")) if streams else client.score("a", "b")
                )
            except LapwingError as error:
                failed.append(error)

    with Client([replica.target for replica in replicas], timeout=WAIT) as client:
        client.wait_until_ready(WAIT)
        callers = [threading.Thread(target=call, args=(client, i % 4 == 0)) for i in range(20)]
        for caller in callers:
            caller.start()
        for turn in range(3):
            for place, port in enumerate(ports):
                replicas[place].serving.clear()
                replicas[place].stop(WAIT)
                replicas[place] = WireServer(slowly, port=port, serving=False).__enter__()
                replicas[place].serving.set()
                before = sum(done.values())
                while not replicas[place].calls or sum(done.values()) < before + 50:
                    time.sleep(0.005)
                    assert not failed, f"in turn {turn}: {failed[0]!r}"
        stop.set()
        for caller in callers:
            caller.join(WAIT)
    for replica in replicas:
        replica.stop()
    assert failed == []
    assert min(done["score"], done["stream"]) > 20


# How addresses are read.


@pytest.mark.parametrize(
    ("target", "uri", "places", "several", "local"),
    [
        ("localhost:1", "localhost:1", [("localhost", 1)], False, True),
        (["localhost:1"], "localhost:1", [("localhost", 1)], False, True),
        ("example.org", "example.org", [("example.org", 443)], False, False),
        ("[::1]:5", "[::1]:5", [("::1", 5)], False, True),
        ("127.0.0.1:1, 127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2", [("127.0.0.1", 1), ("127.0.0.1", 2)], True, True),
        (["127.0.0.1:1", "192.0.2.1:2"], "ipv4:127.0.0.1:1,192.0.2.1:2", None, True, False),
        (["[::1]:1", "[::1]:2"], "ipv6:[::1]:1,[::1]:2", [("::1", 1), ("::1", 2)], True, True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2", None, True, True),
        ("ipv4:192.0.2.1:1", "ipv4:192.0.2.1:1", [("192.0.2.1", 1)], False, False),
        ("dns:///example.org:7", "dns:///example.org:7", [("example.org", 7)], True, False),
        ("unix:/run/lapwing", "unix:/run/lapwing", [], False, True),
    ],
)
def test_every_form_of_a_target(target: Any, uri: str, places: Any, several: bool, local: bool) -> None:
    found = Target.of(target)
    assert (found.uri, found.several, found.local) == (uri, several, local)
    assert places is None or list(found.places) == places


def test_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "one": [(socket.AF_INET6, "::5"), (socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "192.0.2.9")],
        "two": [(socket.AF_INET, "192.0.2.2")],
        "six": [(socket.AF_INET6, "::6")],
    }

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in known[host]]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    assert Target.of("one:1,two:2").uri == "ipv4:192.0.2.1:1,192.0.2.2:2"
    assert Target.of(["one:1", "six:2"]).uri == "ipv6:[::5]:1,[::6]:2"
    with pytest.raises(InvalidRequest, match="mixes hosts that have only IPv4 with hosts that have only IPv6"):
        Target.of(["two:1", "six:2"])
    with pytest.raises(InvalidRequest, match="has 'nobody', which is not known: Name or service not known"):
        Target.of(["two:1", "nobody:2"])


@pytest.mark.parametrize("target", ["one:1,two", "one:1,", ["one:1", ":2"], ["one:1", "two:x"], ["one:1", "two:70000"]])
def test_a_list_is_of_hosts_and_ports(target: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"give HOST:PORT, .* or a list of several") as caught:
        Target.of(target)
    assert caught.value.field == "target"


@pytest.mark.parametrize("target", [3, [3], b"localhost:1"])
def test_a_target_is_text(target: Any) -> None:
    with pytest.raises((InvalidRequest, TypeError)):
        Client(target)
