"""What holds for every test: no network, no clock, and few threads, since several processes share the cores."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker has one core; what it inherits is its parent's, from the line above

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test says how long anything takes, on a busy machine least of all.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONG = (
    "test_guarantee_on_atlas.py",
    "test_kills.py",
    "test_end_to_end.py",
    "test_server_soak.py",
    "test_architectures.py",
    "test_honest_training.py",
    "test_server_replicas.py",
    "test_server_swaps.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, what takes longest comes first, so that none works on alone at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        made = map(_encodable, value)
        return tuple(made) if isinstance(value, tuple) else list(made)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """A test may log names made of any bytes; a worker sends its report as UTF-8."""
    return _encodable((yield))
