from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from lapwing_training.cli.importing import import_
from lapwing_training.columns import Columns, Polarity
from lapwing_training.data_sets import Source
from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.generations import LabelledGeneration, read_generations
from lapwing_training.importing import Imported, import_table

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"  # before `datasets` is imported

KINDS = ("csv", "csv.gz", "json", "json-lines", "jsonl", "jsonl.gz", "parquet", "saved", "saved-splits", "folder")
ROWS: list[dict[str, Any]] = [
    {
        "question": "Where is Lyon?",
        "answer": "In\r\nParis",
        "verdict": "Right",
        "topic": "geo",
        "accepted": ["France"],
    },
    {"question": 'Who "was" it, São?', "answer": "Nobody", "verdict": "wrong", "topic": None, "accepted": ["A", "B"]},
    {
        "question": "Where is Lyon?",
        "answer": "In\u2028Rome\U0001f986",
        "verdict": None,
        "topic": "geo",
        "accepted": [],
    },
    {"question": "Why?", "answer": " So. ", "verdict": "right", "topic": "x", "accepted": ["It, is"]},
]
COLUMNS = Columns(prompt="question", response="answer", label="verdict", references="accepted", meta=("topic",))
STATED = Polarity("wrong", "right")


def table(folder: Path, kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of one kind; what to call it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("table[1].json" if kind == "json-lines" else f"table[1].{kind}")
    if kind.startswith("csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
        write_bytes(path, text.getvalue().encode())
    elif kind == "json":
        write_bytes(path, json.dumps(rows, indent=1).encode())
    elif kind.startswith("json"):
        write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        return data_set(folder, kind, rows)
    return str(path)


def data_set(folder: Path, kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    import datasets

    data = datasets.Dataset.from_list([dict(row) for row in rows])
    place = folder / ("table[1].parquet" if kind == "parquet" else kind)
    if kind == "saved":
        data.save_to_disk(place)
    elif kind == "saved-splits":
        datasets.DatasetDict({"test": data}).save_to_disk(place)
    else:
        place.parent.mkdir(exist_ok=True)
        data.to_parquet(place if kind == "parquet" else place / "train.parquet")
    return str(place)


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def brought(
    name: str | Path, columns: Columns = COLUMNS, polarity: Polarity | None = STATED, **source: str
) -> Imported:
    return import_table(Source(str(name), **source), columns, polarity)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("import")(import_)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["import", *map(str, arguments)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_table_is_the_same_items_in_every_format(tmp_path: Path, kind: str) -> None:
    found = brought(table(tmp_path, kind, ROWS))
    assert found.rejected == ()
    for item, row in zip(found.items, ROWS, strict=True):
        topic = row["topic"] if row["topic"] or "csv" not in kind else ""  # CSV knows no null
        assert (item.prompt, item.response, item.references) == (row["question"], row["answer"], tuple(row["accepted"]))
        assert (item.meta, item.mode, item.group) == ({"topic": topic}, "supplied", None)
    assert [item.label for item in found.items] == [0, 1, None, 0]
    assert [item.id for item in found.items] == [
        item.id for item in brought(table(tmp_path / "x", "jsonl", ROWS)).items
    ]


@pytest.mark.parametrize(
    ("spelt", "stated"), [("WRONG ", "wrong"), (True, "true"), (1, "1"), ("0", "0"), (False, "False")]
)
def test_a_label_is_compared_by_its_spelling(spelt: object, stated: str) -> None:
    assert Polarity(stated, "other").label_of(spelt) == 1
    assert Polarity("other", stated).label_of(spelt) == 0
    assert Polarity("more", "less").label_of(spelt) is None


def test_control_swapped_polarity_swaps_every_label_and_nothing_else(tmp_path: Path) -> None:
    source = table(tmp_path, "csv", ROWS)
    plain, swapped = brought(source).items, brought(source, polarity=Polarity("right", "wrong")).items
    assert [{0: 1, 1: 0}.get(item.label) for item in plain] == [item.label for item in swapped]
    assert {item.label for item in plain} == {0, 1, None}
    assert [item.to_dict() | {"label": 0} for item in plain] == [item.to_dict() | {"label": 0} for item in swapped]


def test_a_label_that_was_not_stated_becomes_null_and_is_counted(tmp_path: Path) -> None:
    rows = [dict(ROWS[0], verdict=verdict) for verdict in ("right", "maybe", "Maybe", "", "wrong")]
    found = brought(table(tmp_path, "jsonl", rows))
    assert [item.label for item in found.items] == [0, None, None, None, 1]
    assert found.other_labels == {"maybe": 2, "": 1}
    with pytest.raises(InvalidData, match=r"no value of column `verdict` is `1` or `0`; found `maybe` \(2\)"):
        brought(table(tmp_path, "jsonl", rows), polarity=Polarity("1", "0"))


def test_without_a_label_column_every_label_is_null(tmp_path: Path) -> None:
    columns = Columns(prompt="question", response="answer")
    assert {item.label for item in brought(table(tmp_path, "json", ROWS), columns, None).items} == {None}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--prompt question --label verdict", "which of them means hallucinated is never guessed"),
        ("--prompt question --label verdict --hallucinated-is wrong", "hallucinated is `wrong` and right is ``"),
        ("--prompt question --label verdict --hallucinated-is x --right-is X", "state two different values"),
        ("--prompt question --hallucinated-is wrong --right-is right", "label column is ``"),
        ("--prompt question --mode made", "mode is `made`; known are generated, supplied"),
        ("--prompt question --config x", "is a file and has neither"),
        ("", "prompt column is `` and messages column is ``; name one"),
        ("--prompt question --messages answer", "name one of the two"),
        (
            "--prompt Question",
            "column is `Question`; the columns of SOURCE are question, answer, verdict, topic, a",
        ),
        ("--prompt question --meta topic,lost.field", "column is `lost.field`"),
        ("--prompt question --rejected SOURCE", "SOURCE is the table itself"),
        ("--prompt question --rejected OUT", "written twice"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_is_not_stated_or_not_there_is_status_2(tmp_path: Path, kind: str, options: str, says: str) -> None:
    source, out = table(tmp_path, kind, ROWS), tmp_path / "out.jsonl"
    words = options.replace("SOURCE", source).replace("OUT", str(out)).split()
    result = run(source, "--out", out, "--response", "answer", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says.replace("SOURCE", source) in result.stderr
    assert not out.exists()


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


def test_made_ids_follow_the_content_and_not_the_order_or_the_label(tmp_path: Path) -> None:
    plain = {item.response: item.id for item in brought(table(tmp_path / "a", "jsonl", ROWS)).items}
    other = [dict(row, verdict="wrong", topic="new") for row in random.Random(1).sample(ROWS, len(ROWS))]
    assert {item.response: item.id for item in brought(table(tmp_path / "b", "csv", other)).items} == plain
    again = brought(table(tmp_path / "c", "jsonl", [ROWS[0], ROWS[1], ROWS[0]])).items
    assert [item.id for item in again] == [plain["In\r\nParis"], plain["Nobody"], plain["In\r\nParis"] + "-2"]
    changed = brought(table(tmp_path / "d", "jsonl", [dict(ROWS[0], answer="?")])).items
    assert changed[0].id not in plain.values()


def test_chat_messages_and_fields_of_objects_are_found(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Where?"}]
    rows = [{"talk": chat, "out": {"best": "There", "all": {"of": ["x"]}}}] * 2
    columns = Columns(messages="talk", response="out.best", references="out.all.of")
    for kind in ("jsonl", "parquet"):
        items = brought(table(tmp_path, kind, rows), columns, None).items
        assert (items[0].messages, items[0].response, items[0].references) == ((chat[0],), "There", ("x",))
        lost = brought(table(tmp_path, kind, rows), Columns(messages="talk", response="out.worst"), None)
        assert str(lost.rejected[0]).endswith("column `out` has the fields best, all; expected `worst`, too")
    as_text = [{"talk": json.dumps(chat), "out": "There"}, {"talk": "hi", "out": "There"}]
    found = brought(table(tmp_path, "csv", as_text), Columns(messages="talk", response="out"), None)
    assert found.items[0].messages == (chat[0],)
    assert "field `messages` is" in found.rejected[0].reason


def test_a_split_is_named_where_there_are_several(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"left": data, "right": data.select([0])}).save_to_disk(tmp_path / "d")
    for name in ("", "middle"):
        with pytest.raises(InvalidOption, match=f"split is `{name}`; the splits of .* are left, right"):
            brought(tmp_path / "d", split=name)
    assert len(brought(tmp_path / "d", split="right").items) == 1
    data.save_to_disk(tmp_path / "one")
    with pytest.raises(InvalidOption, match=r"split is `left`; .* has no splits"):
        brought(tmp_path / "one", split="left")


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


def test_without_the_library_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    for name in (str(tmp_path / "t.parquet"), "squad"):
        with pytest.raises(InvalidData, match=r"pip install 'lapwing\[data\]'"):
            brought(name)
    assert len(brought(table(tmp_path, "csv", ROWS)).items) == len(ROWS)


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


def test_the_mode_is_one_of_two(tmp_path: Path) -> None:
    line = {"id": "a", "prompt": "p", "response": "r", "mode": "supplied"}
    assert read_generations(write_bytes(tmp_path / "a", json.dumps(line).encode()))[0].mode == "supplied"
    with pytest.raises(InvalidData, match=r"field `mode` is .* expected `generated` or `supplied`"):
        read_generations(write_bytes(tmp_path / "b", json.dumps(line | {"mode": "other"}).encode()))
    assert LabelledGeneration(id="a", prompt="p", response="r").mode is None


def test_help_teaches_and_nothing_heavy_is_loaded() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: lapwing import " in result.stdout
    code = (
        "import sys, lapwing_training.cli.importing, lapwing_training.cli.generate\n"
        "heavy = ('numpy', 'torch', 'sklearn', 'transformers', 'datasets', 'pyarrow', 'tqdm')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "import lapwing_training.importing\n"
        "print([name for name in heavy[:-1] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
