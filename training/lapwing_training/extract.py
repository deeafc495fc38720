"""From labelled generations to a feature store: batched forwards under capture, resumable after a kill."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lapwing_detector.features import FEATURES
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.language_model import LanguageModel
from lapwing_training.errors import InvalidData, InvalidOption, NotEnoughData
from lapwing_training.files import digest
from lapwing_training.generate import ids_of
from lapwing_training.generations import LabelledGeneration
from lapwing_training.options import ATTENTION_SCORE, LAPLACIAN, require_features
from lapwing_training.progress import waiting
from lapwing_training.store import (
    Shard,
    is_shard,
    open_plan,
    read_shard,
    shard_digests,
    shard_name,
    write_index,
    write_shard,
)

NOT_FINITE = "attention is not finite; try --dtype float32"

DEFAULT_FEATURES = (ATTENTION_SCORE, LAPLACIAN)


@dataclass(frozen=True)
class ExtractOptions:
    """What is kept, and how the work is cut."""

    features: tuple[str, ...] = DEFAULT_FEATURES
    k: int = 10
    batch_size: int = 16
    shard_items: int = 256
    """Items a shard; a kill costs at most the shard that was being made."""

    stratum: str = ""
    """Field that names an item's kind, such as `meta.relation`."""

    def __post_init__(self) -> None:
        require_features(self.features)
        for option in ("k", "batch_size", "shard_items"):
            if getattr(self, option) < 1:
                raise InvalidOption(f"{option} is {getattr(self, option)}; it must be at least 1")
        if self.stratum and not self.stratum.startswith("meta."):
            raise InvalidOption(f"stratum is `{self.stratum}`; name a field of meta, such as meta.relation")

    @property
    def needed(self) -> int:
        """Least number of tokens of an item that has all features."""
        return max(FEATURES[name].needed(self.k) for name in self.features)


@dataclass(frozen=True)
class Work:
    """Which items are worked off in which order; the same input gives the same plan."""

    token_ids: Mapping[str, tuple[int, ...]]
    """By id, shortest first, so that a batch holds little padding."""

    left_out: Mapping[str, str]
    """Reason by id."""

    def shards(self, size: int) -> Iterator[tuple[str, ...]]:
        """Ids, cut into shards."""
        ids = list(self.token_ids)
        return (tuple(ids[start : start + size]) for start in range(0, len(ids), size))


def extract_features(
    generations: Sequence[LabelledGeneration],
    directory: Path,
    loaded: LanguageModel,
    options: ExtractOptions | None = None,
) -> dict[str, Any]:
    """Write a feature store; finished shards of an earlier run with the same input are kept.

    Returns:
        how many items are stored, left out and labelled.

    Raises:
        StoreMismatch: the directory was begun with something else.
        NotEnoughData: no item can be stored.
        InvalidData: token ids outside the model's vocabulary.
    """
    options = options or ExtractOptions()
    identity = loaded.identity
    work = plan_work(generations, loaded, identity, options)
    open_plan(directory, _plan(work, identity, options))
    shards = list(work.shards(options.shard_items))
    with tqdm(total=len(work.token_ids), desc="extract", unit="item") as progress:
        for number, ids in enumerate(shards):
            path = directory / shard_name(number)
            if not is_shard(path, ids):
                write_shard(path, _make_shard(ids, work, loaded, options, progress))
            else:
                progress.update(len(ids))
    return _finish(directory, len(shards), generations, work, identity, options)


def plan_work(
    generations: Sequence[LabelledGeneration], loaded: LanguageModel, identity: ModelIdentity, options: ExtractOptions
) -> Work:
    """Token ids of every item that has all features, and why the others have not."""
    kept: dict[str, tuple[int, ...]] = {}
    left_out: dict[str, str] = {}
    most = loaded.max_tokens
    for item in waiting(generations):
        ids = token_ids_of(item, loaded, identity.tokenizer)
        if len(ids) < options.needed:
            left_out[item.id] = f"{len(ids)} tokens; k = {options.k} needs at least {options.needed}"
        elif len(ids) > most:
            left_out[item.id] = f"{len(ids)} tokens; the model reads at most {most}"
        else:
            kept[item.id] = ids
    if not kept:
        reason = next(iter(left_out.values()))
        raise NotEnoughData(f"none of {len(generations)} items can be stored, the first because of {reason}; lower --k")
    return Work(dict(sorted(kept.items(), key=lambda entry: len(entry[1]))), left_out)


def token_ids_of(item: LabelledGeneration, loaded: LanguageModel, tokenizer_digest: str) -> tuple[int, ...]:
    """Prompt and response as ids: those that were kept while generating, or else made from the text.

    Kept ids are passed over when `generation.tokenizer` says that another tokenizer made them.

    Raises:
        InvalidData: ids outside the model's vocabulary.
    """
    kept = item.generation.get("token_ids")
    if kept is None or not tokenizer_digest.startswith(str(item.generation.get("tokenizer", ""))):
        return ids_of(item, loaded, item.response).all
    known = range(loaded.vocabulary)
    wrong = [id for id in kept if type(id) is not int or id not in known] if isinstance(kept, list) else [kept]
    if wrong:
        raise InvalidData(
            f"item `{item.id}`",
            None,
            f"generation.token_ids holds {wrong[0]!r}; expected a list of ids from 0 to {known[-1]}: drop the ids of "
            "another model, then the text is used",
        )
    return tuple(kept)


def log_probability_of(item: LabelledGeneration) -> float | None:
    """Mean token log-probability that was kept while generating; None where there is none.

    Raises:
        InvalidData: it is no finite number.
    """
    kept = item.generation.get("log_probability")
    # Not isfinite(): it overflows for an integer that is too large for a float.
    if kept is not None and (type(kept) not in (int, float) or not abs(kept) < sys.float_info.max):
        shown = repr(kept)[:40]
        raise InvalidData(
            f"item `{item.id}`", None, f"generation.log_probability is {shown}; expected a number or null"
        )
    return kept


def stratum_of(item: LabelledGeneration, stratum: str) -> str:
    """Value of the named field of `meta`; empty where it is absent."""
    value = item.meta.get(stratum.removeprefix("meta.")) if stratum else None
    return "" if value is None else str(value)


def _make_shard(ids: Sequence[str], work: Work, loaded: LanguageModel, options: ExtractOptions, progress: Any) -> Shard:
    layers: tuple[int, ...] = ()
    computed: dict[str, list[Any]] = {name: [] for name in options.features}
    for start in range(0, len(ids), options.batch_size):
        batch = ids[start : start + options.batch_size]
        for summary in loaded.summaries([work.token_ids[id] for id in batch]):
            layers = summary.layers
            for name, rows in computed.items():
                rows.append(FEATURES[name].compute(summary, options.k))
        progress.update(len(batch))
    features = {name: np.stack(rows) for name, rows in computed.items()}  # (items, layers, heads, width)
    finite = np.all([np.isfinite(values).all(axis=(1, 2, 3)) for values in features.values()], axis=0)  # (items,)
    return Shard(
        ids=tuple(id for id, kept in zip(ids, finite, strict=True) if kept),
        features={name: values[finite] for name, values in features.items()},
        layers=layers,
        left_out={id: NOT_FINITE for id, kept in zip(ids, finite, strict=True) if not kept},
    )


def _plan(work: Work, identity: ModelIdentity, options: ExtractOptions) -> dict[str, Any]:
    items = repr(list(work.token_ids.items())).encode()
    return {
        "items": digest(items),
        "model": identity.digest,
        "dtype": identity.dtype,
        "features": list(options.features),
        "k": options.k,
        "batch_size": options.batch_size,
        "shard_items": options.shard_items,
    }


def _finish(
    directory: Path,
    shards: int,
    generations: Sequence[LabelledGeneration],
    work: Work,
    identity: ModelIdentity,
    options: ExtractOptions,
) -> dict[str, Any]:
    names = [shard_name(number) for number in range(shards)]
    made = [read_shard(directory / name) for name in names]
    left_out = {**work.left_out, **{id: reason for shard in made for id, reason in shard.left_out.items()}}
    stored = [item for item in generations if item.id not in left_out]
    if not stored:
        id, reason = list(left_out.items())[-1]  # of the attention, if any came so far
        raise NotEnoughData(f"none of {len(generations)} items can be stored, such as `{id}`: {reason}")
    shape = made[0].features[options.features[0]].shape
    entries = {
        "features": list(options.features),
        "k": options.k,
        "layers": list(made[0].layers),
        "heads": shape[2],
        "identity": identity.to_dict(),
        "stratum": options.stratum,
        "items": {
            "id": [item.id for item in stored],
            "group": [item.group_or_prompt for item in stored],
            "split": [item.split for item in stored],
            "stratum": [stratum_of(item, options.stratum) for item in stored],
            "token_count": [len(work.token_ids[item.id]) for item in stored],
            "log_probability": [log_probability_of(item) for item in stored],
        },
        "left_out": left_out,
        "shards": shard_digests(directory, names),
    }
    labels = {item.id: item.label for item in stored}
    write_index(directory, entries, labels)
    return {
        "store": str(directory),
        "items": len(stored),
        "left_out": len(left_out),
        "labelled": sum(label is not None for label in labels.values()),
        "hallucinated": sum(label == 1 for label in labels.values()),
        "layers": len(made[0].layers),
        "heads": shape[2],
    }
