"""The client stays light: no arrays, no models, and no verb imported before it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    *("torch", "numpy", "transformers", "matplotlib", "lapwing_detector", "lapwing_server", "lapwing_training"),
    *("rich", "typer", "tqdm", "IPython"),
)
SHELL = {"rich", "typer"}
"""What only the command needs."""


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
        "from lapwing_client import Client; Client('localhost:1', tls=True).close()",
        "from lapwing_client import AsyncClient; AsyncClient('localhost:1')",
        "from lapwing_client import Client; list(Client('localhost:1').score_many([]))",
    ],
)
def test_the_library_loads_no_array_no_model_and_nothing_of_the_shell(program: str) -> None:
    assert loaded_after(program) == set()


@pytest.mark.parametrize(
    "program",
    [
        "import lapwing_client.cli, lapwing_client.score",
        "from lapwing_client.cli import main; main(['--help'])",
        "from lapwing_client.cli import main; main(['score', '--help'])",
    ],
)
def test_the_command_loads_no_array_and_no_model(program: str) -> None:
    assert loaded_after(program) <= SHELL


def test_control_what_is_loaded_is_seen() -> None:
    assert loaded_after("import numpy") == {"numpy"}
    assert {"lapwing_server"} | SHELL <= loaded_after("from lapwing_client.cli import main; main(['serve', '--help'])")


def test_help_of_serving_loads_no_torch() -> None:
    assert "torch" not in loaded_after("from lapwing_client.cli import main; main(['serve', '--help'])")
