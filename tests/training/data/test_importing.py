"""Tables of others become our items, whatever their format; what a label means is stated, never guessed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from importing_fakes import KINDS, ROWS, brought, run, table, write_bytes

from lapwing_training.data.columns import Columns, Polarity
from lapwing_training.data.generations import LabelledGeneration, read_generations
from lapwing_training.errors import InvalidData, InvalidOption


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


def test_without_the_library_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    for name in (str(tmp_path / "t.parquet"), "squad"):
        with pytest.raises(InvalidData, match=r"pip install 'lapwing\[data\]'"):
            brought(name)
    assert len(brought(table(tmp_path, "csv", ROWS)).items) == len(ROWS)


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
        "import lapwing_training.data.importing\n"
        "print([name for name in heavy[:-1] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
