"""The rows of a finished store, out of its index, labels and shards. Whether files are whole is for others to say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.features import FEATURES
from lapwing_detector.token_statistics import TOKEN_STATISTICS, token_statistics
from lapwing_training.errors import StoreCorrupt
from lapwing_training.store.feature_rows import FeatureRows
from lapwing_training.store.plan import INDEX, LABELS
from lapwing_training.store.prefix import Prefix, response_cut
from lapwing_training.store.shards import Shard, read_shard
from lapwing_training.store.table import UNKNOWN, Table

LogProbabilities = list[NDArray[np.float32]]
"""By item, (response tokens,)."""

COLUMNS = ("id", "group", "split", "stratum", "token_count", "response_tokens", "log_probability", "mode")
"""Of the index: a list each, with an entry for each item."""


def table_of(path: Path, index: Mapping[str, Any], labels: Mapping[str, int | None]) -> Table:
    """All items of a store, in its order.

    Raises:
        StoreCorrupt: index, labels and shards do not belong together.
    """
    items: Mapping[str, list[Any]] = index["items"]
    if len({len(items[name]) for name in COLUMNS}) != 1:
        raise StoreCorrupt(f"{path / INDEX} has columns of different lengths; remove it and extract again")
    shards = [read_shard(path / name) for name in index["shards"]]
    places = _places(path, shards)
    if not set(items["id"]) <= places.keys():
        raise StoreCorrupt(f"{path / INDEX} and the shards list different items; remove both and extract again")
    said = _log_probabilities(path, index, shards)
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
        token_statistics=None if said is None else _statistics(said),
    )
    if labels.keys() != set(items["id"]):
        raise StoreCorrupt(
            f"{path / INDEX} and {path / LABELS} list different items; "
            "run lapwing extract again, which keeps the shards"
        )
    prefixes = {float(fraction): _prefix(path, index, table, said, float(fraction)) for fraction in index["stages"]}
    return replace(table, prefixes=prefixes)


def _log_probabilities(path: Path, index: Mapping[str, Any], shards: Sequence[Shard]) -> LogProbabilities | None:
    """Of the response's tokens of each item, in order; None where they were not kept of all."""
    known: dict[str, NDArray[np.float32]] = {}
    for shard in shards:
        known |= shard.log_probabilities or {}
    ids, tokens = index["items"]["id"], index["items"]["response_tokens"]
    if not set(ids) <= known.keys():
        return None
    for id, count in zip(ids, tokens, strict=True):
        if not 0 <= count - len(known[id]) <= 1:  # one, where nothing stands before the response
            raise StoreCorrupt(
                f"{path} holds {len(known[id])} log-probabilities of `{id}`, whose response has {count} tokens; remove "
                f"{INDEX} and the shards and extract again"
            )
    return [known[id] for id in ids]


def _statistics(said: LogProbabilities) -> NDArray[np.float64]:
    """(items, statistics)."""
    return np.array([token_statistics(one) for one in said]).reshape(len(said), len(TOKEN_STATISTICS))


def _prefix(
    path: Path, index: Mapping[str, Any], table: Table, said: LogProbabilities | None, fraction: float
) -> Prefix:
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
        token_statistics=None if said is None else _statistics(_first(said, rows, whole, left)),
    )


def _first(
    said: LogProbabilities, rows: NDArray[np.int64], whole: NDArray[np.int64], left: NDArray[np.int64]
) -> LogProbabilities:
    """Of some items those of the tokens that are left: what follows a token has no part in its probability."""
    cut = zip(rows.tolist(), (whole - left).tolist(), strict=True)
    return [said[row][: max(0, len(said[row]) - missing)] for row, missing in cut]


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
