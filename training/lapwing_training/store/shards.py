"""One file of a feature store: what was read of some items as safetensors, named by its content. Knows no labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as tensors_to

from lapwing_training.errors import StoreCorrupt
from lapwing_training.files import digest, digest_of, write_atomically
from lapwing_training.progress import waiting
from lapwing_training.store.feature_rows import Part, Stored

SAID = "log_probabilities"
"""Tensor of the log-probabilities of all items, one after the other, and what `about` calls their numbers."""

WHOLE = "shard"
"""Kind of the shards that hold features of whole texts."""

NAME = re.compile(r"(shard|stage-0\.[0-9]+)-([0-9]{5})-([0-9a-f]{16})\.safetensors")


@dataclass(frozen=True)
class Shard:
    """Features of some items, in the order in which the model read them."""

    tokens: Mapping[str, str]
    """By id, digest of the token ids that were read: an item with the same need not be read again."""

    features: Mapping[str, Part]
    """By feature id, (items that are not left out, layers, heads, width(k)) float32."""

    layers: tuple[int, ...]
    """Index in the model of each layer."""

    left_out: Mapping[str, str]
    """Reason by id, for items that have no finite features."""

    log_probabilities: Mapping[str, NDArray[np.float32]] | None = None
    """By id, of the response's tokens that something stands before; of items that are not left out. None where nobody
    kept them, as in shards of cut texts, whose tokens are the first ones of the whole."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Items that have features, a row each."""
        return tuple(id for id in self.tokens if id not in self.left_out)


@dataclass(frozen=True)
class ShardFile:
    """A shard in its place."""

    path: Path
    digest: str
    """SHA-256 of the file, whose beginning is in its name, too."""

    shard: Shard

    @property
    def number(self) -> int:
        """Its place among the shards of its kind."""
        found = NAME.fullmatch(self.path.name)
        assert found is not None
        return int(found[2])


def stage_kind(fraction: float) -> str:
    """Kind of the shards that hold features of texts cut at this fraction of the response."""
    return f"stage-{fraction}"


def tokens_digest(ids: Sequence[int]) -> str:
    """What an item's token ids are known by."""
    return digest(repr(tuple(ids)).encode())[:16]


def write_shard(directory: Path, kind: str, number: int, shard: Shard) -> ShardFile:
    """Atomically; the same shard gives the same bytes and the same name.

    Raises:
        OSError: there is no room.
    """
    about: dict[str, Any] = {"tokens": dict(shard.tokens), "layers": list(shard.layers)}
    about["left_out"] = dict(shard.left_out)
    tensors = {name: np.ascontiguousarray(_in_memory(part), dtype="<f4") for name, part in shard.features.items()}
    if shard.log_probabilities is not None:
        said = [shard.log_probabilities[id] for id in shard.ids]
        about[SAID] = [len(one) for one in said]
        tensors[SAID] = np.concatenate([*said, np.empty(0)]).astype("<f4")
    # One entry only: safetensors keeps no order among several.
    data = tensors_to(tensors, metadata={"shard": json.dumps(about, ensure_ascii=False)})
    content = digest(data)
    path = directory / shard_name(kind, number, content)
    write_atomically(path, data)
    return ShardFile(path, content, read_shard(path))


def shard_name(kind: str, number: int, content: str) -> str:
    """File name of a shard with this SHA-256."""
    return f"{kind}-{number:05d}-{content[:16]}.safetensors"


def read_shard(path: Path) -> Shard:
    """What a shard holds, its features left in the file; whether it is whole is for its digest to say.

    Raises:
        StoreCorrupt: the file is missing or no shard of ours.
    """
    try:
        with safe_open(path, "numpy"):  # which checks that the header fits the file
            described, start = _header(path)
        about = json.loads(described.pop("__metadata__")["shard"])
        said = described.pop(SAID, None)
        shard = Shard(
            tokens=dict(about["tokens"]),
            features={name: _stored(path, start, entry) for name, entry in described.items()},
            layers=tuple(about["layers"]),
            left_out=dict(about["left_out"]),
        )
        _require_rows(shard)
        if said is not None:
            shard = replace(shard, log_probabilities=_log_probabilities(path, start, said, shard.ids, about[SAID]))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise StoreCorrupt(
            f"{path} is not a readable shard ({error}); remove it and make it again with the command that made it"
        ) from None
    return shard


def shard_paths(directory: Path, kind: str) -> list[Path]:
    """Files that are called like shards of a kind, in order."""
    named = ((path, NAME.fullmatch(path.name)) for path in sorted(directory.glob(f"{kind}-*.safetensors")))
    return [path for path, name in named if name is not None and name[1] == kind]


def whole_shards(directory: Path, kind: str) -> list[ShardFile]:
    """The undamaged shards of a kind, in order; those that are damaged are passed over."""
    found = [whole_shard(path) for path in waiting(shard_paths(directory, kind), "verify")]
    return [file for file in found if file is not None]


def whole_shard(path: Path) -> ShardFile | None:
    """A shard whose content is what its name says, or nothing."""
    named = NAME.fullmatch(path.name)
    try:
        content = digest_of(path)
        whole = named is not None and content.startswith(named[3])
        return ShardFile(path, content, read_shard(path)) if whole else None
    except (OSError, StoreCorrupt):
        return None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Of a safetensors file: what it says of its tensors, and where they begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(length))), 8 + length


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    if entry["dtype"] != "F32" or len(entry["shape"]) != 4:
        raise ValueError(f"a tensor of {entry['dtype']} {entry['shape']}, expected F32 (items, layers, heads, width)")
    return Stored(path.absolute(), start + int(entry["data_offsets"][0]), tuple(entry["shape"]))


def _log_probabilities(
    path: Path, start: int, entry: Mapping[str, Any], ids: Sequence[str], counts: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    """Read at once: they are few beside the features."""
    if entry["dtype"] != "F32" or entry["shape"] != [sum(counts)] or min(counts, default=0) < 0:
        raise ValueError(f"{SAID} of {entry['dtype']} {entry['shape']}, expected F32 [{sum(counts)}]")
    values = np.fromfile(path, "<f4", sum(counts), offset=start + int(entry["data_offsets"][0]))
    parts = np.split(values.astype(np.float32), np.cumsum(counts)[:-1]) if counts else []
    return dict(zip(ids, parts, strict=True))


def _require_rows(shard: Shard) -> None:
    for name, part in shard.features.items():
        if part.shape[0] != len(shard.ids):
            raise ValueError(f"{name} has {part.shape[0]} rows for {len(shard.ids)} items")


def _in_memory(part: Part) -> Any:
    return part.open() if isinstance(part, Stored) else part
