"""A second client, which shares no code with ours, drives the server through reflection alone."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lapwing.v1 import detector_pb2, probes_pb2
from lapwing_client.local_server import running_server

SECOND_CLIENT = Path(__file__).with_name("reflection_client.py")


def run(target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SECOND_CLIENT), target], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    with running_server(["--reflection"]) as target:
        from lapwing_client import Client

        with Client(target) as client:
            client.wait_until_ready(60)
        done = run(target)
        assert done.returncode == 0, done.stderr[-2000:]
        yield json.loads(done.stdout)


def test_it_shares_no_code_with_ours(found: dict[str, Any]) -> None:
    assert found["ours"] == []


def test_it_finds_every_method(found: dict[str, Any]) -> None:
    files = (detector_pb2.DESCRIPTOR, probes_pb2.DESCRIPTOR)
    services = [service for file in files for service in file.services_by_name.values()]
    ours = {method.full_name for service in services for method in service.methods}
    assert ours <= set(found["methods"])
    assert "grpc.health.v1.Health.Watch" in found["methods"]


def test_it_scores(found: dict[str, Any]) -> None:
    detection = found["detection"]
    assert detection["state"] == "DETECTION_STATE_SCORED"
    assert 0 < detection["probability"] < 1
    heads = [one["contribution"] for one in detection["strongest_heads"]]
    assert heads == sorted(heads, key=abs, reverse=True)


def test_it_reads_a_generation(found: dict[str, Any]) -> None:
    *tokens, last = found["events"]
    assert [token["token"].get("index", 0) for token in tokens] == list(range(len(tokens)))
    assert "".join(token["token"].get("text", "") for token in tokens) == last["generation"]["text"]
    assert last["generation"]["token_ids"] == [token["token"]["token_id"] for token in tokens]


def test_it_gets_a_picture(found: dict[str, Any]) -> None:
    layers, heads = (int(side) for side in found["heatmap"]["shape"])
    assert layers * heads == 48
    assert base64.b64decode(found["heatmap"]["image"]).startswith(b"\x89PNG")


def test_it_sees_health_probes_and_what_a_refusal_says(found: dict[str, Any]) -> None:
    assert found["health"] == "SERVING"
    assert found["probes"] == ["atlas"]
    assert found["refused"].startswith("INVALID_ARGUMENT: response: is empty")


def test_control_without_reflection_it_finds_nothing() -> None:
    with running_server([]) as target:
        done = run(target)
    assert done.returncode != 0
    assert "UNIMPLEMENTED" in done.stderr or "not found" in done.stderr.lower()
