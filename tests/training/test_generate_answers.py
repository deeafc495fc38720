from __future__ import annotations

import copy
import errno
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from training_fakes import WORDS
from typer.testing import CliRunner, Result

from lapwing_detector.features import FEATURES
from lapwing_detector.language_model import LanguageModel
from lapwing_training import gathering
from lapwing_training import generate as generate_module
from lapwing_training.cli.generate import generate
from lapwing_training.errors import InvalidData, InvalidOption, NonFiniteLogits, NotEnoughData, StoreMismatch
from lapwing_training.extract import ExtractOptions, extract_features
from lapwing_training.generate import GenerateOptions, generate_answers
from lapwing_training.generations import Question, read_generations, write_generations
from lapwing_training.shards import WHOLE, shard_paths
from lapwing_training.store import read_items, read_store

GREEDY = GenerateOptions(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(str(tiny_model))


def questions(count: int = 8) -> list[Question]:
    return [
        Question(id=f"q{n}", prompt=" ".join(WORDS[: 2 + n % 5]), group=f"g{n}", references=("x",), meta={"kind": "k"})
        for n in range(count)
    ]


def test_greedy_answers_equal_those_of_one_prompt_at_a_time(loaded: LanguageModel, tmp_path: Path) -> None:
    generate_answers(questions(), tmp_path / "out.jsonl", loaded, GREEDY)
    answers = read_generations(tmp_path / "out.jsonl")
    assert [answer.id for answer in answers] == [question.id for question in questions()]
    for question, answer in zip(questions(), answers, strict=True):
        ids = loaded.tokenizer(question.prompt).input_ids
        prompt_length, total = len(ids), 0.0
        with torch.inference_mode():
            for _ in range(GREEDY.max_new_tokens):
                scores = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0, -1], dim=-1)
                token = int(scores.argmax())
                if token in loaded.stop_tokens:
                    break
                total += float(scores[token])
                ids.append(token)
        written = len(ids) - prompt_length
        assert answer.generation["token_ids"] == ids
        assert answer.generation["prompt_tokens"] == prompt_length
        assert answer.generation["finish_reason"] == ("length" if written == GREEDY.max_new_tokens else "stop")
        if written:
            # float32, and padding changes the order of summation.
            assert answer.generation["log_probability"] == pytest.approx(total / written, abs=1e-4)
        else:
            assert answer.generation["log_probability"] is None
        assert (answer.group, answer.references, answer.meta["kind"]) == (question.group, ("x",), "k")
        assert answer.label is None


def test_the_models_own_sampling_defaults_do_not_leak_in(loaded: LanguageModel, tmp_path: Path) -> None:
    generate_answers(questions(), tmp_path / "plain.jsonl", loaded, GREEDY)
    config = loaded.model.generation_config
    kept = (config.repetition_penalty, config.top_k, config.do_sample)
    config.repetition_penalty, config.top_k, config.do_sample = 5.0, 1, True
    try:
        generate_answers(questions(), tmp_path / "again.jsonl", loaded, GREEDY)
    finally:
        config.repetition_penalty, config.top_k, config.do_sample = kept
    assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_run_that_failed_goes_on_and_ends_with_the_same_bytes(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    options = replace(GREEDY, temperature=temperature, seed=3)
    generate_answers(questions(), tmp_path / "whole.jsonl", loaded, options)
    plain, calls = generate_module.answer, []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return plain(*arguments)

    monkeypatch.setattr(generate_module, "answer", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        generate_answers(questions(), tmp_path / "cut.jsonl", loaded, options)
    assert not (tmp_path / "cut.jsonl").exists()
    [partial] = tmp_path.glob("cut.jsonl.*.partial")
    # Killed while it was writing: a line of the last batch is whole, the next is half.
    whole = (tmp_path / "whole.jsonl").read_bytes().split(b"\n")
    partial.write_bytes(partial.read_bytes() + whole[6] + b"\n" + whole[7][:20])
    told = generate_answers(questions(), tmp_path / "cut.jsonl", loaded, options)
    assert told["resumed"] == 6
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_another_dtype_does_not_go_on_with_a_run_that_failed(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(loaded.model).bfloat16()
    model.save_pretrained(tmp_path / "coarse")
    loaded.tokenizer.save_pretrained(tmp_path / "coarse")
    coarse, fine = (LanguageModel.load(str(tmp_path / "coarse"), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert coarse.identity.digest == fine.identity.digest  # both hold the same numbers
    plain, calls = generate_module.answer, []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return plain(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "answer", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            generate_answers(questions(), tmp_path / "out", coarse, GREEDY)
    assert generate_answers(questions(), tmp_path / "out", fine, GREEDY)["resumed"] == 0
    assert generate_answers(questions(), tmp_path / "out", coarse, GREEDY)["resumed"] == 3  # control


def test_sampling_depends_on_the_seed_and_leaves_the_generator_alone(loaded: LanguageModel, tmp_path: Path) -> None:
    options = replace(GREEDY, temperature=2.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate_answers(questions(), tmp_path / name, loaded, replace(options, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_log_probability_is_the_models_own_whatever_the_temperature(loaded: LanguageModel, tmp_path: Path) -> None:
    generate_answers(questions(3), tmp_path / "hot", loaded, replace(GREEDY, temperature=3.0))
    for answer in read_generations(tmp_path / "hot"):
        ids, prompt = answer.generation["token_ids"], answer.generation["prompt_tokens"]
        if len(ids) == prompt:
            continue
        with torch.inference_mode():
            scores = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0], dim=-1)
        mean = math.fsum(float(scores[place - 1, ids[place]]) for place in range(prompt, len(ids))) / (
            len(ids) - prompt
        )
        assert answer.generation["log_probability"] == pytest.approx(mean, abs=1e-4)


def test_an_item_that_can_not_be_tokenised_is_named(loaded: LanguageModel, tmp_path: Path) -> None:
    chat = Question(id="chat", messages=({"role": "user", "content": "where"},))  # the tokenizer has no template
    with pytest.raises(InvalidData, match="item `chat`"):
        generate_answers([chat], tmp_path / "out", loaded, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "item `last`: prompt"),
        ("paris " * 70, "item `last`: the prompt has 71 tokens and its answer up to 6, tiny reads at most 64 together"),
        ("paris " * 62, "the prompt has 63 tokens and its answer up to 6, .* 64 .* lower --max-new-tokens"),
        ("paris " * 58, "the prompt has 59 tokens"),  # one too many, see below
    ],
)
def test_a_prompt_that_can_not_be_asked_is_named_before_any_is(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, says: str
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(generate_module, "answer", lambda *arguments: calls.append(arguments))
    with pytest.raises(InvalidData, match=says):
        generate_answers([*questions(), Question(id="last", prompt=prompt)], tmp_path / "out", loaded, GREEDY)
    assert not calls
    assert not list(tmp_path.iterdir())


def test_an_answer_may_fill_all_that_the_model_reads(loaded: LanguageModel, tmp_path: Path) -> None:
    fits = Question(id="fits", prompt="paris " * 57)  # 58 tokens, and 6 of the answer
    assert generate_answers([fits], tmp_path / "out", loaded, GREEDY)["answers"] == 1


def test_a_target_that_can_not_be_written_is_refused_before_any_is_asked(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "answer", None)
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "file" / "out.jsonl", "nothing can be written in")):
        with pytest.raises(InvalidOption, match=says):
            generate_answers(questions(), path, loaded, GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_nan_is_named(tiny_model: Path, tmp_path: Path, temperature: float) -> None:
    broken = LanguageModel.load(str(tiny_model))
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLogits, match=r"logits of tiny in float32 are not finite for item `q0`.*--dtype"):
        generate_answers(questions(), tmp_path / "out", broken, replace(GREEDY, temperature=temperature))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rubbish", [b"\0" * 40, b"\0" * 40 + b"\n", b"[1]\n", b'{"id": "q3"}\n', b"\xff\n"])
def test_what_a_crash_left_in_the_partial_file_is_cut_off(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rubbish: bytes
) -> None:
    generate_answers(questions(), tmp_path / "whole", loaded, GREEDY)
    with monkeypatch.context() as patched:
        plain, calls = generate_module.answer, []

        def failing(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == 2:
                raise RuntimeError("power cut")
            return plain(*arguments)

        patched.setattr(generate_module, "answer", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)
    [partial] = tmp_path.glob("cut.*.partial")
    partial.write_bytes(partial.read_bytes() + rubbish)
    assert generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)["resumed"] == 3
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; expected"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        GenerateOptions(**changes)


def test_an_id_that_is_used_twice_is_refused(loaded: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="item `q0`: its id is used twice"):
        generate_answers([*questions(), questions(1)[0]], tmp_path / "out", loaded, GREEDY)
    assert not list(tmp_path.iterdir())


ALL = tuple(FEATURES)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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


def test_a_file_that_holds_labels_is_not_written_over(loaded: LanguageModel, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate_answers(questions(), out, loaded, GREEDY)
    generate_answers(questions(), out, loaded, GREEDY)  # control: without labels it may be
    first, *others = read_generations(out)
    write_generations(out, [*others, replace(first, label=0)])
    before = out.read_bytes()
    with pytest.raises(InvalidOption, match=r"out.jsonl holds labels; give another file with --out or remove it"):
        generate_answers(questions(), out, loaded, GREEDY)
    assert out.read_bytes() == before


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


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("fault", ["answers", "answers lost", "shard lost", "shard damaged", "half a line"])
def test_answers_and_store_go_on_together_and_end_with_the_same_bytes(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, fault: str
) -> None:
    options = replace(GREEDY, temperature=temperature, seed=3)

    def generate(place: str) -> dict[str, object]:
        here = tmp_path / place
        return generate_answers(questions(11), here / "out", loaded, options, here / "s", ALL, 3)

    generate("whole")
    plain, calls = generate_module.answer, []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return plain(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "answer", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            generate("cut")
    [partial] = (tmp_path / "cut").glob("out.*.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    first, second = shard_paths(tmp_path / "cut" / "s", WHOLE)
    if fault == "answers lost":  # killed after the shard was written, before the answers were
        partial.write_bytes(b"".join(lines[:3]))
    elif fault == "half a line":
        partial.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    elif fault == "shard lost":
        second.unlink()
    elif fault == "shard damaged":
        second.write_bytes(first.read_bytes())
    (tmp_path / "cut" / ".out.x7.tmp").write_bytes(b"half")  # killed at the very end, in an earlier run
    assert generate("cut")["resumed"] == (6 if fault == "answers" else 3)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


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


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_answers(questions(), tmp_path / "whole", loaded, GREEDY)
    with monkeypatch.context() as patched:
        plain, calls = Path.open, []

        def full(path: Path, *arguments: object, **options: object) -> object:
            calls.append(path)
            if path.suffix == ".partial" and sum(one.suffix == ".partial" for one in calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(path, *arguments, **options)

        patched.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"No space left on device; .*make room.*\.partial"):
            generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)
    assert not (tmp_path / "cut").exists()
    assert generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)["resumed"] == 3
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


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
