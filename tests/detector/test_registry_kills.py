"""SIGKILL at random instants of publishing: a reader always finds a sound revision, and never an older one.

30 times; 1,000 times with LAPWING_SOAK=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 1000 if os.environ.get("LAPWING_SOAK") else 30


def told(place: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).parent / "registry_kills.py"), str(place), *map(str, arguments)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told(tmp_path_factory.mktemp("kills"), KILLS, 0)


@pytest.mark.timeout(1800)
def test_a_killed_publisher_leaves_a_sound_revision_and_never_an_older_one(kills: dict[str, Any]) -> None:
    assert len(kills["runs"]) == KILLS
    before = -1
    for run in kills["runs"]:
        assert run["sound"], run
        assert run["serves"] >= max(before, run["first"] + run["published"] - 1), run
        assert run["serves"] <= run["first"] + run["published"], run
        before = run["serves"]


def test_what_killed_publishers_left_is_swept_by_the_next(kills: dict[str, Any]) -> None:
    assert sum(run["left"] for run in kills["runs"]) > 0  # control: there was something to sweep
    assert kills["after"] == {"serves": kills["last"], "sound": True, "left": 0}


def test_the_moments_lie_all_over_publishing(kills: dict[str, Any]) -> None:
    assert sum(not run["finished"] for run in kills["runs"]) >= KILLS // 2  # control: they were really killed
    moments = sorted(run["moment"] for run in kills["runs"] if run["moment"] is not None)
    assert moments[0] < 0.3
    assert moments[-1] > 0.7
    assert {run["published"] for run in kills["runs"]} >= {0, 1}


def test_control_a_publisher_that_writes_in_place_is_caught(tmp_path: Path) -> None:
    runs = told(tmp_path, 30, 0, "careless")["runs"]
    assert any(not run["sound"] for run in runs)
