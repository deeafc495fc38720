"""The client with other versions of what it stands on, against a server of this installation.

LAPWING_PYTHONS names interpreters, with the path separator between them; without it only this one is tried. `make
compat` makes one with the oldest versions that pyproject.toml admits, and one with the newest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from odd_certificates import issue
from service_fakes import Running
from test_client_tls import served_by
from wire_server import WireServer

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("compatibility_smoke.py")
PYTHONS = [sys.executable, *filter(None, os.environ.get("LAPWING_PYTHONS", "").split(os.pathsep))]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    authority = issue("authority")
    path = tmp_path_factory.mktemp("tls") / "authority.pem"
    path.write_bytes(authority.pem)
    served = served_by(issue("server", authority, hosts=("127.0.0.1",)))
    with Running() as one, Running() as other, WireServer(credentials=served) as tls:
        yield [one.target, other.target, tls.target, str(path)]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_client_works(python: str, arguments: list[str]) -> None:
    path = os.pathsep.join([str(ROOT / "proto"), str(ROOT / "client")])
    command = [python, str(SMOKE), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout.splitlines()[-1])
    print(f"{python}: {versions}")
    if python == sys.executable:
        assert versions == {name: version(name) for name in versions}


def test_what_is_tried_is_what_the_client_depends_on() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = SMOKE.read_text()
    for dependency in dependencies:
        assert f'"{dependency.split(">=")[0]}"' in text
