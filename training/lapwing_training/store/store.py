"""The feature store: a directory of shards with an index, labels and texts, each file whole or absent. Knows no model.

`plan.json` says what was begun, the shards hold the features, `items.jsonl.gz` the texts and `labels.json` the labels;
`index.json` is written last, and without it a store is not finished.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapwing_training.data.generations import LabelledGeneration, parse_line, write_generations
from lapwing_training.errors import StoreCorrupt
from lapwing_training.files import digest, digest_of, from_json, to_json, write_text
from lapwing_training.progress import waiting
from lapwing_training.store.plan import INDEX, ITEMS, LABELS, READABLE, SCHEMA_VERSION
from lapwing_training.store.rows import table_of
from lapwing_training.store.shards import ShardFile
from lapwing_training.store.table import Table


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
            table=table_of(path, index, labels["labels"]),
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
    if type(version) is not int or version not in READABLE:
        newer = type(version) is int and version > SCHEMA_VERSION
        mend = "install a newer lapwing" if newer else "extract again into a new directory"
        known = " and ".join(map(str, READABLE))
        raise StoreCorrupt(f"{path} has schema version {version}, this lapwing reads {known}; {mend}")
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
