"""The image that serves: what it promises of itself, and, where a container engine is at hand, that it builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = shutil.which("docker") or shutil.which("podman")
ASKED = os.environ.get("LAPWING_IMAGE") == "1"
"""Building needs the network, which tests do not use unasked."""


def instructions(source: str) -> list[tuple[str, str]]:
    """(name, rest) of every instruction, continuation lines joined, comments left out."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in source.splitlines() if not line.startswith("#")))
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def last(source: str, name: str) -> str:
    """The rest of the last instruction of this name: the one that counts in the image."""
    return [rest for found, rest in instructions(source) if found == name][-1]


def users_at_the_end(source: str) -> str:
    """Who runs the server: the last USER after the last FROM; root without one."""
    names = [name for name, _ in instructions(source)]
    final = instructions(source)[len(names) - names[::-1].index("FROM") :]
    return next((rest for name, rest in reversed(final) if name == "USER"), "root")


def test_the_server_does_not_run_as_root() -> None:
    assert users_at_the_end((ROOT / "Dockerfile").read_text()) not in ("root", "0")


def test_control_an_image_without_a_user_is_root() -> None:
    assert users_at_the_end("FROM a\nUSER 5\nFROM b\nRUN x") == "root"


def test_it_copies_all_that_the_wheel_is_made_of() -> None:
    copied = {rest.split()[0] for name, rest in instructions((ROOT / "Dockerfile").read_text()) if name == "COPY"}
    packages = re.findall(r'^    "(\w+)/', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(packages) == 5
    assert set(packages) <= copied
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(packages) <= kept


def test_it_stops_as_the_server_stops_and_starts_what_is_there() -> None:
    source = (ROOT / "Dockerfile").read_text()
    assert last(source, "STOPSIGNAL") == "SIGTERM"  # which drains
    assert last(source, "ENTRYPOINT") == '["lapwing", "serve"]'


@pytest.mark.skipif(
    not (ASKED and ENGINE), reason="the image is not built: needs LAPWING_IMAGE=1 and a container engine"
)
@pytest.mark.timeout(1800)
def test_the_image_builds_and_shows_its_help() -> None:
    assert ENGINE is not None
    subprocess.run([ENGINE, "build", "-t", "lapwing-test", str(ROOT)], check=True)
    shown = subprocess.run(
        [ENGINE, "run", "--rm", "lapwing-test", "--help"], check=True, capture_output=True, text=True
    )
    assert "--port" in shown.stdout
