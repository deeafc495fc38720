"""From labelled generations to a feature store: batched forwards under capture, resumable after a kill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lapwing_detector.features import FEATURES
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.log_probabilities import LogProbabilities, read_with_log_probabilities
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import TokenIds
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import InvalidOption, StoreCorrupt
from lapwing_training.files import digest
from lapwing_training.options import ATTENTION_SCORE, LAPLACIAN, require_features
from lapwing_training.store.feature_rows import Part
from lapwing_training.store.index import finish_store
from lapwing_training.store.plan import open_plan, plan_of
from lapwing_training.store.shards import (
    WHOLE,
    Shard,
    ShardFile,
    shard_paths,
    stage_kind,
    tokens_digest,
    whole_shards,
    write_shard,
)
from lapwing_training.store.store import read_index
from lapwing_training.store.work import Length, Work, plan_work

NOT_FINITE = "attention is not finite; try --dtype float32"
NO_NUMBERS = "logits are not numbers; try --dtype float32"

Reading = tuple[AttentionSummary, LogProbabilities | None]
"""Of one text."""

DEFAULT_FEATURES = (ATTENTION_SCORE, LAPLACIAN)
DEFAULT_K = 10


@dataclass(frozen=True)
class ExtractOptions:
    """What is kept, and how the work is cut."""

    features: tuple[str, ...] = DEFAULT_FEATURES
    k: int = DEFAULT_K
    batch_size: int = 16
    shard_items: int = 256
    """Items a shard; a kill costs at most the shard that was being made."""

    stratum: str = ""
    """Field that names an item's kind, such as `meta.relation`; without one the store keeps what it has."""

    stages: tuple[float, ...] = ()
    """Fractions of the response at which the text is read, too, by forwards of its own; a store keeps what it has."""

    def __post_init__(self) -> None:
        require_features(self.features)
        for option in ("k", "batch_size", "shard_items"):
            if getattr(self, option) < 1:
                raise InvalidOption(f"{option} is {getattr(self, option)}; it must be at least 1")
        if self.stratum and not self.stratum.startswith("meta."):
            raise InvalidOption(f"stratum is `{self.stratum}`; name a field of meta, such as meta.relation")
        for fraction in self.stages:
            if not 0.01 <= fraction < 1.0 or self.stages.count(fraction) > 1:
                raise InvalidOption(f"stages holds {fraction}; expected fractions from .01 to below 1, each once")

    @property
    def needed(self) -> int:
        """Least number of tokens of an item that has all features."""
        return max(FEATURES[name].needed(self.k) for name in self.features)

    def length(self, loaded: LanguageModel) -> Length:
        """How long a text must be and may be."""
        return Length(self.k, self.needed, loaded.max_tokens)


def extract_features(
    generations: Sequence[LabelledGeneration],
    directory: Path,
    loaded: LanguageModel,
    options: ExtractOptions | None = None,
) -> dict[str, Any]:
    """Write a feature store; what an earlier run finished is kept.

    A store that holds features of all these items already, such as one that was filled while the answers were
    generated, gets only their labels, groups and texts: the model reads nothing.

    Returns:
        how many items are stored, left out and labelled.

    Raises:
        StoreMismatch: the directory was begun with something else.
        NotEnoughData: no item can be stored.
        InvalidData: an id that is used twice, or token ids outside the model's vocabulary.
        OSError: there is no room; what was finished stays.
    """
    options = _completed(options or ExtractOptions(), directory)
    work = plan_work(generations, loaded, options.length(loaded))
    texts = {fraction: work.read(fraction) for fraction in (*options.stages, 1.0)}
    held = whole_shards(directory, WHOLE)
    open_plan(directory, _plan(work, loaded, options), lacking(texts[1.0], held))
    with tqdm(total=sum(map(len, texts.values())), desc="extract", unit="item") as progress:
        extraction = Extraction(directory, loaded, options, progress)
        files = extraction.complete(WHOLE, texts.pop(1.0), held)
        stages = {
            fraction: extraction.complete(stage_kind(fraction), read, whole_shards(directory, stage_kind(fraction)))
            for fraction, read in texts.items()
            if read
        }
    return finish_store(directory, files, stages, generations, work, loaded, options)


def lacking(read: Mapping[str, TokenIds], held: Sequence[ShardFile]) -> list[str]:
    """Ids of the items whose features, of just these token ids, are in none of the shards."""
    known = {id: tokens for file in held for id, tokens in file.shard.tokens.items()}
    return [id for id, ids in read.items() if known.get(id) != tokens_digest(ids.all)]


@dataclass(frozen=True)
class Extraction:
    """Makes the shards that are not there yet."""

    directory: Path
    loaded: LanguageModel
    options: ExtractOptions
    progress: Any
    """A bar, advanced by items."""

    def complete(self, kind: str, read: Mapping[str, TokenIds], held: Sequence[ShardFile]) -> list[ShardFile]:
        """All shards of a kind, so that every item is in one of them.

        Args:
            kind: of shard.
            read: token ids by item, in order.
            held: the shards that are there.
        """
        if not lacking(read, held):
            self.progress.update(len(read))
            return list(held)
        size = self.options.shard_items
        parts = [dict(list(read.items())[start : start + size]) for start in range(0, len(read), size)]
        files = [self._shard(kind, number, part, held) for number, part in enumerate(parts)]
        for stale in set(shard_paths(self.directory, kind)) - {file.path for file in files}:
            stale.unlink()
        return files

    def _shard(self, kind: str, number: int, read: Mapping[str, TokenIds], held: Sequence[ShardFile]) -> ShardFile:
        tokens = {id: tokens_digest(ids.all) for id, ids in read.items()}
        for file in held:
            if file.number == number and file.shard.tokens == tokens:
                self.progress.update(len(read))
                return file
        readings = self._whole(list(read.values())) if kind == WHOLE else self._cut(list(read.values()))
        return write_shard(self.directory, kind, number, shard_of(tokens, readings, self.options))

    def _whole(self, texts: Sequence[TokenIds]) -> Iterator[Reading]:
        for batch in self._batches(texts):
            yield from read_with_log_probabilities(self.loaded, batch)

    def _cut(self, texts: Sequence[TokenIds]) -> Iterator[Reading]:
        """Without log-probabilities: those of the whole response serve for its beginning, too."""
        for batch in self._batches(texts):
            yield from ((summary, None) for summary in self.loaded.summaries([ids.all for ids in batch]))

    def _batches(self, texts: Sequence[TokenIds]) -> Iterator[Sequence[TokenIds]]:
        for start in range(0, len(texts), self.options.batch_size):
            batch = texts[start : start + self.options.batch_size]
            yield batch
            self.progress.update(len(batch))


def shard_of(
    tokens: Mapping[str, str],
    readings: Iterable[Reading],
    options: ExtractOptions,
    left_out: Mapping[str, str] | None = None,
) -> Shard:
    """What was read of the items whose numbers are finite.

    Args:
        tokens: digest of the token ids of each item, by id.
        readings: one for each of them; all have log-probabilities, or none.
        options: which features.
        left_out: reason by id, for items that are passed over.
    """
    reasons = dict(left_out or {})
    rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in options.features}
    said: dict[str, NDArray[np.float32] | None] = {}
    shape: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    for id, (summary, log_probabilities) in zip(tokens, readings, strict=True):
        shape, layers = summary.diagonal.shape[:2], summary.layers
        if id in reasons:
            continue
        values = {name: FEATURES[name].compute(summary, options.k) for name in options.features}
        if not all(np.isfinite(one).all() for one in values.values()):
            reasons[id] = NOT_FINITE
        elif log_probabilities is not None and np.isnan(log_probabilities).any():
            reasons[id] = NO_NUMBERS
        else:
            said[id] = log_probabilities
            for name, one in values.items():
                rows[name].append(one)
    features: dict[str, Part] = {  # each (items, layers, heads, width)
        name: np.array(kept, np.float32).reshape(len(kept), *shape, FEATURES[name].width(options.k))
        for name, kept in rows.items()
    }
    known = {id: one for id, one in said.items() if one is not None}
    return Shard(tokens, features, layers, reasons, known if len(known) == len(said) else None)


def _completed(options: ExtractOptions, directory: Path) -> ExtractOptions:
    """With what a finished store has and was not asked for again, so that relabelling loses nothing."""
    try:
        index, _ = read_index(directory)
        stages = sorted({*options.stages, *map(float, index["stages"])})
        return replace(options, stratum=options.stratum or index["stratum"], stages=tuple(stages))
    except (StoreCorrupt, LookupError, TypeError, ValueError):  # none, or not ours: then it is written anew
        return options


def _plan(work: Work, loaded: LanguageModel, options: ExtractOptions) -> dict[str, Any]:
    items = repr([(id, ids.prompt_ids, ids.response_ids) for id, ids in work.tokens.items()])
    return plan_of(
        loaded.identity,
        options.features,
        options.k,
        items=digest(items.encode()),
        batch_size=options.batch_size,
        shard_items=options.shard_items,
    )
