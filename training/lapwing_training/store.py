"""The feature store: a directory of shards with an index, labels and texts, each file whole or absent. Knows no model.

`plan.json` says what was begun, the shards hold the features, `items.jsonl.gz` the texts and `labels.json` the labels;
`index.json` is written last, and without it a store is not finished.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lapwing_detector.features import FEATURES
from lapwing_training.errors import StoreCorrupt
from lapwing_training.feature_rows import FeatureRows
from lapwing_training.files import digest, digest_of, from_json, to_json, write_text
from lapwing_training.generations import LabelledGeneration, parse_line, write_generations
from lapwing_training.prefix import Prefix, response_cut
from lapwing_training.progress import waiting
from lapwing_training.shards import Shard, ShardFile, read_shard
from lapwing_training.store_plan import INDEX, ITEMS, LABELS, SCHEMA_VERSION
from lapwing_training.table import UNKNOWN, Table

COLUMNS = ("id", "group", "split", "stratum", "token_count", "response_tokens", "log_probability", "mode")
"""Of the index: a list each, with an entry for each item."""


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

    mode: str = "unknown"
    """`generated`: the model wrote every response itself; `supplied`: it only read them; `mixed`, or `unknown`."""


def read_store(directory: str | Path) -> Store:
    """A finished store, every shard verified against its digest; features stay in the files until they are asked for.

    Raises:
        StoreCorrupt: no store, an unfinished one, or one whose files have changed.
    """
    path = Path(directory)
    index, labels = read_index(path)
    with as_written(path):
        for name, expected in waiting(list(files_in(index).items()), "verify"):
            require_digest(path / name, expected)
        return Store(
            table=_table(path, index, labels["labels"]),
            layers=tuple(index["layers"]),
            identity=index["identity"],
            left_out=index["left_out"],
            stratum=index["stratum"],
            digest=digest((path / INDEX).read_bytes() + (path / LABELS).read_bytes()),
            mode=mode_of(index["items"]["mode"]),
        )


def read_items(directory: str | Path) -> dict[str, LabelledGeneration]:
    """The items of a finished store by id, in its order, with their texts and labels.

    Raises:
        StoreCorrupt: no store, an unfinished one, or one whose files have changed.
    """
    path = Path(directory)
    index, labels = read_index(path)
    with as_written(path):
        require_digest(path / ITEMS, index["texts"])
        known, labelling = labels["labels"], labels["labelling"]
        return {
            item.id: replace(item, label=known.get(item.id), labelling=labelling.get(item.id, {}))
            for item in _items(path / ITEMS)
        }


def read_index(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Index and labels of a finished store, as they stand there.

    Raises:
        StoreCorrupt: no store, an unfinished one, or one of another version.
    """
    return _read_json(directory / INDEX), _read_json(directory / LABELS)


def files_in(index: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every shard by its file name."""
    listed: dict[str, str] = dict(index["shards"].items())
    for shards in index["stages"].values():
        listed.update(shards)
    return listed


def require_digest(path: Path, expected: str) -> None:
    """A file is the one that the index lists.

    Raises:
        StoreCorrupt: it is not.
    """
    found = digest_of(path) if path.is_file() else "missing"
    if found != expected:
        raise StoreCorrupt(
            f"{path} is {found[:12]}, the index says {expected[:12]}; "
            "remove it and run lapwing extract again with the same options"
        )


def mode_of(modes: Iterable[str | None]) -> str:
    """What is said of all items together."""
    found = set(modes)
    return "mixed" if len(found) > 1 else next(iter(found), None) or "unknown"


def write_index(directory: Path, entries: Mapping[str, Any], items: Sequence[LabelledGeneration]) -> None:
    """Finish a store: texts, then labels in a file of their own, then the index, without which there is no store.

    Args:
        directory: of the store.
        entries: of the index.
        items: those that the index lists, in its order.
    """
    labels = {
        "labels": {item.id: item.label for item in items},
        "labelling": {item.id: dict(item.labelling) for item in items if item.labelling},
    }
    write_generations(directory / ITEMS, [replace(item, label=None, labelling={}) for item in items])
    write_text(directory / LABELS, to_json({"schema_version": SCHEMA_VERSION, **labels}))
    texts = digest_of(directory / ITEMS)
    write_text(directory / INDEX, to_json({"schema_version": SCHEMA_VERSION, **entries, "texts": texts}))


def listed(files: Iterable[ShardFile]) -> dict[str, str]:
    """Shards as an index lists them: SHA-256 by file name."""
    return {file.path.name: file.digest for file in files}


def _items(path: Path) -> Iterator[LabelledGeneration]:
    text = gzip.decompress(path.read_bytes()).decode()
    return (parse_line(line, LabelledGeneration, path) for line in text.split("\n") if line)


def _table(path: Path, index: Mapping[str, Any], labels: Mapping[str, int | None]) -> Table:
    items: Mapping[str, list[Any]] = index["items"]
    if len({len(items[name]) for name in COLUMNS}) != 1:
        raise StoreCorrupt(f"{path / INDEX} has columns of different lengths; remove it and extract again")
    shards = [read_shard(path / name) for name in index["shards"]]
    places = _places(path, shards)
    if not set(items["id"]) <= places.keys():
        raise StoreCorrupt(f"{path / INDEX} and the shards list different items; remove both and extract again")
    table = Table(
        ids=np.array(items["id"], dtype=np.str_),
        groups=np.array(items["group"], dtype=np.str_),
        labels=np.array([_label(path, id, labels.get(id)) for id in items["id"]], dtype=np.int8),
        splits=np.array([split or "" for split in items["split"]], dtype=np.str_),
        strata=np.array(items["stratum"], dtype=np.str_),
        token_counts=np.array(items["token_count"], dtype=np.int64),
        log_probabilities=np.array(items["log_probability"], dtype=np.float64),  # null becomes NaN
        features=_features(path, index, shards, [places[id] for id in items["id"]]),
        k=int(index["k"]),
        response_tokens=np.array(items["response_tokens"], dtype=np.int64),
    )
    if labels.keys() != set(items["id"]):
        raise StoreCorrupt(
            f"{path / INDEX} and {path / LABELS} list different items; "
            "run lapwing extract again, which keeps the shards"
        )
    prefixes = {float(fraction): _prefix(path, index, table, float(fraction)) for fraction in index["stages"]}
    return replace(table, prefixes=prefixes)


def _prefix(path: Path, index: Mapping[str, Any], table: Table, fraction: float) -> Prefix:
    shards = [read_shard(path / name) for name in index["stages"][str(fraction)]]
    places = _places(path, shards)
    rows = np.array([row for row, id in enumerate(table.ids.tolist()) if id in places], dtype=np.int64)
    assert table.response_tokens is not None
    whole = table.response_tokens[rows]
    left = np.array([response_cut(fraction, tokens) for tokens in whole.tolist()], dtype=np.int64)
    return Prefix(
        rows=rows,
        token_counts=table.token_counts[rows] - whole + left,
        response_tokens=left,
        features=_features(path, index, shards, [places[id] for id in table.ids[rows].tolist()]),
    )


def _places(path: Path, shards: Sequence[Shard]) -> dict[str, tuple[int, int]]:
    """Which shard and which of its rows each item lies in."""
    places = {id: (part, row) for part, shard in enumerate(shards) for row, id in enumerate(shard.ids)}
    if len(places) != sum(len(shard.ids) for shard in shards):
        raise StoreCorrupt(f"{path} holds features of an item in two shards; remove it and extract again")
    return places


def _features(
    path: Path, index: Mapping[str, Any], shards: Sequence[Shard], places: Sequence[tuple[int, int]]
) -> dict[str, FeatureRows]:
    part, place = np.array(places, dtype=np.int64).reshape(-1, 2).T
    features = {}
    for name in index["features"]:
        expected = (len(index["layers"]), index["heads"], FEATURES[name].width(index["k"]))
        parts = tuple(shard.features[name] for shard in shards)
        for wrong in (one.shape[1:] for one in parts if one.shape[1:] != expected):
            raise StoreCorrupt(
                f"{path / INDEX}: {name} should be {expected} for each item, the shards hold {wrong}; "
                "remove the index and extract again"
            )
        features[name] = FeatureRows(parts, part, place)
    return features


def _label(path: Path, id: str, label: Any) -> int:
    if label is None:
        return UNKNOWN
    if type(label) is not int or label not in (0, 1):
        raise StoreCorrupt(f"{path / LABELS}: the label of `{id}` is {json.dumps(label)[:40]}; expected 0, 1 or null")
    return label


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
        newer = type(version) is int and version > SCHEMA_VERSION
        mend = "install a newer lapwing" if newer else "extract again into a new directory"
        raise StoreCorrupt(f"{path} has schema version {version}, this lapwing reads {SCHEMA_VERSION}; {mend}")
    return dict(value)


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Whatever is wrong with a value that is read inside means that index or labels are not ours."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise StoreCorrupt(
            f"{path / INDEX} or {path / LABELS} is not as lapwing extract writes it ({type(error).__name__}: "
            f"{str(error)[:80]}); remove both and run lapwing extract again, which keeps the shards"
        ) from None
