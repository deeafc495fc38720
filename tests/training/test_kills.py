"""kill -9 at random moments: what is run again ends with the bytes of a run that was not killed.

Five times each; twenty times with LAPWING_SOAK=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KILLS = 20 if os.environ.get("LAPWING_SOAK") else 5


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of all tasks, from one process, since importing takes longer than the runs."""
    script, place = Path(__file__).parent / "kills.py", tmp_path_factory.mktemp("kills")
    command = [sys.executable, str(script), str(tiny_model), str(place), str(KILLS), "0"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", ["generate", "extract", "train"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(runs: dict[str, list[dict[str, Any]]], task: str) -> None:
    assert len(runs[task]) == KILLS
    for run in runs[task]:
        assert not run["finished"], run  # control: it was really killed
        assert run["unlike"] == [], run  # whatever lies under its final name is whole
        assert run["same"], run


def test_the_moments_lie_all_over_the_runs(runs: dict[str, list[dict[str, Any]]]) -> None:
    moments = sorted(run["moment"] for task in runs.values() for run in task)
    assert moments[0] < 0.4
    assert moments[-1] > 0.6
