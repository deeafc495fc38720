"""The feature store: safetensors shards with a JSON index, each file whole or absent. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as tensors_from
from safetensors.numpy import save as tensors_to

from lapwing_detector.features import FEATURES
from lapwing_training.errors import StoreCorrupt, StoreMismatch
from lapwing_training.files import digest, from_json, to_json, write_atomically, write_text
from lapwing_training.table import UNKNOWN, Table

SCHEMA_VERSION = 1
PLAN, INDEX, LABELS = "plan.json", "index.json", "labels.json"


@dataclass(frozen=True)
class Shard:
    """Consecutive items of the plan."""

    ids: tuple[str, ...]
    features: Mapping[str, NDArray[np.float32]]
    """By feature id, (items, layers, heads, width(k))."""

    layers: tuple[int, ...]
    """Index in the model of each layer."""

    left_out: Mapping[str, str]
    """Reason by id, for items that have no finite features."""

    @property
    def about(self) -> dict[str, Any]:
        """Everything but the numbers, as JSON values."""
        return {"ids": list(self.ids), "layers": list(self.layers), "left_out": dict(self.left_out)}

    @property
    def digest(self) -> str:
        """SHA-256 of the content, kept inside the file: whether a shard is whole is known without an index, too."""
        arrays = sorted(self.features.items())
        head = json.dumps([self.about, [(name, values.shape) for name, values in arrays]], sort_keys=True)
        return digest(b"".join([head.encode(), *(values.astype("<f4").tobytes() for _, values in arrays)]))


@dataclass(frozen=True)
class Store:
    """A finished feature store, verified."""

    table: Table
    layers: tuple[int, ...]
    identity: Mapping[str, Any]
    """Of the model whose attention this is."""

    left_out: Mapping[str, str]
    """Reason by id, for items without features."""

    stratum: str
    """Which field the strata come from; empty when none."""

    digest: str
    """Of index and labels, for the record of a fit."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def open_plan(directory: Path, plan: Mapping[str, Any]) -> None:
    """Begin a store, or go on with one that was begun with the same plan.

    Raises:
        StoreMismatch: the directory was begun with another plan, or holds something else.
    """
    text, path = to_json(plan), directory / PLAN
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") != text:
            raise StoreMismatch(
                f"{directory} was begun with other items, another model or other options ({_difference(path, plan)}); "
                "give another directory with --out, or remove this one"
            )
    elif directory.exists() and set(directory.iterdir()) != set(_unfinished(directory)):
        raise StoreMismatch(f"{directory} holds other files; give a new directory with --out")
    else:
        write_text(path, text)
    for stale in _unfinished(directory):
        stale.unlink()


def write_shard(path: Path, shard: Shard) -> None:
    """Atomically; the same shard gives the same bytes."""
    about = {**shard.about, "digest": shard.digest}
    tensors = {name: np.ascontiguousarray(values, dtype="<f4") for name, values in shard.features.items()}
    # One entry only: safetensors keeps no order among several.
    write_atomically(path, tensors_to(tensors, metadata={"shard": json.dumps(about, ensure_ascii=False)}))


def read_shard(path: Path) -> Shard:
    """One shard; whether it is the one that was written is for `is_shard` or the index to say.

    Raises:
        StoreCorrupt: the file is missing or no shard of ours.
    """
    return _read_shard(path)[0]


def is_shard(path: Path, ids: Sequence[str]) -> bool:
    """Whether the finished shard of these items lies there undamaged, so that it need not be made again."""
    try:
        shard, written = _read_shard(path)
    except StoreCorrupt:
        return False
    listed = [*shard.ids, *shard.left_out]
    return shard.digest == written and len(listed) == len(ids) and set(listed) == set(ids)


def _read_shard(path: Path) -> tuple[Shard, str | None]:
    """A shard, and the digest that was written with it."""
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["shard"])
        shard = Shard(
            ids=tuple(about["ids"]),
            features=tensors_from(path.read_bytes()),
            layers=tuple(about["layers"]),
            left_out=dict(about["left_out"]),
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StoreCorrupt(
            f"{path} is not a readable shard ({error}); remove it and run lapwing extract again"
        ) from None
    return shard, about.get("digest")


def write_index(directory: Path, entries: Mapping[str, Any], labels: Mapping[str, int | None]) -> None:
    """Finish a store: labels in a file of their own, then the index, without which there is no store."""
    write_text(directory / LABELS, to_json({"schema_version": SCHEMA_VERSION, "labels": dict(labels)}))
    write_text(directory / INDEX, to_json({"schema_version": SCHEMA_VERSION, **entries}))


def shard_digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {name: digest((directory / name).read_bytes()) for name in names}


def read_store(directory: str | Path) -> Store:
    """A finished store, every shard verified against its digest.

    Raises:
        StoreCorrupt: no store, an unfinished one, or one whose files have changed.
    """
    path = Path(directory)
    index, labels = _read_json(path / INDEX), _read_json(path / LABELS)
    try:
        return _store(path, index, labels["labels"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise StoreCorrupt(
            f"{path / INDEX} or {path / LABELS} is not as lapwing extract writes it ({type(error).__name__}: "
            f"{str(error)[:80]}); remove both and run lapwing extract again, which keeps the shards"
        ) from None


def _store(path: Path, index: Mapping[str, Any], labels: Mapping[str, int | None]) -> Store:
    for name, expected in index["shards"].items():
        found = digest((path / name).read_bytes()) if (path / name).is_file() else "missing"
        if found != expected:
            raise StoreCorrupt(
                f"{path / name} is {found[:12]}, the index says {expected[:12]}; "
                "remove it and run lapwing extract again with the same options"
            )
    shards = [read_shard(path / name) for name in index["shards"]]
    files = digest((path / INDEX).read_bytes() + (path / LABELS).read_bytes())
    return Store(
        table=_table(path, index, labels, shards),
        layers=tuple(index["layers"]),
        identity=index["identity"],
        left_out=index["left_out"],
        stratum=index["stratum"],
        digest=files,
    )


def _table(path: Path, index: Mapping[str, Any], labels: Mapping[str, int | None], shards: list[Shard]) -> Table:
    items: Mapping[str, list[Any]] = index["items"]
    row_of = {id: row for row, id in enumerate(id for shard in shards for id in shard.ids)}
    if set(row_of) != set(items["id"]):
        raise StoreCorrupt(f"{path / INDEX} and the shards list different items; remove both and extract again")
    if {len(column) for column in items.values()} != {len(row_of)}:
        raise StoreCorrupt(f"{path / INDEX} has columns of different lengths; remove it and extract again")
    rows = np.array([row_of[id] for id in items["id"]], dtype=np.int64)  # shards are sorted by length
    features = {name: np.concatenate([shard.features[name] for shard in shards])[rows] for name in index["features"]}
    for name, values in features.items():
        expected = (len(index["layers"]), index["heads"], FEATURES[name].width(index["k"]))
        if values.shape[1:] != expected:
            raise StoreCorrupt(
                f"{path / INDEX}: {name} should be {expected} for each item, the shards hold {values.shape[1:]}; "
                "remove the index and extract again"
            )
    known = [labels.get(id) for id in items["id"]]
    for id, label in zip(items["id"], known, strict=True):
        if label is not None and (type(label) is not int or label not in (0, 1)):
            raise StoreCorrupt(
                f"{path / LABELS}: the label of `{id}` is {json.dumps(label)[:40]}; expected 0, 1 or null"
            )
    return Table(
        ids=np.array(items["id"], dtype=np.str_),
        groups=np.array(items["group"], dtype=np.str_),
        labels=np.array([UNKNOWN if label is None else label for label in known], dtype=np.int8),
        splits=np.array([split or "" for split in items["split"]], dtype=np.str_),
        strata=np.array(items["stratum"], dtype=np.str_),
        token_counts=np.array(items["token_count"], dtype=np.int64),
        log_probabilities=np.array(items["log_probability"], dtype=np.float64),  # null becomes NaN
        features=features,
        k=int(index["k"]),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreCorrupt(
            f"{path} is missing: no feature store, or an unfinished one; run lapwing extract --out {path.parent}"
        ) from None
    except ValueError as error:
        raise StoreCorrupt(f"{path} is not JSON ({error}); run lapwing extract again") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreCorrupt(f"{path} has schema version {version}, this lapwing reads {SCHEMA_VERSION}; extract again")
    return dict(value)


def _unfinished(directory: Path) -> list[Path]:
    """Our own files that a killed run was still writing."""
    names = (PLAN, INDEX, LABELS, "shard-*.safetensors")
    return [path for name in names for path in directory.glob(f".{name}.*.tmp")]


def _difference(path: Path, plan: Mapping[str, Any]) -> str:
    try:
        before = dict(from_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return f"{path.name} is damaged"
    return ", ".join(name for name in plan if before.get(name) != plan[name]) or "an entry is missing"
