"""From labelled generations to a calibrated probe. Knows nothing of the wire.

Names are imported when they are asked for, so that `lapwing --help` loads no scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LabelledGeneration": "generations",
    "Question": "generations",
    "read_generations": "generations",
    "read_questions": "generations",
    "write_generations": "generations",
    "label_generations": "label",
    "generate_answers": "generate",
    "GenerateOptions": "generate",
    "extract_features": "extract",
    "ExtractOptions": "extract",
    "read_store": "store",
    "read_items": "store",
    "Store": "store",
    "merge_stores": "merge",
    "inspect_store": "inspect",
    "Table": "table",
    "train_probe": "train",
    "TrainOptions": "train",
    "evaluate_probe": "transfer",
    "TrainingError": "errors",
}
"""Module of each public name."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
