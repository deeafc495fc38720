from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from training_fakes import LAPLACIAN, SCORE, WORDS
from typer.testing import CliRunner, Result

from lapwing_detector.features import FEATURES
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.summary import AttentionSummary
from lapwing_training import files
from lapwing_training.cli.extract import extract
from lapwing_training.cli.inspect import inspect
from lapwing_training.errors import InvalidData, InvalidOption, NotEnoughData, StoreCorrupt, StoreMismatch
from lapwing_training.extract import ExtractOptions, extract_features
from lapwing_training.generate import GenerateOptions, generate_answers
from lapwing_training.generations import LabelledGeneration, Question, read_generations, write_generations
from lapwing_training.inspect import inspect_store
from lapwing_training.prefix import response_cut
from lapwing_training.shards import WHOLE, read_shard, shard_paths, stage_kind
from lapwing_training.store import read_items, read_store

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
    stored = {name: table.feature(name, 4) for name in (SCORE, LAPLACIAN)}
    for row, id in enumerate(table.ids):
        item = by_id[str(id)]
        summary = eager(loaded, f"{item.prompt} {item.response}")
        assert table.token_counts[row] == summary.token_count
        for name in (SCORE, LAPLACIAN):
            # float32 softmax in another order of summation.
            np.testing.assert_allclose(stored[name][row], FEATURES[name].compute(summary, 4), atol=2e-5)
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
    assert len(read_shard(shard_paths(tmp_path / "store", WHOLE)[0]).ids) == 0
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
    assert len(shard_paths(tmp_path / "cut", WHOLE)) == 1
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
    first, path, *_ = shard_paths(tmp_path / "store", WHOLE)
    data = bytearray((path if damage == "flip" else first).read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    path.write_bytes(data)
    assert read_shard(path).ids  # control: it can be read all the same
    if not finished:
        (tmp_path / "store" / "index.json").unlink()
    kept = first.stat().st_ino
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert first.stat().st_ino == kept


def test_relabelling_writes_labels_anew_and_no_features(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    monkeypatch.setattr(LanguageModel, "summaries", None)  # any forward would fail
    extract_features([replace(item, label=1) for item in items()], tmp_path / "store", loaded, OPTIONS)
    assert set(read_store(tmp_path / "store").table.labels.tolist()) == {1}


def test_labels_of_other_items_are_refused_and_mended_without_the_model(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    extract_features(items(), store, loaded, OPTIONS)
    whole = contents(store)
    monkeypatch.setattr(LanguageModel, "summaries", None)  # any forward would fail
    extract_features(items()[5:25], store, loaded, OPTIONS)
    (store / "index.json").write_bytes(whole["index.json"])  # as if killed before the index was written
    with pytest.raises(StoreCorrupt, match="run lapwing extract again, which keeps the shards"):
        read_store(store)
    extract_features(items(), store, loaded, OPTIONS)
    assert contents(store) == whole


def test_relabelling_some_of_the_items_keeps_stages_and_strata(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    extract_features(items(), store, loaded, replace(OPTIONS, stages=(0.5,)))
    before = read_store(store).table
    shards = {path: path.read_bytes() for path in store.glob("*.safetensors")}
    monkeypatch.setattr(LanguageModel, "summaries", None)  # any forward would fail
    some = [replace(item, label=0, labelling={"rule": "f1"}) for item in items()[5:25]]
    told = extract_features(some, store, loaded, replace(OPTIONS, stratum=""))
    table = read_store(store).table
    assert set(table.ids) == set(before.ids) & {item.id for item in some}
    assert told["items"] == len(table) < len(before)
    rows = np.flatnonzero(np.isin(before.ids, table.ids))
    for name in (SCORE, LAPLACIAN):
        np.testing.assert_array_equal(table.feature(name, 4), before.take(rows).feature(name, 4))
    assert set(table.strata) == {"k0", "k1", "k2"}
    (cut, _), (cut_before, _) = table.at_stage(0.5), before.take(rows).at_stage(0.5)
    np.testing.assert_array_equal(cut.feature(LAPLACIAN, 4), cut_before.feature(LAPLACIAN, 4))
    assert read_items(store)[str(table.ids[0])].labelling == {"rule": "f1"}
    assert {path: path.read_bytes() for path in store.glob("*.safetensors")} == shards
    extract_features(items(), store, loaded, OPTIONS)  # and back again
    assert read_store(store).table.ids.tolist() == before.ids.tolist()


def test_all_features_are_stored_at_once_each_as_of_eager_attention(loaded: LanguageModel, tmp_path: Path) -> None:
    extract_features(items(9), tmp_path / "store", loaded, replace(OPTIONS, features=tuple(FEATURES)))
    table = read_store(tmp_path / "store").table
    assert set(table.feature_names) == set(FEATURES)
    by_id = {item.id: item for item in items(9)}
    for name in FEATURES:
        for id, values in zip(table.ids.tolist(), table.feature(name, 4), strict=True):
            summary = eager(loaded, f"{by_id[id].prompt} {by_id[id].response}")
            np.testing.assert_allclose(values, FEATURES[name].compute(summary, 4), atol=2e-5)


def test_a_stage_equals_eager_attention_of_the_cut_text(loaded: LanguageModel, tmp_path: Path) -> None:
    extract_features(items(), tmp_path / "store", loaded, replace(OPTIONS, stages=(0.25, 0.6)))
    table = read_store(tmp_path / "store").table
    by_id = {item.id: item for item in items()}
    assert table.stages == (0.25, 0.6)
    for fraction in table.stages:
        cut, rows = table.at_stage(fraction)
        for row, id in enumerate(cut.ids.tolist()):
            words = by_id[id].response.split()
            left = response_cut(fraction, len(words))
            summary = eager(loaded, " ".join([by_id[id].prompt, *words[:left]]))
            assert (cut.response_tokens[row], cut.token_counts[row]) == (left, summary.token_count)
            for name in (SCORE, LAPLACIAN):
                stored = cut.feature(name, 4)[row]
                np.testing.assert_allclose(stored, FEATURES[name].compute(summary, 4), atol=2e-5)
        short = [id for row, id in enumerate(table.ids.tolist()) if row not in rows]
        assert short or fraction > 0.5  # some were too short at first
        for id in short:
            words = by_id[id].response.split()
            assert 1 + len(by_id[id].prompt.split()) + response_cut(fraction, len(words)) < 4


def test_stages_that_are_added_later_read_the_cut_texts_only(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_features(items(), tmp_path / "whole", loaded, replace(OPTIONS, stages=(0.5,)))
    extract_features(items(), tmp_path / "store", loaded, OPTIONS)
    plain, read = LanguageModel.summaries, []

    def counted(model: LanguageModel, batch: list[tuple[int, ...]]) -> list[AttentionSummary]:
        read.extend(batch)
        return plain(model, batch)

    monkeypatch.setattr(LanguageModel, "summaries", counted)
    extract_features(items(), tmp_path / "store", loaded, replace(OPTIONS, stages=(0.5,)))
    assert len(read) == len(read_store(tmp_path / "store").table.at_stage(0.5)[0])
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_an_id_that_is_used_twice_is_refused(loaded: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="item `i0`: its id is used twice"):
        extract_features([*items(9), items(1)[0]], tmp_path / "store", loaded, OPTIONS)
    assert not (tmp_path / "store").exists()


def test_modes_are_kept_and_foreign_answers_are_supplied(loaded: LanguageModel, tmp_path: Path) -> None:
    own = [replace(item, mode="generated") for item in items(9)]
    extract_features(own, tmp_path / "own", loaded, OPTIONS)
    assert read_store(tmp_path / "own").mode == "generated"
    other = [replace(item, generation={"token_ids": [0], "tokenizer": "0123456789ab"}) for item in own]
    extract_features(other, tmp_path / "other", loaded, OPTIONS)
    assert read_store(tmp_path / "other").mode == "supplied"
    extract_features([*own[:5], *other[5:]], tmp_path / "both", loaded, OPTIONS)
    assert inspect_store(tmp_path / "both")["mode"] == "mixed"
    extract_features(items(9), tmp_path / "unsaid", loaded, OPTIONS)
    assert read_store(tmp_path / "unsaid").mode == "unknown"


def test_answers_of_another_model_with_the_same_tokenizer_are_supplied(
    loaded: LanguageModel, other_model: Path, tmp_path: Path
) -> None:
    other = LanguageModel.load(str(other_model))
    assert other.identity.tokenizer == loaded.identity.tokenizer
    asked = [Question(id=f"q{number}", prompt=" ".join(WORDS[: 4 + number])) for number in range(4)]
    generate_answers(asked, tmp_path / "out", other, GenerateOptions(max_new_tokens=4))
    answers = read_generations(tmp_path / "out")
    for model, mode in ((loaded, "supplied"), (other, "generated")):
        extract_features(answers, tmp_path / mode, model, OPTIONS)
        store = read_store(tmp_path / mode)
        assert store.mode == mode
        assert np.isnan(store.table.log_probabilities).all() == (mode == "supplied")
    # The ids are still those that were written: the tokenizer is the same.
    counts = [len(answer.generation["token_ids"]) for answer in answers]
    assert read_store(tmp_path / "supplied").table.token_counts.tolist() == counts


def test_kept_ids_are_split_where_the_prompt_ended(loaded: LanguageModel, tmp_path: Path) -> None:
    item = LabelledGeneration(id="a", prompt="paris", response="is", generation={"token_ids": [0, 5, 6, 7, 8, 9]})
    for prompt_tokens, response_tokens in ((2, 4), (6, 0), (None, 4)):  # without it as many as the text has
        kept = {**item.generation, "prompt_tokens": prompt_tokens}
        store = tmp_path / str(prompt_tokens)
        extract_features([replace(item, generation=kept)], store, loaded, OPTIONS)
        assert read_store(store).table.response_tokens.tolist() == [response_tokens]
    for wrong in (7, -1, True, "2"):
        bad = replace(item, generation={**item.generation, "prompt_tokens": wrong})
        with pytest.raises(InvalidData, match=r"item `a`: generation.prompt_tokens is .*; expected 0 to 6"):
            extract_features([bad], tmp_path / "wrong", loaded, OPTIONS)


def test_a_disk_that_fills_up_leaves_whole_files_and_the_run_goes_on(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, stages=(0.5,))
    plain, calls, fails_at = files.os.fsync, [], 0

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    extract_features(items(), tmp_path / "whole", loaded, options)
    writes = len(calls)  # plan, shards, those of the stage, texts, labels, index
    assert writes >= 8
    for fails_at in (1, 2, writes // 2, writes - 1, writes):
        store = tmp_path / str(fails_at)
        calls.clear()
        with pytest.raises(OSError, match=r"No space left on device; .*make room"):
            extract_features(items(), store, loaded, options)
        assert not (store / "index.json").exists()
        found = contents(store) if store.exists() else {}
        assert found.items() <= contents(tmp_path / "whole").items()
        extract_features(items(), store, loaded, options)
        assert contents(store) == contents(tmp_path / "whole")


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("extract")(extract)
    app.command("inspect")(inspect)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_verb_extracts_relabels_and_inspects(tiny_model: Path, tmp_path: Path) -> None:
    write_generations(tmp_path / "items.jsonl", items())
    store, model = tmp_path / "store", ("--model", tiny_model)
    said = ("--features", "all", "--k", 4, "--stages", "0.5", "--stratum", "meta.kind")
    assert run("extract", tmp_path / "items.jsonl", "--out", store, *model, *said).exit_code == 0
    write_generations(tmp_path / "again.jsonl", [replace(item, label=1) for item in items()])
    assert run("extract", tmp_path / "again.jsonl", "--out", store, *model).exit_code == 0  # as the store has it
    found = json.loads(run("inspect", store, "--json").stdout)
    assert set(found["features"]) == set(FEATURES)
    assert (found["k"], found["stratum"], list(found["stages"])) == (4, "meta.kind", ["0.5"])
    assert found["labels"]["right"] == 0
    assert re.search(r"all \d+ files whole", run("inspect", store).stdout)
    refused = run("extract", tmp_path / "items.jsonl", "--out", store, *model, "--k", 3)
    assert refused.exit_code == 1
    assert "(k" in refused.stderr
    shard_paths(store, stage_kind(0.5))[0].unlink()
    damaged = run("inspect", store)
    assert damaged.exit_code == 1
    assert re.search(r"1 of \d+ files damaged", damaged.stdout)
    assert run("extract", tmp_path / "items.jsonl", "--out", store, *model, "--stages", "half").exit_code == 2
    assert run("inspect", tmp_path).exit_code == 1


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
        ({"stages": (0.5, 1.0)}, "stages holds 1.0; expected fractions from .01 to below 1"),
        ({"stages": (0.5, 0.5)}, "each once"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        ExtractOptions(**changes)
