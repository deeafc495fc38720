"""Answers are those of one prompt at a time, and what can not be asked is refused before any is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generate_fakes import GREEDY, questions

from lapwing_detector.language_model import LanguageModel
from lapwing_training.answers import generate as generate_module
from lapwing_training.answers.generate import GenerateOptions, generate_answers
from lapwing_training.data.generations import Question, read_generations, write_generations
from lapwing_training.errors import InvalidData, InvalidOption, NonFiniteLogits


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
