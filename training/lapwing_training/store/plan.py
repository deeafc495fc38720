"""What a feature store was begun with, so that nothing else is mixed in. Knows neither items nor features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapwing_detector.identity import ModelIdentity
from lapwing_training.errors import StoreMismatch
from lapwing_training.files import from_json, to_json, write_text

SCHEMA_VERSION = 3
READABLE = (2, 3)
"""The second is read, too: it is the third without log-probabilities."""

PLAN, INDEX, LABELS, ITEMS = "plan.json", "index.json", "labels.json", "items.jsonl.gz"
SHARED = ("model", "dtype", "features", "k")
"""What two plans agree on when the features of one serve the other."""


def plan_of(identity: ModelIdentity, features: Sequence[str], k: int, **made: Any) -> dict[str, Any]:
    """A plan.

    Args:
        identity: of the model that reads.
        features: ids.
        k: eigenvalues kept per head.
        made: whatever else decides what the shards hold.
    """
    shared = (identity.digest, identity.dtype, list(features), k)
    return {"schema_version": SCHEMA_VERSION, **dict(zip(SHARED, shared, strict=True)), **made}


def open_plan(directory: Path, plan: Mapping[str, Any], lacking: Sequence[str] | None = None) -> None:
    """Begin a store, or go on with one that was begun with the same plan.

    Args:
        directory: of the store.
        plan: what it is made from.
        lacking: ids of the items whose features are not there. Where there are none, a store of the same model and
            features is gone on with though it was begun otherwise, such as while its answers were generated.

    Raises:
        StoreMismatch: the directory was begun with another plan, or holds something else.
    """
    begun = read_plan(directory)
    if begun is not None:
        _require_served(directory, begun, plan, lacking)
    elif directory.exists() and set(directory.iterdir()) != set(unfinished(directory)):
        raise StoreMismatch(f"{directory} holds other files; give a new directory")
    else:
        write_text(directory / PLAN, to_json(plan))
    for stale in unfinished(directory):
        stale.unlink()


def read_plan(directory: Path) -> dict[str, Any] | None:
    """What a store was begun with; None where none was.

    Raises:
        StoreMismatch: it can't be read.
    """
    path = directory / PLAN
    if not path.exists():
        return None
    try:
        return dict(from_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise StoreMismatch(
            f"{directory} can't be gone on with, {PLAN} is damaged; give another directory, or remove this one"
        ) from None


def unfinished(directory: Path) -> list[Path]:
    """Our own files that a killed run was still writing."""
    names = (PLAN, INDEX, LABELS, ITEMS, "shard-*.safetensors", "stage-*.safetensors")
    return [path for name in names for path in directory.glob(f".{name}.*.tmp")]


def _require_served(
    directory: Path, begun: Mapping[str, Any], plan: Mapping[str, Any], lacking: Sequence[str] | None
) -> None:
    different = [name for name in {**plan, **begun} if begun.get(name) != plan.get(name)]
    if not different:
        return
    if lacking is None or not set(different).isdisjoint(SHARED):
        raise StoreMismatch(
            f"{directory} was begun with other items, another model or other options ({', '.join(different)}); "
            "give another directory, or remove this one"
        )
    if lacking:
        raise StoreMismatch(
            f"{directory} was begun with other items ({', '.join(different)}) and holds no undamaged features of "
            f"`{lacking[0]}` and {len(lacking) - 1} others with these token ids; lapwing inspect shows what it holds; "
            "give another directory, or remove this one"
        )
