"""Calls, tokens and time as the parts of the door see them, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from certificates import replace

from lapwing_server.refusal import Refusal
from lapwing_server.security.tokens import digest_of

CANARY = "canary-4f1d"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCORE, LIST, HEALTH = "/lapwing.v1.Detector/Score", "/lapwing.v1.Probes/ListProbes", "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


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
        self._callbacks: list[Callable[[Any], None]] = []

    def invocation_metadata(self) -> Any:
        return self._metadata

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Any:
        return self._auth

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        """The call is over."""
        for callback in self._callbacks:
            callback(self)


def bearing(token: str, **more: Any) -> Any:
    return FakeContext(("authorization", f"Bearer {token}"), **more)


def entry(name: str, token: str, *scopes: str, **more: Any) -> str:
    lines = {"name": name, "sha256": digest_of(token), "scopes": list(scopes)} | more
    return "[[tokens]]\n" + "".join(f"{key} = {json.dumps(value, default=str)}\n" for key, value in lines.items())


def certificate(name: str, *scopes: str, **more: str) -> str:
    """More are lines that stand as they are."""
    lines = {"name": json.dumps(name), "scopes": json.dumps(list(scopes))} | more
    return "[[certificates]]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items())


def a_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tokens.toml"
    replace(path, text.encode())
    return path


def refusal_of(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value
