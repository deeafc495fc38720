"""Tokens, certificates' names, rates, and files that change: the parts of the door, each alone."""

from __future__ import annotations

import json
import logging
import math
import random
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, replace

from lapwing_client.cli import main
from lapwing_server.refusal import Refusal
from lapwing_server.security import tls
from lapwing_server.security.authenticator import Authenticator
from lapwing_server.security.principals import Principal, peer_name
from lapwing_server.security.rates import MOST_BUCKETS, Rates
from lapwing_server.security.scopes import EVERYTHING, SCOPES, USERS, Scope, granted
from lapwing_server.security.tokens import LONGEST_TOKEN, Tokens, digest_of
from lapwing_server.security.watched import UnusableFile, Watched

CANARY = "canary-4f1d"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCORE, LIST, HEALTH = "/lapwing.v1.Detector/Score", "/lapwing.v1.Probes/ListProbes", "/grpc.health.v1.Health/Check"


class Clock:
    """Time that stands still until it is told to move."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeContext:
    """A call as gRPC knows it, as far as the door looks at it."""

    def __init__(self, *metadata: tuple[str, Any], peer: str = "ipv4:127.0.0.1:5000", **auth: list[bytes]) -> None:
        self._metadata, self._peer, self._auth = metadata, peer, auth

    def invocation_metadata(self) -> Any:
        return self._metadata

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Any:
        return self._auth


def bearing(token: str, **more: Any) -> Any:
    return FakeContext(("authorization", f"Bearer {token}"), **more)


def entry(name: str, token: str, *scopes: str, **more: Any) -> str:
    lines = {"name": name, "sha256": digest_of(token), "scopes": list(scopes)} | more
    return "[[tokens]]\n" + "".join(f"{key} = {json.dumps(value, default=str)}\n" for key, value in lines.items())


def a_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tokens.toml"
    replace(path, text.encode())
    return path


def refusal_of(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value


# The file.


def test_a_token_is_known_by_its_digest_only(tmp_path: Path) -> None:
    text = entry("ci", "a-token", "score", "read", streams=2) + entry("ci", "the-next-token", "score")
    tokens = Tokens(a_file(tmp_path, text))
    grants = [tokens.bearer(token) for token in ("a-token", "the-next-token", "A-token", "", digest_of("a-token"))]
    assert [grant and (grant.name, grant.scopes, grant.streams) for grant in grants] == [
        ("ci", ("score", "read"), 2),
        ("ci", ("score",), None),
        None,
        None,
        None,
    ]
    assert "a-token" not in text


def test_every_digest_is_compared_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(a_file(tmp_path, "".join(entry(f"t{i}", f"token-{i}", "read") for i in range(9))))
    compared: list[str] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    counts = []
    for token in ("token-0", "token-8", "nobody's"):
        compared.clear()
        tokens.bearer(token)
        counts.append(len(compared))
    assert counts == [9, 9, 9]


def test_a_token_that_is_too_long_is_unknown_even_if_it_begins_like_one(tmp_path: Path) -> None:
    longest = "x" * LONGEST_TOKEN
    tokens = Tokens(a_file(tmp_path, entry("long", longest, "read")))
    assert tokens.bearer(longest) is not None
    assert tokens.bearer(longest + "x") is None


def test_a_grant_holds_until_it_expires(tmp_path: Path) -> None:
    expires = NOW + timedelta(hours=1)
    clock = Clock(NOW.timestamp())
    text = entry("short", "a-token", "read").rstrip() + f"\nexpires = {expires.isoformat()}\n"
    tokens = Tokens(a_file(tmp_path, text), clock)
    door = Authenticator(tokens)
    assert door.admit(LIST, bearing("a-token")).name == "short"
    clock.now = expires.timestamp() - 0.001
    door.admit(LIST, bearing("a-token"))
    clock.now = expires.timestamp()
    refusal = refusal_of(lambda: door.admit(LIST, bearing("a-token")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert "expired" in refusal.message


def test_admin_implies_all_and_nothing_else_does() -> None:
    assert granted([Scope.ADMIN]) == EVERYTHING
    assert granted([Scope.SCORE]) == {Scope.SCORE}
    assert Scope.PUBLIC not in EVERYTHING


BROKEN = [
    (f'"{CANARY}" = = 1', "is no TOML, line 1, column"),
    (f'[[tokens]]\nname = "a"\nsha256 = "{CANARY}"\nscopes = ["read"]', "tokens[0].sha256: String should match"),
    (entry("a", CANARY, "everything"), "tokens[0].scopes[0]: should be"),
    (entry("a", CANARY, "public"), "tokens[0].scopes[0]: should be"),
    (entry("a", CANARY), "tokens[0].scopes: Tuple should have at least 1 item"),
    (entry("a", CANARY, "read", secret=CANARY), "tokens[0] has an unknown key; known are name, scopes"),
    (f'{CANARY} = ["read"]', "the file has an unknown key; known are tokens, certificates"),
    ('[[certificates]]\nname = "a"\nscopes = ["read"]\nsha256 = "b"', "certificates[0] has an unknown key; known are"),
    (entry("a", CANARY, "read", expires="tomorrow"), "tokens[0].expires: should be a valid datetime"),
    (
        entry("a", CANARY, "read").rstrip() + "\nexpires = 2027-01-01T00:00:00",
        "tokens[0].expires: should have timezone",
    ),
    (entry("a", CANARY, "read", requests_per_second=0), "tokens[0].requests_per_second: should be greater than 0"),
    (entry("a\nb", CANARY, "read"), "tokens[0].name: String should match"),
    (entry("a", CANARY, "read") + entry("b", CANARY, "admin"), "the same sha256 stands twice, under a and b"),
    ("\ufeff" + "x" * 2**20, "has more than 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN, ids=lambda value: str(value)[-30:])
def test_a_broken_file_is_refused_and_nothing_of_it_is_shown(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableFile) as caught:
        Tokens(a_file(tmp_path, text))
    assert words in str(caught.value)
    assert "tokens.toml" in str(caught.value)
    assert CANARY not in str(caught.value)
    assert digest_of(CANARY) not in str(caught.value)


def test_the_file_is_read_anew_when_it_changes_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(tmp_path, entry("a", "old", "read"))
    tokens = Tokens(path)

    def known() -> list[bool]:
        return [tokens.bearer(token) is not None for token in ("old", "new")]

    assert known() == [True, False]
    a_file(tmp_path, entry("a", "old", "read") + entry("a", "new", "read"))
    assert known() == [True, True]
    a_file(tmp_path, f"nonsense {CANARY}")
    with caplog.at_level(logging.DEBUG):
        assert [known() for _ in range(3)] == [[True, True]] * 3
    path.unlink()
    assert [known() for _ in range(3)] == [[True, True]] * 3, "and a file that is gone takes nothing away either"
    a_file(tmp_path, entry("a", "new", "read"))
    assert known() == [False, True]
    complaints = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(complaints) == 2, "once for each change, not for each call"
    assert CANARY not in caplog.text


def test_what_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace(path, b"one")

    def read() -> bytes:
        data = path.read_bytes()
        if data == b"two":
            replace(path, b"three")
        return data

    watched = Watched([path], read)
    replace(path, b"two")
    assert [watched.refresh() for _ in range(3)] == [True, True, False]
    assert watched.content == b"three"


# The command that makes tokens.


def test_the_command_makes_a_token_that_a_server_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.toml"
    made = []
    for name, scope in (("ci", "score"), ("ops", "admin")):
        assert main(["token", name, "--scope", scope, "--days", "2", "--into", str(path)]) == 0
        made.append(capsys.readouterr().out.strip())
    tokens = Tokens(path)
    grants = [tokens.bearer(token) for token in made]
    assert [grant and (grant.name, grant.scopes) for grant in grants] == [("ci", ("score",)), ("ops", ("admin",))]
    assert all(grant and tokens.valid(grant) and grant.expires for grant in grants)
    assert path.stat().st_mode & 0o077 == 0
    assert [token for token in made if token in path.read_text()] == []


def test_without_a_file_the_command_prints_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "ci", "--scope", "score", "--scope", "read", "--requests-per-second", "2.5"]) == 0
    made, _, lines = capsys.readouterr().out.partition("\n")
    [grant] = tomllib.loads(lines)["tokens"]
    assert grant == {"name": "ci", "scopes": ["score", "read"], "requests_per_second": 2.5, "sha256": digest_of(made)}


@pytest.mark.parametrize("arguments", [["ci"], ["ci", "--scope", "all"], ["c\ni", "--scope", "read"]])
def test_the_command_refuses_what_a_server_would(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", *arguments]) == 2
    assert capsys.readouterr().out == ""


# Who calls.


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:[::1]:5000", "::1"),
        ("unix:/run/lapwing.sock", "unix"),
    ],
)
def test_an_address_names_its_bearer_without_the_port(peer: str, name: str) -> None:
    assert peer_name(FakeContext(peer=peer)) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("trusted", [True, False])
def test_without_tokens_and_certificates_the_address_decides(trusted: bool) -> None:
    principal = Authenticator(trusted=trusted).admit(LIST, FakeContext())  # type: ignore[arg-type]
    assert principal == Principal("127.0.0.1", EVERYTHING if trusted else USERS)


def test_a_certificate_is_known_by_any_of_its_names(tmp_path: Path) -> None:
    tokens = Tokens(a_file(tmp_path, '[[certificates]]\nname = "a.example.org"\nscopes = ["read"]\n'))
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


# Rates.


def test_the_wait_is_exact() -> None:
    """After the wait the call comes through; a little earlier it would not have."""
    dice = random.Random(1)
    for _ in range(2000):
        clock = Clock(dice.uniform(0, 1e6))
        rate, burst = 10 ** dice.uniform(-2, 3), dice.randint(1, 20)
        rates, principal = Rates(rate, burst, clock), Principal("a", USERS)
        waits = [rates.take(principal) for _ in range(burst + 1)]
        assert waits[:-1] == [0.0] * burst
        assert math.isclose(waits[-1], math.ceil(1000 / rate - 1e-6) / 1000)
        begun = clock.now
        if waits[-1] > 0.0011:
            clock.now = begun + waits[-1] - 0.0011
            assert rates.take(principal) > 0
        clock.now = begun + waits[-1]
        assert rates.take(principal) == 0.0


def test_in_the_long_run_nobody_gets_more_than_the_rate() -> None:
    dice, clock = random.Random(2), Clock()
    rates, principal = Rates(5.0, 10, clock), Principal("a", USERS)
    admitted = 0
    for _ in range(20_000):
        clock.now += dice.expovariate(20.0)
        admitted += rates.take(principal) == 0.0
    assert 0.99 * 5 * clock.now < admitted <= 10 + 5 * clock.now


def test_each_has_a_bucket_and_some_have_their_own_rate() -> None:
    clock = Clock()
    rates = Rates(1.0, None, clock)
    few, many = Principal("few", USERS), Principal("many", USERS, requests_per_second=3.5)
    assert [rates.take(few) == 0.0 for _ in range(3)] == [True, False, False]
    assert [rates.take(many) == 0.0 for _ in range(4)] == [True, True, True, False], "as many as in one second"
    assert rates.take(Principal("other", USERS)) == 0.0
    assert Rates().take(few) == 0.0, "unlimited"


def test_forgotten_buckets_are_full_ones() -> None:
    clock = Clock()
    rates, busy = Rates(1.0, 1, clock), Principal("busy", USERS)
    for i in range(MOST_BUCKETS):
        rates.take(Principal(str(i), USERS))
    clock.now = 1.5
    rates.take(busy)
    assert rates.take(busy) > 0
    rates.take(Principal("one more", USERS))
    assert len(rates) == 2
    assert rates.take(busy) > 0, "it was not forgotten"


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


# Certificates.


def test_what_openssl_would_not_take_is_refused_and_not_shown(tmp_path: Path) -> None:
    authority, stranger = Authority("ours"), Authority("another")
    pair, other = authority.issue("localhost"), stranger.issue("localhost")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    locked = authority.issue("localhost", password=CANARY)
    for certificate, secret, authorities, words in [
        (pair.cert, other.key, None, "key.pem can't be used together"),
        (b"nonsense", pair.key, None, "can't be used together"),
        (pair.cert, CANARY.encode(), None, "can't be used together"),
        (locked.cert, locked.key, None, "encrypted"),
        (pair.cert, pair.key, b"nonsense", "ca.pem can't be used"),
        (pair.cert, pair.key, b"\xff", "ca.pem can't be used"),
    ]:
        replace(cert, certificate)
        replace(key, secret)
        replace(ca, authorities or b"")
        with pytest.raises(UnusableFile) as caught:
            tls.credentials(cert, key, ca if authorities else None)
        assert words in str(caught.value)
        assert CANARY not in str(caught.value)
    pair.write(cert, key)
    replace(ca, authority.pem)
    assert isinstance(tls.credentials(cert, key, ca), grpc.ServerCredentials)


def test_the_table_holds_scopes_only_that_somebody_can_have() -> None:
    assert set(SCOPES.values()) == EVERYTHING | {Scope.PUBLIC}
