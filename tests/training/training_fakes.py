"""Small real things for the training tests: tables with planted signal, stores, a tiny model with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lapwing_detector.identity import ModelIdentity
from lapwing_training.store import Shard, open_plan, shard_digests, shard_name, write_index, write_shard
from lapwing_training.table import UNKNOWN, Table

SCORE, LAPLACIAN = "attention_score.v1", "laplacian_eigenvalues.v1"
WORDS = ["the", "capital", "of", "france", "is", "paris", "rome", "berlin", "oslo", "where", "city", "in", "river"]


def identity(weights: str = "c", layers: int = 4, heads: int = 4) -> ModelIdentity:
    return ModelIdentity(
        name="tiny",
        commit="",
        architecture="a" * 64,
        parameters="b" * 64,
        weights=weights * 64,
        dtype="float32",
        quantisation="none",
        tokenizer="d" * 64,
        chat_template="e" * 64,
        layers=layers,
        heads=heads,
        sample=(0.5, -0.25),
    )


def make_table(
    rows: int = 600,
    layers: int = 4,
    heads: int = 4,
    k: int = 4,
    planted: tuple[int, ...] = (),
    strength: float = 1.0,
    per_group: int = 1,
    group_effect: float = 0.0,
    seed: int = 0,
) -> Table:
    """Noise in every head, and a shift of `strength` standard deviations in the planted ones (flat indices).

    With `per_group` > 1 the rows of a group share their label, and `group_effect` of every head's noise.
    """
    rng = np.random.default_rng(seed)
    groups = np.arange(rows) // per_group
    labels = (rng.random(groups[-1] + 1) < 0.4).astype(np.int8)[groups]
    shape = (rows, layers * heads, 1)
    shared = rng.normal(size=(groups[-1] + 1, layers * heads, 1))[groups]
    core = np.sqrt(1 - group_effect) * rng.normal(size=shape) + np.sqrt(group_effect) * shared
    for head in planted:
        core[:, head] += strength * labels[:, None]
    values = core + 0.5 * rng.normal(size=(rows, layers * heads, k))
    scores = core + 0.5 * rng.normal(size=shape)
    return Table(
        ids=np.array([f"q{row}" for row in range(rows)]),
        groups=np.array([f"g{group}" for group in groups]),
        labels=labels,
        splits=np.full(rows, "", dtype=np.str_),
        strata=np.array([f"r{row % 3}" for row in range(rows)]),
        token_counts=rng.integers(10, 40, rows),
        log_probabilities=-1.0 - 0.5 * labels + rng.normal(size=rows),
        features={
            SCORE: (0.3 * scores - 4.0).reshape(rows, layers, heads, 1).astype(np.float32),
            LAPLACIAN: -np.sort(-0.1 * values, axis=-1).reshape(rows, layers, heads, k).astype(np.float32),
        },
        k=k,
    )


def write_store(directory: Path, table: Table, model: ModelIdentity | None = None, shard_rows: int = 200) -> Path:
    """A finished store that holds this table."""
    open_plan(directory, {"made": "by a test"})
    layers, heads = table.shape
    names = []
    for number, start in enumerate(range(0, len(table), shard_rows)):
        part = table.take(np.arange(start, min(start + shard_rows, len(table))))
        names.append(shard_name(number))
        shard = Shard(tuple(str(id) for id in part.ids), part.features, tuple(range(layers)), {})
        write_shard(directory / names[-1], shard)
    log_probabilities = [None if np.isnan(value) else value for value in table.log_probabilities.tolist()]
    entries = {
        "features": list(table.features),
        "k": table.k,
        "layers": list(range(layers)),
        "heads": heads,
        "identity": (model or identity(layers=layers, heads=heads)).to_dict(),
        "stratum": "meta.relation",
        "items": {
            "id": table.ids.tolist(),
            "group": table.groups.tolist(),
            "split": [split or None for split in table.splits.tolist()],
            "stratum": table.strata.tolist(),
            "token_count": table.token_counts.tolist(),
            "log_probability": log_probabilities,
        },
        "left_out": {},
        "shards": shard_digests(directory, names),
    }
    labels = [None if label == UNKNOWN else label for label in table.labels.tolist()]
    write_index(directory, entries, dict(zip(table.ids.tolist(), labels, strict=True)))
    return directory


def save_tiny_model(directory: Path, seed: int = 0) -> Path:
    """A random Llama of two layers and four heads with a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # With the default of .02 attention is so flat that every head says the same.
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
