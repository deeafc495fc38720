from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fakes import LAPLACIAN, SCORE, WORDS

from lapwing_detector.features import FEATURES
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.summary import AttentionSummary
from lapwing_training.errors import InvalidData, InvalidOption, NotEnoughData, StoreMismatch
from lapwing_training.extract import ExtractOptions, extract_features
from lapwing_training.generations import LabelledGeneration, write_generations
from lapwing_training.store import read_shard, read_store, shard_name

OPTIONS = ExtractOptions(k=4, batch_size=3, shard_items=8, stratum="meta.kind")


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(str(tiny_model))


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


def test_stored_features_equal_those_of_eager_attention(loaded: LanguageModel, tmp_path: Path) -> None:
    told = extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    table = read_store(tmp_path / "store").table
    assert told["items"] + told["left_out"] == 30
    assert 0 < told["left_out"] < 15  # short ones
    by_id = {item.id: item for item in items()}
    for row, id in enumerate(table.ids):
        item = by_id[str(id)]
        summary = eager(loaded, f"{item.prompt} {item.response}")
        assert table.token_counts[row] == summary.token_count
        for name in (SCORE, LAPLACIAN):
            # float32 softmax in another order of summation.
            np.testing.assert_allclose(table.features[name][row], FEATURES[name].compute(summary, 4), atol=2e-5)
        assert table.labels[row] == item.label
        assert table.groups[row] == item.group
        assert table.strata[row] == item.meta["kind"]
        assert table.log_probabilities[row] == item.generation["log_probability"]


def test_items_too_short_or_too_long_are_listed_and_never_padded(loaded: LanguageModel, tmp_path: Path) -> None:
    short = LabelledGeneration(id="short", prompt="paris", response="is", label=0)
    long = LabelledGeneration(id="long", prompt="paris " * 70, response="is", label=0)
    extract_features([short, *items(9), long], tmp_path / "store", loaded, OPTIONS)
    store = read_store(tmp_path / "store")
    assert store.left_out["short"] == "3 tokens; k = 4 needs at least 4"
    assert store.left_out["long"] == "72 tokens; the model reads at most 64"
    assert not {"short", "long"} & set(store.table.ids)
    with pytest.raises(NotEnoughData, match="lower --k"):
        extract_features([short], tmp_path / "none", loaded, OPTIONS)


def test_kept_token_ids_are_used_unless_another_tokenizer_made_them(loaded: LanguageModel, tmp_path: Path) -> None:
    item = LabelledGeneration(
        id="a", prompt="paris", response="is", label=0, generation={"token_ids": [0, 5, 6, 7, 8, 9]}
    )
    foreign = replace(
        item, id="b", prompt="paris is in france", generation={**item.generation, "tokenizer": "0123456789ab"}
    )
    extract_features([item, foreign], tmp_path / "store", loaded, OPTIONS)
    assert read_store(tmp_path / "store").table.token_counts.tolist() == [6, 6]
    wrong = replace(item, generation={"token_ids": [0, 5, 6, 7, 99]})
    with pytest.raises(InvalidData, match=r"item `a`: generation.token_ids holds 99"):
        extract_features([wrong], tmp_path / "other", loaded, OPTIONS)


@pytest.mark.parametrize(
    "generation",
    [
        {"log_probability": "low"},
        {"log_probability": float("nan")},
        {"log_probability": 10**400},
        {"token_ids": 7},
        {"token_ids": [True, 5]},
    ],
)
def test_what_the_item_kept_is_checked(loaded: LanguageModel, tmp_path: Path, generation: dict[str, object]) -> None:
    item = LabelledGeneration(id="a", prompt="the capital of france", response="is", generation=generation)
    with pytest.raises(InvalidData, match=r"item `a`: generation\."):
        extract_features([item], tmp_path / "store", loaded, OPTIONS)


def test_an_item_without_finite_attention_is_listed(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LanguageModel.summaries

    def broken(model: LanguageModel, batch: list[tuple[int, ...]]) -> list[AttentionSummary]:
        summaries = plain(model, batch)
        summaries[0].diagonal[0, 0, :] = np.nan
        return summaries

    monkeypatch.setattr(LanguageModel, "summaries", broken)
    told = extract_features(items(9), tmp_path / "store", loaded, OPTIONS)
    reasons = [reason for reason in read_store(tmp_path / "store").left_out.values() if "finite" in reason]
    assert len(reasons) >= 1
    assert told["items"] >= 1


def test_a_shard_without_finite_attention_does_not_block_the_others(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = LanguageModel.summaries, []

    def broken(model: LanguageModel, batch: list[tuple[int, ...]]) -> list[AttentionSummary]:
        calls.append(batch)
        summaries = plain(model, batch)
        for summary in summaries[: len(summaries) if len(calls) <= broken_calls else 0]:
            summary.diagonal[0, 0, :] = np.nan
        return summaries

    monkeypatch.setattr(LanguageModel, "summaries", broken)
    broken_calls = 3  # the three batches of the first shard
    told = extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    store = read_store(tmp_path / "store")
    assert sum("finite" in reason for reason in store.left_out.values()) == 8
    assert told["items"] + told["left_out"] == 30
    assert len(read_shard(tmp_path / "store" / shard_name(0)).ids) == 0
    seen = len(calls)
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    assert len(calls) == seen  # an empty shard is a finished one
    broken_calls = 10_000
    with pytest.raises(NotEnoughData, match=r"none of 30 items can be stored, such as `i\d+`: attention is not finite"):
        extract_features(items(), tmp_path / "none", loaded, OPTIONS)


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_a_run_that_failed_goes_on_and_ends_with_the_same_bytes(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "whole", loaded, OPTIONS)
    plain, calls = LanguageModel.summaries, []

    def failing(model: LanguageModel, batch: list[tuple[int, ...]]) -> list[AttentionSummary]:
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return plain(model, batch)

    monkeypatch.setattr(LanguageModel, "summaries", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        extract_features(items(), tmp_path / "cut", loaded, OPTIONS)
    assert (tmp_path / "cut" / shard_name(0)).exists()
    before = len(calls)
    extract_features(items(), tmp_path / "cut", loaded, OPTIONS)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    whole_run = sum(-(-min(8, 30) // 3) for _ in range(4))
    assert len(calls) - before < whole_run  # the finished shard was not made again


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["flip", "swap"])
def test_a_damaged_shard_is_made_again_and_the_others_are_kept(
    loaded: LanguageModel, tmp_path: Path, finished: bool, damage: str
) -> None:
    extract_features(items(), tmp_path / "whole", loaded, OPTIONS)
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    path = tmp_path / "store" / shard_name(1)
    data = bytearray((path if damage == "flip" else tmp_path / "store" / shard_name(0)).read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    path.write_bytes(data)
    assert read_shard(path).ids  # control: it can be read all the same
    if not finished:
        (tmp_path / "store" / "index.json").unlink()
    kept = (tmp_path / "store" / shard_name(0)).stat().st_ino
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert (tmp_path / "store" / shard_name(0)).stat().st_ino == kept


SLOW_RUN = """
import sys, time
from pathlib import Path
from lapwing_training import extract
from lapwing_training.generations import read_generations
from lapwing_detector.language_model import LanguageModel
plain = LanguageModel.summaries
def slow(model, batch):
    time.sleep(0.2)
    return plain(model, batch)
LanguageModel.summaries = slow
options = extract.ExtractOptions(k=4, batch_size=3, shard_items=8, stratum="meta.kind")
extract.extract_features(read_generations(sys.argv[1]), Path(sys.argv[2]), LanguageModel.load(sys.argv[3]), options)
"""


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    loaded: LanguageModel, tiny_model: Path, tmp_path: Path
) -> None:
    write_generations(tmp_path / "items.jsonl", items())
    store = tmp_path / "killed"
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path / "items.jsonl"), str(store), str(tiny_model)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (store / shard_name(0)).exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (store / "index.json").exists()
    (store / ".shard-00001.safetensors.x.tmp").write_bytes(b"half")
    extract_features(items(), store, loaded, OPTIONS)
    extract_features(items(), tmp_path / "whole", loaded, OPTIONS)
    assert contents(store) == contents(tmp_path / "whole")


def test_relabelling_writes_labels_anew_and_no_features(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    monkeypatch.setattr(LanguageModel, "summaries", None)  # any forward would fail
    extract_features([replace(item, label=1) for item in items()], tmp_path / "store", loaded, OPTIONS)
    assert set(read_store(tmp_path / "store").table.labels.tolist()) == {1}


def test_another_model_or_k_is_not_mixed_in(loaded: LanguageModel, other_model: Path, tmp_path: Path) -> None:
    extract_features(items(9), tmp_path / "store", loaded, OPTIONS)
    with pytest.raises(StoreMismatch, match="model"):
        extract_features(items(9), tmp_path / "store", LanguageModel.load(str(other_model)), OPTIONS)
    with pytest.raises(StoreMismatch, match="k"):
        extract_features(items(9), tmp_path / "store", loaded, replace(OPTIONS, k=3))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": ("magic.v1",)}, "`magic.v1`; known are"),
        ({"features": ()}, "features is empty"),
        ({"features": (SCORE, SCORE)}, "name each once"),
        ({"k": 0}, "k is 0"),
        ({"stratum": "relation"}, "such as meta.relation"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        ExtractOptions(**changes)
