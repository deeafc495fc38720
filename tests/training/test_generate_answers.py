from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_fakes import WORDS

from lapwing_detector.language_model import LanguageModel
from lapwing_training import generate as generate_module
from lapwing_training.errors import InvalidData, InvalidOption, NonFiniteLogits
from lapwing_training.generate import GenerateOptions, generate_answers
from lapwing_training.generations import Question, read_generations

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
    [("", "item `last`: prompt"), ("paris " * 70, r"item `last`: the prompt has 71 tokens, tiny reads at most 64")],
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
