"""Broken rows and tables are told with where they are, and never dropped in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importing_fakes import ROWS, brought, run, table, write_bytes

from lapwing_training.data.columns import Columns
from lapwing_training.data.generations import read_generations
from lapwing_training.errors import InvalidData

GOOD = {"id": "a", "question": "q", "answer": "r", "verdict": "right", "accepted": [], "topic": 1}
NAMED = Columns(
    prompt="question",
    response="answer",
    label="verdict",
    references="accepted",
    id="id",
    meta=("topic",),
    group="group",
)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{oops", "not JSON (Expecting property name"),
        ([1, 2], "a JSON list; expected an object"),
        ({"id": "b", "answer": "r"}, "column `question` is empty"),
        ({**GOOD, "id": "b", "answer": None}, "column `answer` is empty"),
        ({**GOOD, "id": "b", "answer": " \n"}, "column `answer` is empty"),
        ({**GOOD, "id": "b", "answer": 1.5}, "column `answer` holds 1.5; expected text"),
        ({**GOOD, "id": "b", "question": True}, "column `question` holds True; expected text"),
        ({**GOOD, "id": "b", "question": {"text": "q"}}, "column `question` holds {'text': 'q'}; expected text"),
        ({**GOOD, "id": None}, "column `id` is empty"),
        ({**GOOD, "id": 1.0}, "column `id` holds 1.0"),
        (GOOD, "id `a` was used in line 1 already"),
        ({**GOOD, "id": "b", "group": ["g"]}, "column `group` holds ['g']"),
        ({**GOOD, "id": "b", "accepted": [1.5]}, "field `references` is [1.5]; expected a list of strings"),
        ({**GOOD, "id": "b", "accepted": {"a": 1}}, "column `accepted` holds {'a': 1}"),
        ({**GOOD, "id": "b", "accepted": "['x', 'y']"}, "expected a list as JSON"),
        ('{"id": "b", "question": "q", "answer": "r", "topic": NaN}', "NaN is no finite number"),
        ('{"id": "b", "question": "\\ud800", "answer": "r"}', "half of a surrogate pair"),
        ('{"id": "b", "question": "caf\udce9", "answer": "r"}', "not UTF-8"),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_a_broken_line_of_json_is_told_with_its_number(tmp_path: Path, broken: object, says: str) -> None:
    line = broken if isinstance(broken, str) else json.dumps(broken)
    text = "\n".join([json.dumps({**GOOD, "group": 7}), "", line, json.dumps({**GOOD, "id": 4})]) + "\n"
    found = brought(write_bytes(tmp_path / "t.jsonl", text.encode(errors="surrogateescape")), NAMED)
    assert [(item.id, item.group) for item in found.items] == [("a", "7"), ("4", None)]
    [rejected] = found.rejected
    assert str(rejected).startswith("line 3: ")
    assert says in rejected.reason
    assert len(rejected.reason) < 250


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (b"q,r", "2 cells; the header has 4"),
        (b"q,r,right,[],", "5 cells; the header has 4"),
        (b'q,"",right,[]', "column `answer` is empty"),
        (b'q,"r"x,right,[]', "no row of CSV"),
        (b"caf\xe9,r,right,[]", "column `question` is not UTF-8"),
        (b"q,r,right,\"['a', 'b']\"", "column `accepted` holds \"['a', 'b']\"; expected a list as JSON"),
        (b'q,r,right,"[1, null]"', "field `references`"),
    ],
)
def test_a_broken_row_of_csv_is_told_with_the_line_where_it_starts(tmp_path: Path, broken: bytes, says: str) -> None:
    whole = b'\xef\xbb\xbfquestion,answer,verdict,accepted\n"two\nlines",r,right,one\n\n%s\nq,r,wrong,"[""x"", 1984]"\n'
    path = write_bytes(tmp_path / "t.csv", whole % broken)
    found = brought(path, Columns(prompt="question", response="answer", label="verdict", references="accepted"))
    assert [item.references for item in found.items] == [("one",), ("x", "1984")]
    [rejected] = found.rejected
    assert str(rejected).startswith("line 5: ")
    assert says in rejected.reason


def test_a_quote_that_is_never_closed_is_told(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "t.csv", b'question,answer\nq,r\nq,"r\nq,r\n')
    found = brought(path, Columns(prompt="question", response="answer"), None)
    assert (len(found.items), [one.number for one in found.rejected]) == (1, [3, 4])  # no line vanishes
    assert all("lines 3 to 4 were read as one" in one.reason for one in found.rejected)


def test_a_broken_element_of_a_json_list_breaks_no_other(tmp_path: Path) -> None:
    elements = [json.dumps(GOOD), "3", '{"question": "q",\n "answer": NaN}', json.dumps({**GOOD, "id": 2})]
    path = write_bytes(tmp_path / "t.json", "[\n{},\n{},\n{},\n{}\n]\n".format(*elements).encode())
    found = brought(path, NAMED_PLAIN)
    assert [item.id for item in found.items] == ["a", "2"]
    assert [one.number for one in found.rejected] == [3, 4]


NAMED_PLAIN = Columns(prompt="question", response="answer", label="verdict", id="id")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}', "not JSON; expected `,` or `]`"),
        ('[{"a": 1},', "not JSON"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: not JSON; expected `,`"),
        ('[{"a": 1}]\n[]', "something follows the list"),
        ('"text"', "holds no table"),
        ("", "holds no table"),
    ],
)
def test_a_file_that_is_no_json_list_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidData, match=re.escape(says)):
        brought(write_bytes(tmp_path / "t.json", text.encode()), NAMED_PLAIN)


def test_a_broken_row_of_parquet_is_told_with_its_number(tmp_path: Path) -> None:
    from datetime import date

    rows = [{**GOOD, "id": str(n), "when": None} for n in range(4)]
    rows[1]["answer"], rows[2]["when"] = None, date(2026, 1, 1)
    columns = Columns(prompt="question", response="answer", id="id", meta=("when",))
    found = brought(table(tmp_path, "parquet", rows), columns, None)
    assert [item.id for item in found.items] == ["0", "3"]
    missing, dated = found.rejected
    assert str(missing) == "row 2: column `answer` is empty"
    assert str(dated).startswith("row 3: holds what JSON can't: Object of type date")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: f"x{text}")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=8))
def test_every_row_of_csv_becomes_an_item_or_is_told(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, bool]]
) -> None:
    text, lines = io.StringIO(newline=""), []
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["question", "answer"])
    for question, answer, whole in rows:
        lines.append(1 + len(re.findall(r"\r\n|\r|\n", text.getvalue())))
        writer.writerow([question, answer] if whole else [question, answer, ""])
    path = write_bytes(tmp_path_factory.getbasetemp() / "rows.csv", text.getvalue().encode())
    found = brought(path, Columns(prompt="question", response="answer"), None)
    assert [(item.prompt, item.response) for item in found.items] == [row[:2] for row in rows if row[2]]
    assert [one.number for one in found.rejected] == [n for n, row in zip(lines, rows, strict=True) if not row[2]]


def test_tables_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"question,answer,verdict,accepted,topic\n" * 50)[:-9])
    (tmp_path / "twice.csv").write_text("question,answer,answer\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "text.txt").write_text("hello")
    for name, says in {
        "bad.parquet": "can't be read",
        "bad.csv.gz": "can't be read",
        "twice.csv": "line 1: column `answer` stands there 2 times",
        "empty.csv": "starts without a header",
        "text.txt": "expected one that ends in .csv",
        "absent.csv": "no such file",
        "absent": "can't be read",
    }.items():
        with pytest.raises(InvalidData, match=re.escape(says)):
            brought(tmp_path / name)


MAPPING = ("--prompt", "question", "--response", "answer", "--label", "verdict")
MAPPING += ("--hallucinated-is", "wrong", "--right-is", "right")


def test_with_a_broken_row_nothing_is_written_unless_it_may_be_skipped(tmp_path: Path) -> None:
    source = table(tmp_path, "jsonl", [*ROWS, dict(ROWS[0], answer=""), dict(ROWS[0], verdict="maybe")])
    out, rejected = tmp_path / "out.jsonl", tmp_path / "rejected.jsonl"
    result = run(source, "--out", out, *MAPPING, "--rejected", rejected)
    assert (result.exit_code, result.stdout, out.exists()) == (1, "", False)
    assert f"{source}, line 5: column `answer` is empty\n" in result.stderr
    assert "1 of 6 rows are broken and nothing was written" in result.stderr
    assert [json.loads(line) for line in rejected.open()] == [{"line": 5, "reason": "column `answer` is empty"}]

    result = run(source, "--out", out, *MAPPING, "--skip-broken", "--mode", "generated", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "generations": str(out),
        "items": 5,
        "hallucinated": 1,
        "right": 2,
        "unknown": 2,
        "other_labels": {"": 1, "maybe": 1},
        "rejected": 1,
        "mode": "generated",
    }
    assert "1 labels are `maybe`, which was not stated" in result.stderr
    items = read_generations(out)
    assert [item.mode for item in items] == ["generated"] * 5
    assert items == [*read_generations(out)]


def test_control_a_whole_table_is_written_and_told_for_people(tmp_path: Path) -> None:
    out, rejected = tmp_path / "out.jsonl.gz", tmp_path / "rejected.jsonl"
    result = run(table(tmp_path, "csv", ROWS[:2]), "--out", out, *MAPPING, "--rejected", rejected)
    assert (result.exit_code, result.stderr, rejected.read_text()) == (0, "", "")
    assert "2 items (supplied)" in result.stdout
    assert "1 hallucinated, 1 right, 0 without label; 0 rejected" in result.stdout
    assert [item.label for item in read_generations(out)] == [0, 1]


def test_a_table_of_broken_rows_only_gives_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run(table(tmp_path, "csv", [dict(ROWS[0], answer="")]), "--out", out, *MAPPING, "--skip-broken")
    assert (result.exit_code, out.exists()) == (1, False)
    assert "no items; 1 rows were rejected" in result.stderr
