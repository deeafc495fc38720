"""From labelled generations to a calibrated probe. Knows nothing of the wire.

Names are imported when they are asked for, so that `lapwing --help` loads no scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LabelledGeneration": "data.generations",
    "Question": "data.generations",
    "read_generations": "data.generations",
    "read_questions": "data.generations",
    "write_generations": "data.generations",
    "label_generations": "labels.label",
    "generate_answers": "answers.generate",
    "GenerateOptions": "answers.generate",
    "extract_features": "store.extract",
    "ExtractOptions": "store.extract",
    "read_store": "store.store",
    "read_items": "store.store",
    "Store": "store.store",
    "merge_stores": "store.merge",
    "inspect_store": "store.inspect",
    "Table": "store.table",
    "train_probe": "probe.train",
    "TrainOptions": "probe.train",
    "evaluate_probe": "evaluation.transfer",
    "TrainingError": "errors",
}
"""Module of each public name."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
