"""The tests of the client talk to real servers; their fakes lie with the server's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "server"))

from service_fakes import WAIT, Running

from lapwing_client import Client


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    with Client(server.target, timeout=WAIT) as client:
        yield client
