"""One table in every format that can be imported."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

from lapwing_training.cli.importing import import_
from lapwing_training.data.columns import Columns, Polarity
from lapwing_training.data.data_sets import Source
from lapwing_training.data.importing import Imported, import_table

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
