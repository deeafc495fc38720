from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lapwing_training.data.generations import LabelledGeneration, read_generations, read_questions, write_generations
from lapwing_training.errors import InvalidData

GOOD = {"id": "a", "prompt": "Where?", "response": "There", "label": 1}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_whole_surrogate_pair_and_many_brackets_are_kept(tmp_path: Path) -> None:
    line = '{"id": "a", "prompt": "\\ud83e\\udd86", "response": "r", "meta": {"n": %s}}' % ("[" + "[1]," * 200 + "[2]]")
    [item] = read_generations(written(tmp_path / "f", line))
    assert item.prompt == "\U0001f986"


@pytest.mark.parametrize("name", ["plain.jsonl", "packed.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    items = [
        LabelledGeneration(id="a", prompt="São\u2028Paulo?", response="", label=0, references=("x", "y"), group="g"),
        LabelledGeneration(id="b", messages=({"role": "user", "content": "hi"},), response="ho", meta={"k": [1, {}]}),
    ]
    write_generations(tmp_path / name, items)
    assert read_generations(tmp_path / name) == items


def test_the_same_items_give_the_same_compressed_bytes(tmp_path: Path) -> None:
    items = [LabelledGeneration(id="a", prompt="p", response="r")]
    for name in ("one.gz", "two.gz"):
        write_generations(tmp_path / name, items)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


def test_without_a_group_the_answers_to_one_prompt_belong_together(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Where?"}]
    lines = [
        GOOD,
        {**GOOD, "id": "b", "response": "Elsewhere"},
        {**GOOD, "id": "c", "prompt": "Who?"},
        {**GOOD, "id": "d", "group": "mine"},
        {"id": "e", "messages": chat, "response": "r"},
        {"id": "f", "messages": [{"content": "Where?", "role": "user"}], "response": "s"},
    ]
    first, again, other, named, told, retold = (
        item.group_or_prompt for item in read_generations(written(tmp_path / "f", *lines))
    )
    assert first == again
    assert told == retold
    assert len({first, other, named, told}) == 4
    assert named == "mine"
    sides = [{**GOOD, "id": str(number), "split": side} for number, side in enumerate(["train", "test"])]
    with pytest.raises(InvalidData, match="never straddle a split"):
        read_generations(written(tmp_path / "g", *sides))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops", "not JSON"),
        ([1, 2], "a JSON list"),
        ({"prompt": "p", "response": "r"}, "`id` is missing"),
        ({"id": "b", "prompt": "p"}, "`response` is missing"),
        ({"id": "b", "response": "r"}, "either `prompt` or `messages`"),
        ({**GOOD, "id": "b", "messages": [{"role": "user", "content": "x"}]}, "and not both"),
        ({**GOOD, "id": "b", "label": 2}, "`label` is 2; expected 0, 1 or null"),
        ({**GOOD, "id": "b", "label": True}, "`label` is true"),
        ({**GOOD, "id": "b", "label": 1.0}, "`label` is 1.0"),
        ({**GOOD, "id": "b", "split": "validation"}, "`train` or `test`"),
        ({**GOOD, "id": "b", "references": "x"}, "a list of strings"),
        ({**GOOD, "id": "b", "lable": 1}, "unknown field `lable`"),
        ({"id": "b", "messages": [{"role": "user"}], "response": "r"}, "`role` and `content`"),
        ({**GOOD, "id": 7}, "`id` is 7"),
        (GOOD, "used in line 1 already"),
        ('{"id": "b", "prompt": "p", "response": "r", "meta": {"n": %s}}' % ("1" * 5000), "can't be kept: Exceeds"),
        ('{"id": "b", "prompt": "p", "response": "r", "meta": {"n": 1e999}}', "1e999 is no finite number"),
        ('{"id": "b", "prompt": "p", "response": "r", "meta": {"n": NaN}}', "NaN is no finite number"),
        ('{"id": "b", "prompt": "\\ud800", "response": "r"}', "\\ud800 is half of a surrogate pair"),
        ('{"id": "b", "prompt": "p", "response": "r", "meta": {"\\uDC00": 1}}', "half of a surrogate pair"),
        ('{"id": "b", "prompt": "p", "response": "r", "meta": {"n": %s}}' % ("[" * 200 + "]" * 200), "nested more"),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, line: object, says: str) -> None:
    with pytest.raises(InvalidData, match="line 3: ") as caught:
        read_generations(written(tmp_path / "f.jsonl", GOOD, "", line))
    assert caught.value.line == 3
    assert says in str(caught.value)


def test_a_group_on_both_sides_of_a_split_is_refused(tmp_path: Path) -> None:
    lines = [
        {**GOOD, "id": str(n), "group": "paris", "split": side} for n, side in enumerate(["test", "test", "train"])
    ]
    with pytest.raises(InvalidData, match=r"line 3: group `paris` is train here and test in line 1"):
        read_generations(written(tmp_path / "f.jsonl", *lines))


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="no such file"):
        read_generations(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidData, match="no items"):
        read_generations(written(tmp_path / "empty.jsonl"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"id": 1}')[:-6])
    bent = bytearray(gzip.compress(json.dumps(GOOD).encode() * 50))
    bent[len(bent) // 2] ^= 0xFF
    (tmp_path / "bent.gz").write_bytes(bent)
    (tmp_path / "plain.gz").write_text(json.dumps(GOOD))
    for name in ("cut.gz", "bent.gz", "plain.gz"):
        with pytest.raises(InvalidData, match="can't be read"):
            read_generations(tmp_path / name)


def test_questions_pass_over_answers_and_need_none(tmp_path: Path) -> None:
    first, second = read_questions(written(tmp_path / "f.jsonl", GOOD, {"id": "b", "prompt": "p"}))
    assert (first.id, second.prompt) == ("a", "p")
    assert not hasattr(first, "label")
