"""What people write never reaches a log, a metric or an error: length and a short hash at most."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from canaries import CANARY, METHODS, WRITTEN, Quoting, every_way, hits
from metrics_pages import page_of, samples_of
from service_fakes import WAIT, Running, a_shelf, wait_until
from written_log import Written, logging_as_before

from lapwing_server.engine import Loaded
from lapwing_server.readings import fingerprint

FAILURES = ["", "tokens", "template", "forward", "capture"]


@pytest.fixture
def written() -> Iterator[Written]:
    """The log as `lapwing serve` would write it."""
    with logging_as_before():
        yield Written()


def quoting(fails: str) -> Quoting:
    engine = Quoting()
    engine.fails = fails
    return engine


@pytest.mark.parametrize("fails", FAILURES)
def test_nothing_that_somebody_wrote_shows(written: Written, fails: str) -> None:
    with Running(quoting(fails), metrics_port=0, reflection=True) as server:
        said = every_way(server.target)
        server.settle()
        wait_until(
            lambda: '_in_flight{method="lapwing.v1.Detector/Generate"} 0.0' in page_of(server.server.metrics_port)
        )
        page = page_of(server.server.metrics_port)
    for method in METHODS:
        name = f"{method.containing_service.full_name}/{method.name}"
        assert f"/{name} StatusCode" in said, "it was called"
        assert f'lapwing_calls_total{{code="INVALID_ARGUMENT",method="{name}"}}' in page, (
            "and refused in one way at least"
        )
    scored = sum(value for (name, _), value in samples_of(page).items() if name == "lapwing_detections_total")
    assert (scored > 5) == (fails == ""), "text went all the way through, or failed on its way"
    assert ("INTERNAL" in said) == (fails not in ("", "template"))
    for place in (written.text, page, said):
        assert len(place) > 1000
        assert hits(place) == []


@pytest.mark.parametrize("right", [True, False])
def test_a_token_shows_nowhere(written: Written, tmp_path: Path, right: bool) -> None:
    """The canary is the bearer token, too."""
    file, token = tmp_path / "tokens.toml", CANARY if right else "another"
    digest = hashlib.sha256(token.encode()).hexdigest()
    file.write_text(f'[[tokens]]\nname = "somebody"\nsha256 = "{digest}"\nscopes = ["score", "read"]\n')
    with Running(quoting(""), metrics_port=0, tokens_file=file) as server:
        said = every_way(server.target)
        page = page_of(server.server.metrics_port)
    assert ("MISSING_SCOPE" in said, "UNAUTHENTICATED" in said) == (right, not right)
    assert ('"principal": "somebody"' in written.text) == right
    for place in (written.text, page, said):
        assert hits(place) == []


def test_control_what_is_logged_is_found(written: Written) -> None:
    logging.getLogger("lapwing.server").info("a prompt: %s", CANARY)
    logging.getLogger("lapwing.server").info("a prompt", extra={"ids": list(CANARY.encode())})
    logging.getLogger("lapwing.server").debug("not at this level: %s", WRITTEN)
    assert len(hits(written.text)) == 2


def test_control_the_canary_reached_the_engine_and_was_written() -> None:
    engine = quoting("")
    with Running(engine) as server:
        every_way(server.target)
    assert tuple(CANARY.encode()) * 2 in engine.scored
    assert engine.steps >= 3 * len(WRITTEN)


def serve(fails: str) -> None:
    """In a process of its own: `lapwing serve` with the arguments of the process and an engine that quotes."""
    from lapwing_client.cli import main
    from lapwing_server import engine

    engine.loader = lambda *_, **__: lambda: Loaded(quoting(fails), a_shelf())  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))


def log_of_a_process(fails: str, log: Path, *arguments: str) -> tuple[str, str, str]:
    """What a real server writes on standard error and in its metrics, and what its clients are told."""
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import test_server_privacy as t; t.serve({fails!r})"
    command = [sys.executable, "-c", script, "serve", "--port", "0", "--metrics-port", "0", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LAPWING", "GRPC"))}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert process.stdout is not None
    try:
        target = process.stdout.readline().removeprefix("listening on ").strip()
        wait_until(lambda: "serving fake-model" in log.read_text())
        said = every_way(target)
        [port] = [
            line.split("/metrics")[0].rsplit(":", 1)[1] for line in log.read_text().splitlines() if "/metrics" in line
        ]
        page = page_of(int(port))
        process.terminate()
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.communicate()
    return log.read_text(), page, said


@pytest.mark.parametrize("fails", ["", "tokens", "forward"])
def test_a_real_server_writes_one_object_a_line_and_nothing_that_somebody_wrote(fails: str, tmp_path: Path) -> None:
    text, page, said = log_of_a_process(fails, tmp_path / "log")
    for place in (text, page, said):
        assert hits(place) == []
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert all({"event", "level", "timestamp", "logger"} <= line.keys() for line in lines)
    calls = [line for line in lines if "milliseconds" in line]
    assert len(calls) > 50
    for call in calls:
        assert {"event", "code", "request_id", "principal"} <= call.keys()
        assert call["principal"] == "127.0.0.1"
    assert any(call.get("probe", "").startswith("fake-probe@") for call in calls)
    errors = {line["error_id"]: line for line in lines if "error_id" in line}
    assert bool(errors) == bool(fails)
    names = {call["request_id"] for call in calls}
    assert all(line["request_id"] in names for line in errors.values()), "an error can be traced to its call"
    assert all(error_id in said for error_id in errors), "and to what the client was told"


def test_control_a_real_server_that_is_asked_to_be_verbose_quotes(tmp_path: Path) -> None:
    text, page, said = log_of_a_process("tokens", tmp_path / "log", "--verbose")
    assert CANARY in hits(text)
    assert hits(page) == hits(said) == []


def test_people_get_text_and_nothing_that_somebody_wrote_either(tmp_path: Path) -> None:
    text, _, _ = log_of_a_process("forward", tmp_path / "log", "--log-format", "text")
    assert hits(text) == []
    assert "lapwing.v1.Detector/Score INTERNAL" in text
    assert not any(line.startswith("{") for line in text.splitlines())


def test_the_fingerprint_tells_texts_apart_and_nothing_else() -> None:
    assert fingerprint(CANARY) == fingerprint(CANARY)
    assert fingerprint(CANARY) != fingerprint(CANARY + "!")
    assert fingerprint("hello") == "5:2cf24dba"
    assert fingerprint([1, 2, 3]).startswith("3:")
    assert CANARY not in fingerprint([{"role": "user", "content": CANARY}])
