"""What is stored of an item is what eager attention says of its ids; what has no features is listed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from extract_fakes import OPTIONS, eager, items
from training_fakes import LAPLACIAN, SCORE, WORDS
from typer.testing import CliRunner, Result

from lapwing_detector.features import FEATURES
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.token_statistics import TOKEN_STATISTICS, token_statistics
from lapwing_detector.tokens import TokenIds
from lapwing_training.answers.generate import GenerateOptions, generate_answers
from lapwing_training.cli.extract import extract
from lapwing_training.cli.inspect import inspect
from lapwing_training.data.generations import LabelledGeneration, Question, read_generations, write_generations
from lapwing_training.errors import InvalidData, InvalidOption, NotEnoughData, StoreMismatch
from lapwing_training.store import extract as extract_module
from lapwing_training.store.extract import ExtractOptions, Reading, extract_features
from lapwing_training.store.inspect import inspect_store
from lapwing_training.store.prefix import response_cut
from lapwing_training.store.shards import WHOLE, read_shard, shard_paths, stage_kind
from lapwing_training.store.store import read_store


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
    plain = extract_module.read_with_log_probabilities

    def broken(model: LanguageModel, batch: list[TokenIds]) -> list[Reading]:
        readings = plain(model, batch)
        readings[0][0].diagonal[0, 0, :] = np.nan
        return readings

    monkeypatch.setattr(extract_module, "read_with_log_probabilities", broken)
    told = extract_features(items(9), tmp_path / "store", loaded, OPTIONS)
    reasons = [reason for reason in read_store(tmp_path / "store").left_out.values() if "finite" in reason]
    assert len(reasons) >= 1
    assert told["items"] >= 1


def test_a_shard_without_finite_attention_does_not_block_the_others(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = extract_module.read_with_log_probabilities, []

    def broken(model: LanguageModel, batch: list[TokenIds]) -> list[Reading]:
        calls.append(batch)
        readings = plain(model, batch)
        for summary, _ in readings[: len(readings) if len(calls) <= broken_calls else 0]:
            summary.diagonal[0, 0, :] = np.nan
        return readings

    monkeypatch.setattr(extract_module, "read_with_log_probabilities", broken)
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


def said_of(loaded: LanguageModel, prompt: str, response: str) -> list[float]:
    """Log-probabilities of the response's tokens, of all logits of one item alone."""
    ids = loaded.tokenizer(f"{prompt} {response}", return_tensors="pt").input_ids
    with torch.inference_mode():
        scores = loaded.model(ids).logits[0].double().log_softmax(-1)
    first = ids.shape[1] - len(response.split())
    return [float(scores[place - 1, ids[0, place]]) for place in range(first, ids.shape[1])]


def test_log_probabilities_of_the_response_are_kept_and_serve_its_beginnings_too(
    loaded: LanguageModel, tmp_path: Path
) -> None:
    extract_features(items(), tmp_path / "store", loaded, replace(OPTIONS, stages=(0.25, 0.6)))
    table = read_store(tmp_path / "store").table
    by_id = {item.id: item for item in items()}
    for part in (table, table.take(np.arange(3)), *(table.at_stage(fraction)[0] for fraction in table.stages)):
        for row, id in enumerate(part.ids.tolist()):
            words = by_id[id].response.split()[: part.response_tokens[row]]
            expected = token_statistics(said_of(loaded, by_id[id].prompt, " ".join(words)))
            np.testing.assert_allclose(part.token_statistics[row], expected, atol=1e-4)
    ids = list(TOKEN_STATISTICS)
    np.testing.assert_array_equal(table.statistics(ids[::-1]), table.token_statistics[:, ::-1])
    assert inspect_store(tmp_path / "store")["log_probabilities"] == len(table)
    # They stand in the shards of whole texts only.
    shards = [read_shard(path) for path in sorted((tmp_path / "store").glob("*.safetensors"))]
    assert {shard.log_probabilities is None for shard in shards[:4]} == {False}
    assert {shard.log_probabilities for shard in shards[4:]} == {None}


def test_an_item_whose_log_probabilities_are_no_numbers_is_listed(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = extract_module.read_with_log_probabilities

    def broken(model: LanguageModel, batch: list[TokenIds]) -> list[Reading]:
        (summary, said), *others = plain(model, batch)
        return [(summary, np.full_like(said, np.nan)), *others]

    monkeypatch.setattr(extract_module, "read_with_log_probabilities", broken)
    extract_features(items(9), tmp_path / "store", loaded, OPTIONS)
    assert "logits are not numbers; try --dtype float32" in read_store(tmp_path / "store").left_out.values()
    assert np.isfinite(read_store(tmp_path / "store").table.token_statistics).all()


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
        # What another model thought of its words is not asked for; what this one does is found in reading them.
        said = store.table.log_probabilities
        np.testing.assert_allclose(said, store.table.statistics(["mean_log_probability.v1"])[:, 0], atol=1e-5)
        others = np.array([answer.generation["log_probability"] for answer in answers])
        assert np.allclose(said, others, atol=1e-5) == (mode == "generated")
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
