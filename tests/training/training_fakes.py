"""Small real things for the training tests: tables with planted signal, stores, a tiny model with its tokenizer."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from lapwing_detector.identity import ModelIdentity
from lapwing_detector.token_statistics import token_statistics
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.store.plan import open_plan, plan_of
from lapwing_training.store.prefix import Prefix, response_cut
from lapwing_training.store.shards import WHOLE, Shard, stage_kind, tokens_digest, write_shard
from lapwing_training.store.store import listed, write_index
from lapwing_training.store.table import UNKNOWN, Table

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
    stages: tuple[float, ...] = (),
    response_tokens: bool = True,
    said: bool = False,
) -> Table:
    """Noise in every head, and a shift of `strength` standard deviations in the planted ones (flat indices).

    With `per_group` > 1 the rows of a group share their label, and `group_effect` of every head's noise. Half of the
    tokens are the response's; at each of the `stages` that fraction of the final signal is there, the rest is noise of
    its own, and a text of fewer than 12 tokens has no features. With `said` there are statistics of `fake_said`.
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
    table = Table(
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
    if not response_tokens:
        return table
    table = replace(table, response_tokens=table.token_counts // 2)
    if said:
        table = replace(table, token_statistics=statistics_of(table, np.arange(rows), table.response_tokens))
    return replace(table, prefixes={fraction: make_prefix(table, core, fraction, seed) for fraction in stages})


def fake_said(table: Table, row: int) -> np.ndarray:
    """Log-probabilities of the response's tokens, of the table's mean where that is no more than 0; by id."""
    parts = np.random.default_rng(zlib.crc32(table.ids[row].encode())).exponential(size=table.response_tokens[row])
    mean = min(float(np.nan_to_num(table.log_probabilities[row])), -0.01)
    return (mean * parts / parts.mean()).astype(np.float32)


def statistics_of(table: Table, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of the first so many tokens of each row."""
    return np.array([token_statistics(fake_said(table, row)[:cut]) for row, cut in zip(rows, tokens, strict=True)])


def make_prefix(table: Table, core: np.ndarray, fraction: float, seed: int) -> Prefix:
    rng = np.random.default_rng([seed, int(1000 * fraction)])
    cut = np.array([response_cut(fraction, tokens) for tokens in table.response_tokens.tolist()])
    tokens = table.token_counts - table.response_tokens + cut
    rows = np.flatnonzero(tokens >= 12)
    values = fraction * core[rows] + np.sqrt(1 - fraction**2) * rng.normal(size=core[rows].shape)
    ranked = -np.sort(-0.1 * values - 0.05 * rng.normal(size=(len(rows), core.shape[1], table.k)), axis=-1)
    features = {SCORE: 0.3 * values - 4.0, LAPLACIAN: ranked}
    shaped = {name: one.reshape(len(rows), *table.shape, -1).astype(np.float32) for name, one in features.items()}
    said = None if table.token_statistics is None else statistics_of(table, rows, cut[rows])
    return Prefix(rows, tokens[rows], cut[rows], shaped, said)


def write_store(
    directory: Path, table: Table, model: ModelIdentity | None = None, shard_rows: int = 200, mode: str = "generated"
) -> Path:
    """A finished store that holds this table, its prefixes too; the texts are made up."""
    layers, heads = table.shape
    known = model or identity(layers=layers, heads=heads)
    open_plan(directory, plan_of(known, table.feature_names, table.k, made="by a test"))
    response = table.token_counts // 2 if table.response_tokens is None else table.response_tokens
    stages = {}
    for fraction in table.stages:
        cut, _ = table.at_stage(fraction)
        stages[str(fraction)] = write_shards(directory, stage_kind(fraction), cut, shard_rows)
    entries = {
        "features": list(table.feature_names),
        "k": table.k,
        "layers": list(range(layers)),
        "heads": heads,
        "identity": known.to_dict(),
        "stratum": "meta.relation",
        "items": {
            "id": table.ids.tolist(),
            "group": table.groups.tolist(),
            "split": [split or None for split in table.splits.tolist()],
            "stratum": table.strata.tolist(),
            "token_count": table.token_counts.tolist(),
            "response_tokens": response.tolist(),
            "log_probability": [None if np.isnan(value) else value for value in table.log_probabilities.tolist()],
            "mode": [mode] * len(table),
        },
        "left_out": {},
        "shards": write_shards(directory, WHOLE, table, shard_rows),
        "stages": stages,
    }
    write_index(directory, entries, [fake_item(table, row, mode) for row in range(len(table))])
    return directory


def write_shards(directory: Path, kind: str, table: Table, shard_rows: int) -> dict[str, str]:
    files = []
    for number, start in enumerate(range(0, len(table), shard_rows)):
        part = table.take(np.arange(start, min(start + shard_rows, len(table))))
        tokens = {str(id): tokens_digest([count]) for id, count in zip(part.ids, part.token_counts, strict=True)}
        features = {name: part.feature(name, part.k) for name in part.feature_names}
        said = {str(id): fake_said(part, row) for row, id in enumerate(part.ids)}
        kept = said if kind == WHOLE and part.token_statistics is not None else None
        files.append(
            write_shard(directory, kind, number, Shard(tokens, features, tuple(range(table.shape[0])), {}, kept))
        )
    return listed(files)


def fake_item(table: Table, row: int, mode: str) -> LabelledGeneration:
    label = int(table.labels[row])
    return LabelledGeneration(
        id=str(table.ids[row]),
        prompt=f"what is {table.ids[row]}?",
        response=f"it is {table.groups[row]}, and <b>not</b> & {row}",
        label=None if label == UNKNOWN else label,
        group=str(table.groups[row]),
        split=str(table.splits[row]) or None,
        meta={"relation": str(table.strata[row])},
        model="tiny",
        mode=mode,
    )


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
