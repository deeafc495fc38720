"""The last step of a feature store: what is said of its items, besides their features."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapwing_detector.language_model import LanguageModel
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import InvalidData, NotEnoughData
from lapwing_training.store.shards import ShardFile
from lapwing_training.store.store import listed, write_index
from lapwing_training.store.work import Work, is_own

if TYPE_CHECKING:
    from lapwing_training.store.extract import ExtractOptions


def finish_store(
    directory: Path,
    files: Sequence[ShardFile],
    stages: Mapping[float, Sequence[ShardFile]],
    generations: Sequence[LabelledGeneration],
    work: Work,
    loaded: LanguageModel,
    options: ExtractOptions,
) -> dict[str, Any]:
    """Write texts, labels and index.

    Args:
        directory: of the store.
        files: shards that hold the features of all items.
        stages: shards of the texts cut at a fraction of the response.
        generations: the items; those without features are listed with the reason.
        work: what was read of them.
        loaded: the model.
        options: features, k and stratum.

    Returns:
        how many items are stored, left out and labelled.

    Raises:
        NotEnoughData: none has features.
        InvalidData: a log-probability that is no number.
    """
    found = {id: reason for file in files for id, reason in file.shard.left_out.items() if id in work.tokens}
    left_out = {**work.left_out, **found}
    items = [item for item in generations if item.id not in left_out]
    if not items:
        id, reason = list(left_out.items())[-1]  # of the attention, if any came so far
        raise NotEnoughData(f"none of {len(generations)} items can be stored, such as `{id}`: {reason}")
    layers = files[0].shard.layers
    heads = files[0].shard.features[options.features[0]].shape[2]
    entries = {
        "features": list(options.features),
        "k": options.k,
        "layers": list(layers),
        "heads": heads,
        "identity": loaded.identity.to_dict(),
        "stratum": options.stratum,
        "items": _columns(items, work, loaded, options.stratum, _means(files)),
        "left_out": left_out,
        "shards": listed(files),
        "stages": {str(fraction): listed(stages[fraction]) for fraction in sorted(stages)},
    }
    write_index(directory, entries, items)
    return {
        "store": str(directory),
        "items": len(items),
        "left_out": len(left_out),
        "labelled": sum(item.label is not None for item in items),
        "hallucinated": sum(item.label == 1 for item in items),
        "layers": len(layers),
        "heads": heads,
    }


def is_written_by(item: LabelledGeneration, loaded: LanguageModel) -> bool:
    """Whether what the item kept, if it did, is of this model and its tokenizer."""
    mine = loaded.identity.digest[:12]
    return is_own(item, loaded) and item.generation.get("model", mine) == mine


def log_probability_of(item: LabelledGeneration, loaded: LanguageModel) -> float | None:
    """Mean token log-probability that this model kept while generating; None where there is none.

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
    return kept if is_written_by(item, loaded) else None


def stratum_of(item: LabelledGeneration, stratum: str) -> str:
    """Value of the named field of `meta`; empty where it is absent."""
    value = item.meta.get(stratum.removeprefix("meta.")) if stratum else None
    return "" if value is None else str(value)


def mode_in(item: LabelledGeneration, loaded: LanguageModel) -> str | None:
    """How the response came to this model: what another model generated is supplied to this one."""
    return "supplied" if item.mode == "generated" and not is_written_by(item, loaded) else item.mode


def _means(files: Sequence[ShardFile]) -> dict[str, float]:
    """Mean log-probability of the response's tokens, by id, as it was found in reading them."""
    said = {id: one for file in files for id, one in (file.shard.log_probabilities or {}).items()}
    return {id: float(one.mean(dtype=np.float64)) for id, one in said.items() if len(one) and np.isfinite(one).all()}


def _columns(
    items: Sequence[LabelledGeneration],
    work: Work,
    loaded: LanguageModel,
    stratum: str,
    means: Mapping[str, float],
) -> dict[str, list[Any]]:
    tokens = [work.tokens[item.id] for item in items]
    kept = [log_probability_of(item, loaded) for item in items]
    return {
        "id": [item.id for item in items],
        "group": [item.group_or_prompt for item in items],
        "split": [item.split for item in items],
        "stratum": [stratum_of(item, stratum) for item in items],
        "token_count": [len(ids.all) for ids in tokens],
        "response_tokens": [len(ids.response_ids) for ids in tokens],
        # What was kept while it was written comes first: relabelling an old store changes nothing.
        "log_probability": [means.get(item.id) if own is None else own for item, own in zip(items, kept, strict=True)],
        "mode": [mode_in(item, loaded) for item in items],
    }
