"""Several feature stores, such as of several machines, put together into one. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwing_detector.identity import ModelIdentity
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import InvalidOption, StoreMismatch
from lapwing_training.files import copy_atomically, digest_of
from lapwing_training.progress import waiting
from lapwing_training.store.plan import open_plan, plan_of
from lapwing_training.store.rows import COLUMNS
from lapwing_training.store.shards import NAME, read_shard, shard_name
from lapwing_training.store.store import Store, read_index, read_items, read_store, write_index

SAME = ("features", "k", "stages", "layers", "heads", "stratum")
"""Entries of the index that all stores must agree on."""


@dataclass(frozen=True)
class Part:
    """One of the stores."""

    path: Path
    store: Store
    index: Mapping[str, Any]
    items: Mapping[str, LabelledGeneration]

    @classmethod
    def read(cls, path: Path) -> Part:
        """A finished store, verified."""
        return cls(path, read_store(path), read_index(path)[0], read_items(path))

    def said(self, name: str) -> Any:
        """An entry of the index in a form that can be compared."""
        value = self.index[name]
        return sorted(value) if name in ("features", "stages") else value


def merge_stores(stores: Sequence[Path], out: Path) -> dict[str, Any]:
    """One store with the items of all, in the order of the stores; the same stores give the same bytes.

    Args:
        stores: at least two finished ones, of the same model, features, k and stages, without common items.
        out: a new directory; one that a killed run left half full is gone on with.

    Returns:
        how many items there are, and how many of them are labelled.

    Raises:
        InvalidOption: fewer than two stores.
        StoreMismatch: they do not belong together, or `out` holds something else.
        StoreCorrupt: one of them is damaged or unfinished.
        OSError: there is no room.
    """
    if len(stores) < 2:
        raise InvalidOption(f"{len(stores)} store given; expected at least two to put together")
    parts = [Part.read(Path(path)) for path in stores]
    for part in parts[1:]:
        require_same(parts[0], part)
    require_disjoint(parts)
    first = parts[0].index
    identity = ModelIdentity.from_dict(first["identity"])
    merged = [part.store.digest for part in parts]
    open_plan(out, plan_of(identity, first["features"], first["k"], merged=merged))
    fractions = sorted(first["stages"], key=float)
    entries = {
        **{name: first[name] for name in ("features", "k", "layers", "heads", "identity", "stratum")},
        "items": {name: [one for part in parts for one in part.index["items"][name]] for name in COLUMNS},
        "left_out": _left_out(parts),
        "shards": _copied([(part.path, part.index["shards"]) for part in parts], out),
        "stages": {
            fraction: _copied([(part.path, part.index["stages"][fraction]) for part in parts], out)
            for fraction in fractions
        },
    }
    items = [item for part in parts for item in part.items.values()]
    write_index(out, entries, items)
    labelled = sum(item.label is not None for item in items)
    return {"store": str(out), "stores": len(parts), "items": len(items), "labelled": labelled}


def require_same(first: Part, other: Part) -> None:
    """Both hold the same features of the same model.

    Raises:
        StoreMismatch: they do not; names what differs with both values.
    """
    mine, theirs = (ModelIdentity.from_dict(part.index["identity"]) for part in (first, other))
    different: list[tuple[str, Any, Any]] = [*mine.differences(theirs)]
    different += [("dtype", mine.dtype, theirs.dtype)] if mine.dtype != theirs.dtype else []
    different += [(name, first.said(name), other.said(name)) for name in SAME if first.said(name) != other.said(name)]
    for name, here, there in different:
        raise StoreMismatch(
            f"{name} is {str(here)[:80]} in {first.path} and {str(there)[:80]} in {other.path}; only stores of the "
            "same model with the same features, k, stages and stratum can be put together: extract one of them again"
        )


def require_disjoint(parts: Sequence[Part]) -> None:
    """No item lies in two stores, not even one that the index does not list.

    Raises:
        StoreMismatch: one does; names it with both stores.
    """
    where: dict[str, Path] = {}
    for part in parts:
        for name in part.index["shards"]:
            for id in read_shard(part.path / name).tokens:
                if id in where:
                    raise StoreMismatch(
                        f"item `{id}` lies in {where[id]} and in {part.path}; an item belongs into one store: give "
                        "the items of one of them other ids, or leave it out"
                    )
                where[id] = part.path


def _left_out(parts: Sequence[Part]) -> dict[str, str]:
    stored = {id for part in parts for id in part.index["items"]["id"]}
    found = {id: reason for part in parts for id, reason in part.index["left_out"].items()}
    return {id: reason for id, reason in found.items() if id not in stored}


def _copied(shards: Sequence[tuple[Path, Mapping[str, str]]], out: Path) -> dict[str, str]:
    """Copy shards of one kind, numbered anew; SHA-256 by their new names."""
    listed = [(path / name, content) for path, names in shards for name, content in names.items()]
    copied = {}
    for number, (source, content) in enumerate(waiting(listed, "copy")):
        named = NAME.fullmatch(source.name)
        assert named is not None
        name = shard_name(named[1], number, content)
        if not (out / name).exists() or digest_of(out / name) != content:
            copy_atomically(source, out / name)
        copied[name] = content
    return copied
