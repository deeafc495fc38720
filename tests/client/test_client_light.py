"""The client stays light: no arrays, no models, and no verb imported before it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "matplotlib", "lapwing_detector", "lapwing_server", "lapwing_training")


def loaded_after(program: str) -> set[str]:
    """Which heavy modules a fresh interpreter has after the program."""
    ending = f"\nimport sys; print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program + ending], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])


@pytest.mark.parametrize(
    "program",
    [
        "import lapwing_client",
        "from lapwing_client import Client; Client('localhost:1').close()",
        "import lapwing_client.cli, lapwing_client.score",
        "from lapwing_client.cli import main; main(['--help'])",
        "from lapwing_client.cli import main; main(['score', '--help'])",
    ],
)
def test_the_client_loads_neither_numpy_nor_torch(program: str) -> None:
    assert loaded_after(program) == set()


def test_control_what_is_loaded_is_seen() -> None:
    assert loaded_after("import numpy") == {"numpy"}
    assert "lapwing_server" in loaded_after("from lapwing_client.cli import main; main(['serve', '--help'])")


def test_help_of_serving_loads_no_torch() -> None:
    assert "torch" not in loaded_after("from lapwing_client.cli import main; main(['serve', '--help'])")
