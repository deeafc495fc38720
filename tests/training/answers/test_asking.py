from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.stats import chisquare
from typer.testing import CliRunner, Result

from lapwing_training.answers.asking import Asking, ask, questions_of, read_few_shot
from lapwing_training.answers.sampling import own_draws, seed_of
from lapwing_training.cli.generate import generate
from lapwing_training.data.columns import Columns
from lapwing_training.data.data_sets import Source
from lapwing_training.data.generations import Question, read_generations, read_questions
from lapwing_training.errors import InvalidData, InvalidOption

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"  # before `datasets` is imported

BARE = [
    Question(id="a", prompt="where is paris", references=("in france",), meta={"kind": "k"}),
    Question(id="b", prompt="where is oslo", group="north", split="test"),
]
CHAT = Question(id="c", messages=({"role": "user", "content": "where is rome"},))


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("generate")(generate)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_samples_are_numbered_and_stay_in_the_group_of_their_question() -> None:
    asked = ask(BARE, Asking(samples=3))
    assert [one.id for one in asked] == ["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]
    assert [one.group_or_prompt for one in asked] == [one.group_or_prompt for one in BARE for _ in range(3)]
    assert {(one.prompt, one.references, one.split) for one in asked[:3]} == {(BARE[0].prompt, ("in france",), None)}
    # Ids that already look like samples meet no others.
    names = [one.id for one in ask([Question(id=id, prompt="p") for id in ("q", "q#0", "q#0#0")], Asking(samples=2))]
    assert len(set(names)) == 6


def test_examples_surround_the_prompt_and_leave_the_group_to_the_bare_question(tmp_path: Path) -> None:
    (tmp_path / "examples.txt").write_text('Q: {where}? A: "{}"\n\nQ: {prompt}\nA:\n')
    few_shot = read_few_shot(tmp_path / "examples.txt")
    asked = ask(BARE, Asking(few_shot=few_shot))
    assert asked[0].prompt == 'Q: {where}? A: "{}"\n\nQ: where is paris\nA:'
    assert [one.group for one in asked] == [BARE[0].group_or_prompt, "north"]
    assert (asked[0].id, asked[0].references, asked[0].meta, asked[1].split) == (
        "a",
        ("in france",),
        {"kind": "k"},
        "test",
    )
    # Control: what was asked would be another group.
    assert Question(id="a", prompt=asked[0].prompt).group_or_prompt != asked[0].group
    other = ask(BARE, Asking(few_shot="other examples {prompt}"))
    assert [one.group for one in other] == [one.group for one in asked]


def test_as_chat_a_prompt_is_one_message_of_a_user() -> None:
    asked = ask([*BARE, CHAT], Asking(form="chat"))
    assert asked[0].messages == ({"role": "user", "content": "where is paris"},)
    assert [one.prompt for one in asked] == [None, None, None]
    assert [one.group_or_prompt for one in asked] == [one.group_or_prompt for one in [*BARE, CHAT]]
    assert asked[2] == CHAT
    with_examples = ask(BARE, Asking(form="chat", few_shot="x {prompt}"))
    assert with_examples[0].messages == ({"role": "user", "content": "x where is paris"},)
    # What is asked can be written and read again.
    assert [one.messages for one in asked] == [tuple(one.to_dict()["messages"]) for one in asked]


def test_control_asked_once_as_text_the_questions_are_untouched() -> None:
    assert ask([*BARE, CHAT], Asking()) == [*BARE, CHAT]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"samples": 0}, "samples is 0"), ({"form": "tongues"}, "form is `tongues`; known are text, chat")],
)
def test_askings_that_make_no_sense_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidOption, match=says):
        Asking(**changes)


def test_examples_go_before_prompts_only() -> None:
    with pytest.raises(InvalidData, match="item `c`: holds chat messages"):
        ask([CHAT], Asking(few_shot="x {prompt}"))


@pytest.mark.parametrize(
    ("text", "says"), [("no place", "0 times"), ("{prompt} {prompt}", "2 times"), ("\xff", "UTF-8")]
)
def test_examples_without_one_place_for_the_question_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "f").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidData, match=says):
        read_few_shot(tmp_path / "f")
    with pytest.raises(InvalidData, match="can't be read"):
        read_few_shot(tmp_path / "absent")


ROWS = [{"ask": f"where is {city}", "ok": {"all": [city, "x"]}, "kind": "k"} for city in ("paris", "rome", "oslo")]


def tables(folder: Path) -> list[Source]:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(folder / "t.parquet")
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(folder / "saved")
    (folder / "t.json").write_text(json.dumps(ROWS))
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = [Source(str(folder / name)) for name in ("t.parquet", "t.json", "t.jsonl")]
    return [*files, Source(str(folder / "saved"), split="test")]


def test_questions_come_from_any_table(tmp_path: Path) -> None:
    columns = Columns(prompt="ask", references="ok.all", meta=("kind",))
    read = [questions_of(source, columns) for source in tables(tmp_path)]
    assert all(questions == read[0] for questions in read)
    assert [one.prompt for one in read[0]] == [row["ask"] for row in ROWS]
    assert read[0][1].references == ("rome", "x")
    assert read[0][1].meta == {"kind": "k"}
    assert len({one.id for one in read[0]}) == 3
    assert questions_of(tables(tmp_path / ".")[0], columns, limit=2) == read[0][:2]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.parquet"])
def test_an_unknown_column_is_refused_however_few_rows_are_read(tmp_path: Path, name: str) -> None:
    tables(tmp_path)
    source = Source(str(tmp_path / name))
    for limit in (None, 1):
        with pytest.raises(InvalidOption, match=r"column is `sort`; the columns of .* are .*ask"):
            questions_of(source, Columns(prompt="ask", meta=("sort",)), limit)
    assert len(questions_of(source, Columns(prompt="ask", meta=("kind",)), limit=1)) == 1  # control


def test_a_broken_question_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ask,ok\nq,x\n ,x\n,x\n")
    with pytest.raises(InvalidData, match=r"t.csv: line 3: column `ask` is empty \(and 1 more such rows\)"):
        questions_of(Source(str(tmp_path / "t.csv")), Columns(prompt="ask"))
    assert len(questions_of(Source(str(tmp_path / "t.csv")), Columns(prompt="ask"), limit=1)) == 1
    (tmp_path / "none.csv").write_text("ask,ok\n")
    with pytest.raises(InvalidData, match="no rows"):
        questions_of(Source(str(tmp_path / "none.csv")), Columns(prompt="ask"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in BARE))
    return path


def test_the_verb_asks_a_table_several_times(tiny_model: Path, tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ask", "ok"], *([row["ask"], json.dumps(row["ok"]["all"])] for row in ROWS)])
    (tmp_path / "few.txt").write_text("the capital of france is paris {prompt}\n")
    asked = f"--prompt-column ask --references-column ok --limit 2 --samples 2 --few-shot {tmp_path / 'few.txt'}"
    options = f"--model {tiny_model} --max-new-tokens 3 --temperature 1 --json"
    out = tmp_path / "out.jsonl"
    result = run(tmp_path / "t.csv", "--out", out, *asked.split(), *options.split())
    assert result.exit_code == 0, result.output
    answers = read_generations(out)
    assert [answer.id[-2:] for answer in answers] == ["#0", "#1", "#0", "#1"]
    assert [answer.prompt for answer in answers[:2]] == ["the capital of france is paris where is paris"] * 2
    assert Counter(answer.group for answer in answers) == {
        Question(id="x", prompt=row["ask"]).group_or_prompt: 2 for row in ROWS[:2]
    }
    assert answers[2].references == ("rome", "x")


def test_the_verb_takes_a_data_set_and_our_own_lines(tiny_model: Path, tmp_path: Path, questions: Path) -> None:
    tables(tmp_path)
    options = ("--model", tiny_model, "--max-new-tokens", 2, "--json")
    data = ("--dataset", tmp_path / "saved", "--split-name", "test", "--prompt-column", "ask")
    result = run(*data, "--out", tmp_path / "a", *options)
    assert (result.exit_code, len(read_generations(tmp_path / "a"))) == (0, 3), result.output
    result = run(questions, "--out", tmp_path / "b", "--limit", 1, *options)
    assert (result.exit_code, [one.id for one in read_questions(tmp_path / "b")]) == (0, ["a"]), result.output


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        ("", 2, "give one of the two"),
        ("QUESTIONS --dataset x", 2, "give one of the two"),
        ("QUESTIONS --samples 3", 2, "samples is 3 at temperature 0, where they are all the same"),
        ("QUESTIONS --samples 0", 2, "samples is 0"),
        ("QUESTIONS --limit 0", 2, "limit is 0"),
        ("QUESTIONS --as tongues", 2, "form is `tongues`"),
        ("QUESTIONS --prompt-column ask", 2, "column is `ask`; the columns of QUESTIONS are id, prompt"),
        ("QUESTIONS --id-column id", 2, "prompt column is ``"),
        ("--dataset nowhere", 2, "prompt column is ``"),
        ("--dataset nowhere/at-all --prompt-column ask", 1, "nowhere/at-all: can't be read"),
        ("FOLDER/t.csv", 2, "is a table; name the column"),
        ("QUESTIONS --few-shot QUESTIONS", 1, "holds {prompt} 0 times"),
    ],
)
def test_what_can_not_be_asked_is_told_before_a_model_is_loaded(
    tmp_path: Path, questions: Path, options: str, status: int, says: str
) -> None:
    filled = options.replace("QUESTIONS", str(questions)).replace("FOLDER", str(tmp_path))
    result = run(*filled.split(), "--out", tmp_path / "out", "--model", tmp_path / "no-model")
    assert (result.exit_code, result.stdout) == (status, "")
    assert says.replace("QUESTIONS", str(questions)) in result.stderr
    assert not (tmp_path / "out").exists()


LOGITS = torch.tensor([2.0, 0.5, -1.0, 0.0, -4.0])
DRAWS = 4000


def drawn(ids: list[str], temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """One token for each id, (ids,)."""
    scores = own_draws(temperature, top_p, seed, "cpu", ids)(torch.zeros(len(ids), 1), LOGITS.repeat(len(ids), 1))
    assert torch.isfinite(scores).sum(dim=1).eq(1).all()
    return scores.argmax(dim=1).numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.7, 0.9)])
def test_what_is_drawn_is_distributed_as_the_softmax(temperature: float, top_p: float) -> None:
    expected = torch.softmax(LOGITS.double() / temperature, dim=0)
    order = expected.argsort(descending=True)
    kept = order[expected[order].cumsum(0) - expected[order] < top_p]  # the smallest set that reaches top_p
    law = torch.zeros_like(expected).index_copy(0, kept, expected[kept])
    law = (law / law.sum()).numpy()
    counts = np.bincount(drawn([f"q#{n}" for n in range(DRAWS)], temperature, top_p), minlength=len(law))
    assert counts[law == 0].sum() == 0
    # A fixed seed: this can't fail by chance, only when the code changes.
    assert chisquare(counts[law > 0], DRAWS * law[law > 0]).pvalue > 0.01
    # Control: the same counts are no draws from another temperature.
    other = torch.softmax(LOGITS.double() / (temperature * 1.3), dim=0).numpy()
    assert chisquare(counts + 1, (DRAWS + len(law)) * other).pvalue < 1e-6


def test_a_draw_depends_on_item_and_seed_and_not_on_the_batch() -> None:
    ids = [f"q{n}#{m}" for n in range(20) for m in range(5)]
    alone = [drawn([id], 1.0, 1.0)[0] for id in ids]
    assert drawn(ids, 1.0, 1.0).tolist() == alone
    assert drawn(ids[::-1], 1.0, 1.0).tolist() == alone[::-1]
    assert drawn(ids, 1.0, 1.0, seed=1).tolist() != alone
    assert len({seed_of(id, seed) for id in ids for seed in range(10)}) == 1000
    assert len(own_draws(0.0, 1.0, 0, "cpu", ids)) == 0
