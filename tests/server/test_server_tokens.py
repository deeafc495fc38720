"""The file of tokens, and the command that makes them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from door_fakes import CANARY, LIST, NOW, Clock, a_file, bearing, certificate, entry, refusal_of

from lapwing_client.cli import main
from lapwing_server.security.authenticator import Authenticator
from lapwing_server.security.tokens import LONGEST_TOKEN, Tokens, digest_of, problems, read
from lapwing_server.security.watched import UnusableFile

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
    tokens = Tokens(a_file(tmp_path, text), clock=clock)
    door = Authenticator(tokens)
    assert door.admit(LIST, bearing("a-token")).name == "short"
    clock.now = expires.timestamp() - 0.001
    door.admit(LIST, bearing("a-token"))
    clock.now = expires.timestamp()
    refusal = refusal_of(lambda: door.admit(LIST, bearing("a-token")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert "expired" in refusal.message


BROKEN = [
    (f'"{CANARY}" = = 1', "is no TOML, line 1, column"),
    (f'[[tokens]]\nname = "a"\nsha256 = "{CANARY}"\nscopes = ["read"]', "tokens[0].sha256: String should match"),
    (entry("a", CANARY, "everything"), "tokens[0].scopes[0]: should be read, score or admin"),
    (entry("a", CANARY, "public"), "tokens[0].scopes[0]: should be read, score or admin"),
    (entry("a", CANARY, "read", burst=3), "tokens[0]: burst needs requests_per_second"),
    (certificate("a", "read") + certificate("a", "score"), "two certificates have the name a;"),
    ("a = " + "[" * 50_000, "is nested too deeply"),
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
    (entry("a\nb", CANARY, "read"), "tokens[0].name: should be 1 to 100 letters, digits, "),
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


def test_certificates_that_no_client_is_asked_for_are_refused(tmp_path: Path) -> None:
    path = a_file(tmp_path, entry("a", CANARY, "read") + certificate("b", "read"))
    with pytest.raises(UnusableFile, match="no client is asked for one: give tls_client_ca"):
        Tokens(path, mutual=False)
    assert Tokens(path, mutual=True).certificate(["b"]), "control"


def test_a_certificate_of_several_names_has_the_first_grant_that_holds(tmp_path: Path) -> None:
    text = certificate("old", "read", expires="2025-01-01T00:00:00Z")
    text += certificate("new", "score", expires="2027-01-01T00:00:00Z") + certificate("last", "admin")
    tokens = Tokens(a_file(tmp_path, text), clock=Clock(NOW.timestamp()))

    def known(*names: str) -> str | None:
        grant = tokens.certificate(names)
        return grant.name if grant else None

    assert known("last", "new", "old") == "new", "the order of the file counts"
    assert known("old") == "old", "whoever asks tells that it has expired"
    assert known("nobody") is None


def test_a_file_of_many_tokens_is_read_in_one_pass(tmp_path: Path) -> None:
    """Each digest is looked at a few times, not once for each other one."""
    looked: list[int] = []

    class Digest(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            looked.append(1)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    grants = read(a_file(tmp_path, "".join(entry(f"t{i}", str(i), "read") for i in range(300))))
    marked = [grant.model_copy(update={"sha256": Digest(grant.sha256)}) for grant in grants.tokens]
    assert list(problems(grants.model_copy(update={"tokens": tuple(marked)}), mutual=True)) == []
    assert len(looked) <= 3 * len(marked)


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ci"], "--scope"),
        (["ci", "--scope", "all"], "should be read, score or admin"),
        (["c\ni", "--scope", "read"], "name: should be 1 to 100 letters, digits"),
        (["c,i", "--scope", "read"], "name: should be 1 to 100 letters, digits"),
        (["ci", "--scope", "read", "--days", "99999999"], "36500"),
        (["ci", "--scope", "read", "--burst", "3"], "burst needs requests_per_second"),
    ],
)
def test_the_command_refuses_what_a_server_would(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["token", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert "Traceback" not in said.err
    assert "Scope." not in said.err


def test_a_token_may_last_a_hundred_years_and_have_a_rate_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made.toml"
    options = ["--days", "36500", "--requests-per-second", "0.5", "--burst", "9"]
    assert main(["token", "ci", "--scope", "read", "--into", str(path), *options]) == 0
    grant = Tokens(path).bearer(capsys.readouterr().out.strip())
    assert grant is not None
    assert (grant.principal.requests_per_second, grant.principal.burst) == (0.5, 9)


BEFORE = {
    "a comment without a newline": "# who may do what",
    "a token without a newline": entry("a", "old", "read").rstrip(),
    "an empty file": "",
    "a certificate": certificate("a", "read") + "\n\n\n",
    "carriage returns": "# who\r\n",
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_what_stood_in_the_file_stays_and_the_token_is_known(
    before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_file(tmp_path, before)
    path.chmod(0o640)
    assert main(["token", "ci", "--scope", "score", "--into", str(path)]) == 0
    tokens = Tokens(path)
    assert tokens.bearer(capsys.readouterr().out.strip())
    assert path.read_bytes().startswith(before.rstrip().encode())
    assert (tokens.bearer("old") is not None) == ("[[tokens]]" in before)
    assert path.stat().st_mode & 0o777 == 0o640, "who could read it can do so still"
    assert os.listdir(tmp_path) == [path.name], "nothing else is left there"


@pytest.mark.parametrize("before", ["tokens = 3", "a = = b", "tokens = []", "certificates = []"])
def test_a_file_that_nothing_can_be_added_to_stays_as_it_is(
    before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_file(tmp_path, before)
    can = before.startswith("certificates")
    assert main(["token", "ci", "--scope", "score", "--into", str(path)]) == (0 if can else 2)
    assert (path.read_text() == before) != can
    assert os.listdir(tmp_path) == [path.name]
    assert (capsys.readouterr().out == "") != can, "a token that nobody knows is not shown"


def test_a_link_stays_one_and_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_file(tmp_path, entry("a", "old", "read"))
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    assert main(["token", "ci", "--scope", "score", "--into", str(link)]) == 0
    assert link.is_symlink()
    assert len(read(path).tokens) == 2
    capsys.readouterr()
    assert main(["token", "ci", "--scope", "score", "--into", str(tmp_path / "none" / "x.toml")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "can't be written: No such file or" in " ".join(re.sub("[│╭╮╰╯─]", " ", said.err).split())


def test_two_who_add_at_once_are_both_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made.toml"
    command = [sys.executable, "-c", ADDER, str(path)]
    adders = [subprocess.Popen([*command, str(number)]) for number in range(2)]
    assert [one.wait(60) for one in adders] == [0, 0]
    assert len(read(path).tokens) == 40


ADDER = """
import sys
from pathlib import Path
from lapwing_server.security.tokens import digest_of
from lapwing_server.security.tokens_file import add
for number in range(20):
    name = f"t{sys.argv[2]}-{number}"
    add(f'[[tokens]]\\nname = "{name}"\\nscopes = ["read"]\\nsha256 = "{digest_of(name)}"', Path(sys.argv[1]))
"""
