"""Who is let in, by token, certificate or address, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from door_fakes import (
    HEALTH,
    LIST,
    REFLECTION,
    SCORE,
    WATCH,
    Clock,
    FakeContext,
    a_file,
    bearing,
    certificate,
    entry,
    refusal_of,
)

from lapwing_server.security import authenticator
from lapwing_server.security.authenticator import Authenticator
from lapwing_server.security.principals import Principal, peer_name
from lapwing_server.security.rates import Rates
from lapwing_server.security.scopes import EVERYTHING, PUBLIC_STREAMS, SCOPES, USERS, Scope, granted
from lapwing_server.security.tokens import Tokens
from lapwing_server.security.visitors import Visitors
from lapwing_server.security.watched import Watcher
from lapwing_server.settings import Settings

# Who calls.


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::/64"),
        ("ipv6:%5B2001:db8:0:0:ffff::2%5D:6000", "2001:db8::/64"),
        ("ipv6:%5B2001:db8:0:1::2%5D:6000", "2001:db8:0:1::/64"),
        ("ipv6:%5Bfd12::9%5D:5000", "fd12::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:5000", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1%eth0"),
        ("ipv6:[::1]:5000", "::1"),
        ("unix:/run/lapwing.sock", "unix"),
    ],
)
def test_an_address_names_the_machine_without_the_port(peer: str, name: str) -> None:
    assert peer_name(FakeContext(peer=peer)) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("trusted", [True, False])
def test_without_tokens_and_certificates_the_address_decides(trusted: bool) -> None:
    principal = Authenticator(trusted=trusted).admit(LIST, FakeContext())  # type: ignore[arg-type]
    assert principal == Principal("127.0.0.1", EVERYTHING if trusted else USERS)


def test_a_certificate_is_known_by_any_of_its_names(tmp_path: Path) -> None:
    tokens = Tokens(a_file(tmp_path, certificate("a.example.org", "read")))
    common = FakeContext(x509_common_name=[b"a.example.org"])
    alternative = FakeContext(x509_common_name=[b"other"], x509_subject_alternative_name=[b"a.example.org"])
    door = Authenticator(tokens, mutual=True)
    assert [door.admit(LIST, one).name for one in (common, alternative)] == ["a.example.org"] * 2  # type: ignore[arg-type]
    for stranger in (FakeContext(x509_common_name=[b"example.org"]), FakeContext()):
        assert refusal_of(lambda: door.admit(LIST, stranger)).reason == "UNAUTHENTICATED"  # type: ignore[arg-type]  # noqa: B023
    assert refusal_of(lambda: door.admit(SCORE, common)).reason == "MISSING_SCOPE"  # type: ignore[arg-type]
    unasked = Authenticator(tokens, mutual=False)
    assert refusal_of(lambda: unasked.admit(LIST, common)).reason == "UNAUTHENTICATED"  # type: ignore[arg-type]


def test_a_certificate_without_a_file_may_score_and_read() -> None:
    door = Authenticator(mutual=True, trusted=True)
    named = FakeContext(x509_common_name=["näme\n".encode()])
    assert door.admit(LIST, named) == Principal("näme\\n", USERS)  # type: ignore[arg-type]
    assert door.admit(LIST, FakeContext()).name == "certificate without a name"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "a-token")],
        [("authorization", "Basic a-token")],
        [("authorization", "Bearer")],
        [("authorization", b"Bearer a-token")],
        [("authorization", "Bearer a-token"), ("authorization", "Bearer a-token")],
        [("Authorization", "Bearer a-token")],
        [("authorization-bin", "Bearer a-token")],
        [],
    ],
)
def test_only_one_whole_bearer_is_taken(metadata: list[tuple[str, Any]], tmp_path: Path) -> None:
    door = Authenticator(Tokens(a_file(tmp_path, entry("a", "a-token", "read"))))
    refusal = refusal_of(lambda: door.admit(LIST, FakeContext(*metadata)))  # type: ignore[arg-type]
    assert refusal.reason == "UNAUTHENTICATED"
    assert "a-token" not in refusal.message
    for word in ("Bearer", "bearer", "BEARER"):
        door.admit(LIST, FakeContext(("authorization", f"{word} a-token")))  # type: ignore[arg-type]


def test_a_method_that_is_not_in_the_table_is_closed_to_all() -> None:
    door = Authenticator(trusted=True)
    refusal = refusal_of(lambda: door.admit("/lapwing.v1.Detector/New", FakeContext()))  # type: ignore[arg-type]
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "UNLISTED_METHOD")


def test_health_is_never_too_often_and_sheds_are_counted() -> None:
    shed: list[str] = []
    door = Authenticator(trusted=True, rates=Rates(1.0, 1, Clock()), shed=shed.append)
    context: Any = FakeContext()
    door.admit(LIST, context)
    refusal = refusal_of(lambda: door.admit(LIST, context))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert refusal.retry_after == 1.0
    assert [door.admit(HEALTH, context).name for _ in range(5)] == ["127.0.0.1"] * 5
    assert shed == ["RATE_LIMITED"]


def test_a_refused_scope_takes_nothing_from_the_rate(tmp_path: Path) -> None:
    tokens = Tokens(a_file(tmp_path, entry("a", "a-token", "read", requests_per_second=1.0)))
    door = Authenticator(tokens, rates=Rates(clock=Clock()))
    assert refusal_of(lambda: door.admit(SCORE, bearing("a-token"))).reason == "MISSING_SCOPE"
    assert door.admit(LIST, bearing("a-token")).name == "a"


def test_the_table_holds_scopes_only_that_somebody_can_have() -> None:
    assert set(SCOPES.values()) == EVERYTHING | {Scope.PUBLIC}


# A missing scope.


def test_admin_implies_all_and_nothing_else_does() -> None:
    assert granted([Scope.ADMIN]) == EVERYTHING
    assert granted([Scope.SCORE]) == {Scope.SCORE}
    assert Scope.PUBLIC not in EVERYTHING


@pytest.mark.parametrize(
    ("settings", "tokens", "words", "never"),
    [
        ({}, False, ["make a token by lapwing token NAME --scope admin", "--tokens-file FILE", "--open-admin"], "{"),
        ({}, True, ["make a token by lapwing token NAME --scope admin --into FILE"], "--open-admin"),
        ({"host": "192.0.2.1", "insecure": True}, False, ["--scope admin", "--tokens-file FILE"], "--open-admin"),
    ],
    ids=["loopback", "tokens", "everywhere"],
)
def test_a_missing_scope_is_told_with_what_to_do_about_it(
    settings: dict[str, Any], tokens: bool, words: list[str], never: str, tmp_path: Path
) -> None:
    given = settings | ({"tokens_file": a_file(tmp_path, entry("a", "a-token", "read"))} if tokens else {})
    door = authenticator(Settings(**given), lambda reason: None, Watcher())
    refusal = refusal_of(lambda: door.admit("/lapwing.v1.Probes/ActivateProbe", bearing("a-token")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "MISSING_SCOPE")
    assert [word for word in words if word not in refusal.message] == []
    assert never not in refusal.message
    opened = authenticator(Settings(open_admin=True), lambda reason: None, Watcher())
    assert opened.admit("/lapwing.v1.Probes/ActivateProbe", bearing("a-token")).scopes == EVERYTHING, "control"


# Those who need not say who they are.


def a_watch(address: str) -> Any:
    return FakeContext(peer=f"ipv4:{address}:5000")


@pytest.mark.parametrize("method", [WATCH, REFLECTION])
def test_open_streams_are_counted_of_all_and_of_each_address(method: str) -> None:
    shed: list[str] = []
    door = Authenticator(visitors=Visitors(5, 2), shed=shed.append)
    first = [a_watch("192.0.2.1") for _ in range(3)]
    door.admit(method, first[0])
    door.admit(method, first[1])
    refusal = refusal_of(lambda: door.admit(method, first[2]))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert "of this address" in refusal.message
    for number in (2, 3, 4):
        door.admit(method, a_watch(f"192.0.2.{number}"))
    assert "of this address" not in refusal_of(lambda: door.admit(method, a_watch("192.0.2.9"))).message
    for _ in range(9):
        door.admit(HEALTH, a_watch("192.0.2.1"))  # a question and an answer is no stream
    first[2].end()  # one that was refused took no place, and frees none
    refusal_of(lambda: door.admit(method, a_watch("192.0.2.9")))
    first[0].end()
    door.admit(method, a_watch("192.0.2.1"))
    assert shed == ["TOO_MANY_STREAMS"] * 3


def test_nothing_is_left_of_those_who_went() -> None:
    visitors = Visitors(10, 10)
    door = Authenticator(visitors=visitors)
    calls = [a_watch(f"192.0.2.{number % 4}") for number in range(10)]
    for call in calls:
        door.admit(WATCH, call)
    assert len(visitors) == 10
    for call in calls:
        call.end()
    assert (len(visitors), visitors._open) == (0, {})


def test_every_public_stream_is_counted() -> None:
    public = {method for method, scope in SCOPES.items() if scope is Scope.PUBLIC and "/" in method}
    assert public >= PUBLIC_STREAMS
    assert {method for method in public if method.endswith(("Watch", "Info"))} == PUBLIC_STREAMS
