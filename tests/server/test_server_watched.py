"""Files that change while a server runs: tokens and certificates."""

from __future__ import annotations

import logging
import os
import resource
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, replace
from door_fakes import CANARY, a_file, entry
from service_fakes import WAIT, Gate, wait_until

from lapwing_server.security import tls, watched
from lapwing_server.security.tokens import Tokens
from lapwing_server.security.watched import UnusableFile, Watched, Watcher


def test_the_file_is_read_anew_when_it_changes_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(tmp_path, entry("a", "old", "read"))
    tokens = Tokens(path)

    def known() -> list[bool]:
        tokens.file.refresh()
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

    file = Watched([path], read)
    replace(path, b"two")
    assert [file.refresh() for _ in range(3)] == [True, True, False]
    assert file.content == b"three"


# What goes wrong and passes.


def refused(tokens: Tokens, *names: str) -> list[bool]:
    tokens.file.refresh()
    return [tokens.bearer(name) is None for name in names]


def test_a_token_that_is_taken_back_while_files_are_short_is_refused_as_soon_as_they_are_not(tmp_path: Path) -> None:
    """The table of open files is full at the one moment when the change is seen."""
    tokens = Tokens(a_file(tmp_path, entry("a", "stolen", "admin") + entry("b", "mine", "admin")))
    a_file(tmp_path, entry("b", "mine", "admin"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        assert refused(tokens, "stolen", "mine") == [False, False]
        assert tokens.file.stale
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused(tokens, "stolen", "mine") == [True, False]
    assert not tokens.file.stale


@pytest.mark.parametrize(
    "error", [UnusableFile, OSError, MemoryError, RecursionError, KeyError], ids=lambda e: e.__name__
)
def test_whatever_goes_wrong_once_changes_nothing_and_is_tried_again(
    error: type[Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    replace(path, b"old")
    wrong: list[Exception] = []

    def read() -> bytes:
        for one in wrong:
            raise one
        return path.read_bytes()

    file = Watched([path], read)
    replace(path, b"new")
    wrong.append(error(CANARY))
    for _ in range(3):
        assert not file.refresh()
        assert (file.content, file.stale) == (b"old", True)
    said = [record.getMessage() for record in caplog.records if "stays in use" in record.getMessage()]
    assert len(said) == 1, "once, not at each look"
    assert (CANARY in said[0]) == (error is UnusableFile), "only what was written for the log is in it"
    wrong.clear()
    assert file.refresh()
    assert (file.content, file.stale) == (b"new", False)


def test_what_is_put_back_as_it_was_is_no_longer_stale(tmp_path: Path) -> None:
    path, aside = tmp_path / "file", tmp_path / "aside"
    path.write_bytes(b"old")
    file = Watched([path], path.read_bytes)
    held = watched.stamp_of(path)
    path.rename(aside)
    file.refresh()
    assert file.stale
    aside.rename(path)
    assert watched.stamp_of(path) != held or not file.refresh()
    file.refresh()
    assert (file.content, file.stale) == (b"old", False)


def test_a_look_that_does_not_come_back_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gate = tmp_path / "file", Gate()
    path.write_bytes(b"old")
    file: Watched[Any] = Watched([path], lambda: gate() if path.read_bytes() == b"new" else b"old")
    replace(path, b"new")
    thread = threading.Thread(target=file.refresh)
    thread.start()
    assert gate.reached.wait(WAIT)
    assert (file.content, file.stale) == (b"old", False), "a short look is none"
    monkeypatch.setattr(watched, "PATIENCE", 0.0)
    assert file.stale
    gate.open()
    thread.join(WAIT)
    assert not file.stale


def watchers() -> int:
    return sum(thread.name == "lapwing-watcher" for thread in threading.enumerate())


def test_a_watcher_sees_changes_until_it_is_stopped(tmp_path: Path) -> None:
    path, before = tmp_path / "file", watchers()
    replace(path, b"one")
    watcher = Watcher(interval=0.01)
    file = Watched([path], path.read_bytes)
    watcher.add("tokens_file", file)
    replace(path, b"two")
    assert file.content == b"one", "control: nobody looks before the start"
    watcher.start()
    wait_until(lambda: file.content == b"two")
    path.unlink()
    wait_until(lambda: file.stale)
    replace(path, b"three")
    wait_until(lambda: file.content == b"three")
    watcher.stop()
    watcher.stop()
    assert watchers() == before


def test_a_watcher_of_nothing_has_no_thread() -> None:
    watcher, before = Watcher(), watchers()
    watcher.start()
    assert watchers() == before
    watcher.stop()


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


def test_comments_between_authorities_may_be_in_any_language(tmp_path: Path) -> None:
    authority, other = Authority("ours"), Authority("another")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    authority.issue("localhost").write(cert, key)
    replace(ca, "# Főtanúsítvány, 認証局\n".encode() + authority.pem + b"# \xff\n" + other.pem)
    assert isinstance(tls.credentials(cert, key, ca), grpc.ServerCredentials)
    replace(ca, authority.pem.replace(b"\n", "\né".encode(), 2))
    with pytest.raises(UnusableFile, match=r"ca\.pem can't be used"):
        tls.credentials(cert, key, ca)
