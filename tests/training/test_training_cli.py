from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import typer
from training_fakes import WORDS, make_table, write_store
from typer.testing import CliRunner, Result

from lapwing_detector.probe import Probe
from lapwing_training.data.generations import read_generations, write_generations

VERBS = {
    entry.name: entry for entry in entry_points(group="lapwing.verbs") if entry.value.startswith("lapwing_training.")
}
"""Those of training, as the dispatcher finds them."""


def run(*arguments: object) -> Result:
    app = typer.Typer()
    for verb, entry in VERBS.items():
        app.command(verb)(entry.load())
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(*arguments: object) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_questions_become_a_probe_step_by_step(tiny_model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    asked = [
        {
            "id": f"q{number}",
            "prompt": " ".join(rng.choice(WORDS, 8)),
            "group": f"g{number}",
            "references": [],
            "meta": {"relation": f"r{number % 2}"},
        }
        for number in range(160)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    answers, labelled, store, probe = (tmp_path / name for name in ("a.jsonl.gz", "l.jsonl", "store", "probe"))

    model = ("--model", tiny_model)
    assert told("generate", questions, "--out", answers, *model, "--max-new-tokens", 4)["answers"] == 160
    # A random model knows nothing; what it says is declared right for every other question.
    items = [
        replace(item, references=(item.response if number % 2 else "nowhere",))
        for number, item in enumerate(read_generations(answers))
    ]
    write_generations(answers, items)
    assert told("label", answers, "--out", labelled)["hallucinated"] == 80
    extracted = told("extract", labelled, "--out", store, *model, "--k", 4, "--stratum", "meta.relation")
    assert extracted["items"] == 160
    trained = told("train", store, "--out", probe, "--k", 3, "--test-share", 0.2)
    assert trained["revision"] == Probe.from_pretrained(probe).revision
    judged = told("evaluate", probe, store)
    assert judged["test"]["auroc"] == trained["metrics"]["test"]["auroc"]
    assert judged["strata"].keys() == {"r0", "r1"}


def test_the_table_is_printed_for_people(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", make_table(rows=300, planted=(2,)))
    result = run("train", store, "--out", tmp_path / "probe", "--test-share", 0.25)
    assert result.exit_code == 0
    assert "lapwing: Laplacian eigenvalues" in result.stdout
    assert "(this probe)" in result.stdout
    result = run("evaluate", tmp_path / "probe", store)
    assert "on held-out rows" in result.stdout.lower()


def test_a_failure_is_one_line_on_standard_error_and_status_1(tmp_path: Path) -> None:
    result = run("train", tmp_path, "--out", tmp_path / "probe")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("lapwing train: ")
    assert "index.json is missing" in result.stderr
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert "bad.jsonl, line 1: field `id` is missing" in run("label", tmp_path / "bad.jsonl", "--out", "x").stderr
    result = run("extract", tmp_path / "bad.jsonl", "--out", tmp_path / "s", "--features", "magic")
    assert "feature is `magic.v1`; known are" in result.stderr


def test_misuse_is_status_2() -> None:
    assert run("train").exit_code == 2
    assert run("extract", "x", "--out", "y", "--k", "many").exit_code == 2


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Everything that a verb needs to get as far as its options."""
    folder = tmp_path_factory.mktemp("things")
    item = {"id": "a", "prompt": "paris", "response": "is in france", "references": ["x"]}
    (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
    write_store(folder / "store", make_table(rows=16))
    return {
        "ITEMS": folder / "items.jsonl",
        "STORE": folder / "store",
        "OUT": folder / "out",
        "MODEL": tiny_model,
        "FOLDER": folder,
    }


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train STORE --out OUT --recipe magic", "recipe is `magic`; known"),
        ("train STORE --out OUT --test-share nan", "test share is nan"),
        ("train STORE --out OUT --k -1", "k is -1; the store holds 1 to 4"),
        ("train STORE --out OUT --name Bad/Name", "name is `Bad/Name`"),
        ("train STORE --out OUT --seed -1", "seed is -1; expected a whole number from 0"),
        ("train STORE --out OUT --seed 1180591620717411303424", "seed is 1180591620717411303424"),
        ("train STORE --out OUT --features ,", "features is empty; name at least one of"),
        ("train STORE --out OUT --features magic", "feature is `magic.v1`; known are"),
        ("evaluate OUT STORE --seed -1", "seed is -1"),
        ("label ITEMS --out OUT --rule magic", "rule is `magic`; known"),
        ("generate ITEMS --out OUT --model MODEL --temperature nan", "temperature is nan"),
        ("generate ITEMS --out OUT --model MODEL --seed -1", "seed is -1"),
        ("generate ITEMS --out FOLDER --model MODEL", "is a directory"),
        ("generate ITEMS --out OUT --model MODEL --device nonsense", "device is `nonsense`, which can't be used here"),
        ("generate ITEMS --out OUT --model MODEL --device meta", "device is `meta`"),
        ("extract ITEMS --out OUT --model MODEL --device cuda:99", "device is `cuda:99`, which can't be used here"),
        ("extract ITEMS --out OUT --model MODEL --dtype float8", "dtype is `float8`; known are float32"),
        ("extract ITEMS --out OUT --model MODEL --features ,", "features is empty"),
        ("extract ITEMS --out OUT --model MODEL --k 0", "k is 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_status_2(things: dict[str, Path], command: str, says: str) -> None:
    result = run(*(things.get(word, word) for word in command.split()))
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not things["OUT"].exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train STORE --out OUT", "need at least 5"),
        ("evaluate OUT STORE", "neither a probe directory nor"),
        ("label OUT --out OUT", "no such file"),
        ("extract ITEMS --out OUT --model OUT", "can't be loaded"),
    ],
)
def test_control_what_fails_is_status_1(things: dict[str, Path], command: str, says: str) -> None:
    result = run(*(things.get(word, word) for word in command.split()))
    assert result.exit_code == 1
    assert says in result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_with_an_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"lapwing {verb} " in result.stdout
    assert "Example:" in result.stdout


def test_the_verbs_load_nothing_heavy_before_they_are_called() -> None:
    modules = ", ".join(sorted(entry.module for entry in VERBS.values()))
    code = (
        f"import sys, {modules}, lapwing_training\n"
        "heavy = ('numpy', 'torch', 'sklearn', 'scipy', 'transformers', 'datasets', 'pandas', 'openai')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_others_do_not() -> None:
    import lapwing_training

    for name in lapwing_training.__all__:
        assert getattr(lapwing_training, name).__name__ == name
    with pytest.raises(AttributeError, match="magic"):
        lapwing_training.magic  # noqa: B018
