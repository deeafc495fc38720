"""A store that fills while answers are written holds what reading them would give."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from generate_fakes import ALL, GREEDY, questions
from typer.testing import CliRunner, Result

from lapwing_detector.language_model import LanguageModel
from lapwing_training.answers.generate import GenerateOptions, generate_answers
from lapwing_training.cli.generate import generate
from lapwing_training.data.generations import read_generations, write_generations
from lapwing_training.errors import InvalidOption, NotEnoughData, StoreMismatch
from lapwing_training.store import gathering
from lapwing_training.store.extract import ExtractOptions, extract_features
from lapwing_training.store.store import read_items, read_store


def forbidden(*arguments: object, **options: object) -> None:
    raise AssertionError("the model was asked")


def ending_at(loaded: LanguageModel, place: Path, options: GenerateOptions) -> LanguageModel:
    """The same model, which also ends at a token that it writes now and then, though not always."""
    generate_answers(questions(14), place / "endless", loaded, options)
    ids = [answer.generation["token_ids"] for answer in read_generations(place / "endless")]
    written = Counter(token for some in ids for token in set(some[-6:-2]))
    token = next(token for token, count in written.most_common() if count < 10)
    ending = LanguageModel(loaded.model, loaded.tokenizer, loaded.name)
    vars(ending)["stop_tokens"] = frozenset({1, token})
    return ending


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("alone", [False, True])  # as for models whose frequencies depend on the longest of a batch
def test_features_of_the_writing_pass_equal_those_of_reading_the_same_ids(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, alone: bool
) -> None:
    if alone:
        monkeypatch.setattr(gathering, "switching_points", lambda config: {"dynamic": 64})
    options = replace(GREEDY, temperature=temperature, max_new_tokens=9)
    loaded = ending_at(loaded, tmp_path, options)
    told = generate_answers(questions(14), tmp_path / "out", loaded, options, tmp_path / "store", ALL, 4)
    answers = read_generations(tmp_path / "out")
    assert {answer.generation["finish_reason"] for answer in answers} == {"stop", "length"}
    extract_features(answers, tmp_path / "read", loaded, ExtractOptions(ALL, 4))
    written, read = read_store(tmp_path / "store"), read_store(tmp_path / "read")
    assert written.table.ids.tolist() == read.table.ids.tolist()
    assert told["store"]["items"] == len(written.table) > 10
    # float32, and padding and steps change the order of summation.
    np.testing.assert_allclose(written.table.stacked(ALL, 4), read.table.stacked(ALL, 4), atol=1e-4)
    np.testing.assert_allclose(written.table.token_statistics, read.table.token_statistics, atol=1e-3)
    assert np.abs(read.table.token_statistics).max() > 0.1
    assert written.left_out == read.left_out
    assert (written.layers, written.mode) == (read.layers, "generated")
    np.testing.assert_array_equal(written.table.response_tokens, read.table.response_tokens)
    # Control: without its last token a text has other features.
    cut = [
        replace(answer, generation={**answer.generation, "token_ids": answer.generation["token_ids"][:-1]})
        for answer in answers
        if answer.generation["prompt_tokens"] + 1 < len(answer.generation["token_ids"])
    ]
    extract_features(cut, tmp_path / "cut", loaded, ExtractOptions(ALL, 4))
    other = read_store(tmp_path / "cut").table
    rows = np.flatnonzero(np.isin(read.table.ids, other.ids))
    assert np.abs(other.stacked(ALL, 4) - read.table.take(rows).stacked(ALL, 4)).max(axis=(1, 2, 3)).min() > 1e-3


def test_labels_are_added_later_without_asking_the_model(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    generate_answers(questions(), tmp_path / "out", loaded, GREEDY, store, ALL, 3)
    before = read_store(store).table
    assert set(before.labels.tolist()) == {-1}
    labelled = [replace(answer, label=number % 2) for number, answer in enumerate(read_generations(tmp_path / "out"))]
    shards = {path.name: path.read_bytes() for path in store.glob("*.safetensors")}
    with monkeypatch.context() as patched:
        patched.setattr(type(loaded.model), "forward", forbidden)
        extract_features(labelled[1:], store, loaded, ExtractOptions(ALL, 3, stratum="meta.kind"))
        with pytest.raises(AssertionError, match="the model was asked"):  # control
            loaded.summaries([(0, 5, 6)])
    table = read_store(store).table
    assert table.labels.tolist() == [item.label for item in labelled[1:]]
    np.testing.assert_array_equal(table.stacked(ALL, 3), before.take(np.arange(1, 8)).stacked(ALL, 3))
    assert {path.name: path.read_bytes() for path in store.glob("*.safetensors")} == shards
    assert set(table.strata) == {"k"}
    extract_features(labelled, store, loaded, ExtractOptions(ALL, 3, stages=(0.5,)))  # which reads the cut texts
    assert read_store(store).table.stages == (0.5,)
    foreign = replace(labelled[0], id="new")
    with pytest.raises(StoreMismatch, match="no undamaged features of `new`"):
        extract_features([*labelled, foreign], store, loaded, ExtractOptions(ALL, 3))
    with pytest.raises(StoreMismatch, match="features"):
        extract_features(labelled, store, loaded, ExtractOptions(ALL[:2], 3))


def test_a_store_keeps_the_labels_of_answers_that_are_written_again(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    generate_answers(questions(), tmp_path / "out", loaded, GREEDY, store, ALL, 3)
    labelled = [
        replace(answer, label=number % 2, labelling={"rule": "f1"})
        for number, answer in enumerate(read_generations(tmp_path / "out"))
    ]
    extract_features(labelled[1:], store, loaded, ExtractOptions(ALL, 3))
    generate_answers(questions(), tmp_path / "out", loaded, GREEDY, store, ALL, 3)
    assert read_store(store).table.labels.tolist() == [-1, *(item.label for item in labelled[1:])]
    held = read_items(store)
    assert [held[item.id].labelling for item in labelled[1:]] == [{"rule": "f1"}] * 7
    # Control: of another text, the label says nothing.
    other = replace(held["q3"], generation={**held["q3"].generation, "token_ids": [0, 5, 6], "prompt_tokens": 2})
    monkeypatch.setattr(gathering, "read_items", lambda directory: {**held, "q3": other})
    generate_answers(questions(), tmp_path / "out", loaded, GREEDY, store, ALL, 3)
    assert [id for id, item in read_items(store).items() if item.label is None] == ["q0", "q3"]


def test_a_store_of_other_answers_is_not_mixed_in(loaded: LanguageModel, tmp_path: Path) -> None:
    generate_answers(questions(), tmp_path / "out", loaded, GREEDY, tmp_path / "store", ALL, 3)
    for asked, options, k in (
        (questions(7), GREEDY, 3),
        (questions(), replace(GREEDY, temperature=1.0), 3),
        (questions(), GREEDY, 2),
    ):
        with pytest.raises(StoreMismatch, match=r"generated|\(k\)"):
            generate_answers(asked, tmp_path / "other", loaded, options, tmp_path / "store", ALL, k)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InvalidOption, match="`magic`; known are"):
        generate_answers(questions(), tmp_path / "other", loaded, GREEDY, tmp_path / "none", ("magic",), 3)
    assert not (tmp_path / "none").exists()


def test_answers_that_are_all_too_short_are_written_and_told(loaded: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughData, match="lower --k"):
        generate_answers(questions(), tmp_path / "out", loaded, GREEDY, tmp_path / "store", ALL, 40)
    assert len(read_generations(tmp_path / "out")) == 8
    assert not (tmp_path / "store" / "index.json").exists()


def test_the_verb_fills_a_store(tiny_model: Path, tmp_path: Path) -> None:
    def run(*more: object) -> Result:
        app = typer.Typer()
        app.command("generate")(generate)
        said = (
            tmp_path / "asked.jsonl",
            "--out",
            tmp_path / "out",
            "--model",
            tiny_model,
            "--max-new-tokens",
            4,
            *more,
        )
        return CliRunner().invoke(app, [str(argument) for argument in said])

    write_generations(tmp_path / "asked.jsonl", questions())
    for wrong, says in (
        (("--features", "all"), "store is not given"),
        (("--k", "3"), "store is not given"),
        (("--store", tmp_path / "store", "--features", "magic"), "`magic.v1`; known are"),
        (("--store", tmp_path / "store", "--k", "0"), "k is 0"),
    ):
        refused = run(*wrong)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert says in refused.stderr
    assert not (tmp_path / "store").exists()
    done = run("--store", tmp_path / "store", "--features", "all", "--k", "3", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["store"]["items"] == 8
    assert set(read_store(tmp_path / "store").table.feature_names) == set(ALL)
