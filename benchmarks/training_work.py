"""One step of training on a store, timed in this process; and the store that is worked on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from memory import peak_mb
from tqdm import tqdm

from lapwing_detector.identity import ModelIdentity
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.recipes.fit import LapwingRecipe, PaperRecipe
from lapwing_training.statistics.head_probes import head_probe_auroc
from lapwing_training.statistics.significance import head_significance
from lapwing_training.statistics.splits import grouped_folds
from lapwing_training.store.shards import WHOLE, Shard, write_shard
from lapwing_training.store.store import listed, read_store, write_index
from lapwing_training.store.table import Table

FEATURE = "laplacian_eigenvalues.v1"
SHARD_ITEMS = 250
PLANTED, SHIFT = 16, 0.3
"""Heads that carry signal, and how far the classes lie apart in them, in standard deviations."""

PROBE_K = 10
"""Eigenvalues of a head's own probe."""


@dataclass(frozen=True)
class Size:
    """Of a store."""

    items: int
    layers: int
    heads: int
    k: int


def significance(table: Table) -> None:
    head_significance(table.scalars((FEATURE,), table.k)[:, 0], table.labels, table.groups, errors=True)


def head_probes(table: Table) -> None:
    folds = grouped_folds(table.labels, table.groups, 5, 0)
    head_probe_auroc(table, (FEATURE,), min(PROBE_K, table.k), folds)


def lapwing(table: Table) -> None:
    LapwingRecipe((FEATURE,), None).fit(table, 0)


def paper(table: Table) -> None:
    PaperRecipe((FEATURE,)).fit(table, 0)


STEPS: dict[str, Callable[[Table], None]] = {
    "significance": significance,
    "head probes": head_probes,
    "lapwing": lapwing,
    "paper": paper,
}


def make_store(directory: Path, size: Size) -> None:
    """Eigenvalues that fall from one to the next as those of real maps do, and groups of two items."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = [f"item-{number}" for number in range(size.items)]
    labels = (rng.random(-(-size.items // 2)) < 0.4).astype(int).repeat(2)[: size.items]
    planted = rng.choice(size.layers * size.heads, min(PLANTED, size.layers * size.heads // 4), replace=False)
    files = []
    for number, start in enumerate(tqdm(range(0, size.items, SHARD_ITEMS), desc="store", unit="shard", leave=False)):
        here = slice(start, min(start + SHARD_ITEMS, size.items))
        values = _eigenvalues(rng, labels[here], planted, size)
        tokens = dict.fromkeys(ids[here], "0" * 16)
        shard = Shard(tokens, {FEATURE: values}, tuple(range(size.layers)), {})
        files.append(write_shard(directory, WHOLE, number, shard))
    write_index(directory, _entries(ids, files, size), _items(ids, labels))


def _eigenvalues(rng: np.random.Generator, labels: np.ndarray, planted: np.ndarray, size: Size) -> np.ndarray:
    """(items, layers, heads, k) descending."""
    shape = (len(labels), size.layers * size.heads)
    level = rng.standard_normal(shape, dtype=np.float32)
    level[:, planted] += SHIFT * labels[:, None]
    noise = rng.standard_normal((*shape, size.k), dtype=np.float32)
    values = 0.1 * (level[..., None] + 0.5 * noise) / np.arange(1, size.k + 1, dtype=np.float32)
    return -np.sort(-values, axis=-1).reshape(len(labels), size.layers, size.heads, size.k)


def _entries(ids: list[str], files: list, size: Size) -> dict[str, object]:
    return {
        "features": [FEATURE],
        "k": size.k,
        "layers": list(range(size.layers)),
        "heads": size.heads,
        "identity": _identity(size).to_dict(),
        "stratum": "",
        "items": {
            "id": ids,
            "group": [f"group-{number // 2}" for number in range(len(ids))],
            "split": [None] * len(ids),
            "stratum": [""] * len(ids),
            "token_count": [200] * len(ids),
            "response_tokens": [100] * len(ids),
            "log_probability": [None] * len(ids),
            "mode": ["generated"] * len(ids),
        },
        "left_out": {},
        "shards": listed(files),
        "stages": {},
    }


def _items(ids: list[str], labels: np.ndarray) -> list[LabelledGeneration]:
    return [
        LabelledGeneration(id=id, prompt="p", response="r", label=int(label))
        for id, label in zip(ids, labels, strict=True)
    ]


def _identity(size: Size) -> ModelIdentity:
    digests = {name: name[0] * 64 for name in ("architecture", "parameters", "weights", "tokenizer", "chat_template")}
    return ModelIdentity(
        name="benchmark",
        commit="",
        dtype="float32",
        quantisation="none",
        layers=size.layers,
        heads=size.heads,
        sample=(0.0,),
        **digests,
    )


def main() -> None:
    step, store = sys.argv[1:]
    start = time.perf_counter()
    STEPS[step](read_store(store).table.labelled())
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
