"""Items of a few words, and what eager attention says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from training_fakes import WORDS

from lapwing_detector.language_model import LanguageModel
from lapwing_detector.summary import AttentionSummary
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.store.extract import ExtractOptions
from lapwing_training.store.shards import WHOLE, read_shard, shard_paths, write_shard

OPTIONS = ExtractOptions(k=4, batch_size=3, shard_items=8, stratum="meta.kind")


def items(count: int = 30) -> list[LabelledGeneration]:
    rng = np.random.default_rng(0)
    return [
        LabelledGeneration(
            id=f"i{number}",
            prompt=" ".join(rng.choice(WORDS, rng.integers(1, 9))),
            response=" ".join(rng.choice(WORDS, rng.integers(1, 6))),
            label=number % 2,
            group=f"g{number // 2}",
            meta={"kind": f"k{number % 3}"},
            generation={"log_probability": -0.5 - number},
        )
        for number in range(count)
    ]


def eager(loaded: LanguageModel, text: str) -> AttentionSummary:
    """Both sums from the maps themselves, one item at a time."""
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    loaded.model.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = loaded.model(ids, output_attentions=True).attentions
    loaded.model.set_attn_implementation("sdpa")
    stacked = torch.stack([layer[0] for layer in maps]).float()
    diagonal, received = stacked.diagonal(dim1=-2, dim2=-1), stacked.sum(dim=-2)
    return AttentionSummary(diagonal.numpy(), received.numpy(), (0, 1))


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def without_log_probabilities(store: Path) -> None:
    """What a lapwing that knew nothing of them would have left."""
    index = json.loads((store / "index.json").read_text())
    for place, kind in (
        (index["shards"], WHOLE),
        *((index["stages"][name], f"stage-{name}") for name in index["stages"]),
    ):
        for path in shard_paths(store, kind):
            shard, number = read_shard(path), int(path.name.split("-")[-2])
            features = {name: rows.open().copy() for name, rows in shard.features.items()}
            path.unlink()
            written = write_shard(store, kind, number, replace(shard, features=features, log_probabilities=None))
            place.pop(path.name)
            place[written.path.name] = written.digest
    for name, content in (
        ("index.json", index),
        ("labels.json", json.loads((store / "labels.json").read_text())),
        ("plan.json", json.loads((store / "plan.json").read_text())),
    ):
        (store / name).write_text(json.dumps(content | {"schema_version": 2}))
