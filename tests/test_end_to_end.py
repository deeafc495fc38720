"""The whole way as a user goes it: by commands, over files, processes and a socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lapwing_client import Client, InvalidRequest, NotFound
from lapwing_client.local_server import running_server
from lapwing_detector.detector import Detector
from lapwing_detector.embedded import generations_path, model_path
from lapwing_detector.features import FEATURES
from lapwing_detector.probe import Probe
from lapwing_training.data.generations import read_generations

QUESTION = "Question: which country is the city of Lyon in? Answer:"


def lapwing(*arguments: object, code: int = 0, cwd: Path | None = None) -> str:
    """Runs the command as a shell would; its standard output."""
    command = [sys.executable, "-m", "lapwing_client", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


@contextmanager
def serving(*arguments: object) -> Iterator[Client]:
    """A server in a process of its own, ready."""
    with running_server([str(argument) for argument in arguments]) as address, Client(address) as client:
        client.wait_until_ready(120)
        yield client


@pytest.fixture(scope="module")
def library() -> Detector:
    return Detector.from_pretrained()


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    with serving() as client:
        yield client


def test_a_score_over_the_wire_is_that_of_the_library(server, library):
    items = [
        (QUESTION, "France"),
        (QUESTION, "Peru"),
        ([{"role": "user", "content": "what is the calling code of Japan?"}], "+81"),
        (library.tokens(QUESTION).prompt_ids, library.tokens(QUESTION, "France").response_ids),
    ]
    for prompt, response in items:
        mine, theirs = library.score(prompt, response), server.score(prompt, response)
        assert theirs.token_ids == mine.token_ids
        assert theirs.logit == pytest.approx(mine.logit, abs=1e-5)
        assert theirs.probability == pytest.approx(mine.probability, abs=1e-5)
        assert theirs.token_contributions == pytest.approx(mine.token_contributions.tolist(), abs=1e-5)
        assert (theirs.flagged, theirs.probe_revision) == (mine.flagged, mine.probe_revision)
    batch = server.score_batch(items)
    assert [one.logit for one in batch] == pytest.approx([library.score(*one).logit for one in items], abs=1e-5)
    # Control: another answer is another score.
    assert abs(batch[0].logit - batch[1].logit) > 1e-3


def test_an_answer_scored_while_written_scores_the_same_when_read(server, library):
    *tokens, last = server.generate(QUESTION, max_new_tokens=16)
    read = library.score(last.prompt_token_ids, last.token_ids)
    assert last.detection.logit == pytest.approx(read.logit, abs=1e-4)
    for token in tokens:
        prefix = last.token_ids[: token.index + 1]
        assert token.logit == pytest.approx(library.score(last.prompt_token_ids, prefix).logit, abs=1e-4)
    assert "".join(token.text for token in tokens) == last.text


def test_the_server_shows_the_embedded_probe_and_its_heatmaps(server, library):
    probe = server.probe()
    assert probe.revision == library.probe.revision
    for feature in ("attention_score.v1", "laplacian_eigenvalues.v1"):
        heatmap = server.heatmap("P_VALUE", feature=feature, image="png")
        stored = library.probe.head_map(feature, "P_VALUE").values
        assert heatmap.values.shape == stored.shape
        assert heatmap.values.values == pytest.approx(stored.ravel().tolist(), abs=0)
        assert heatmap.image.startswith(b"\x89PNG")
    with pytest.raises(NotFound):
        server.heatmap("P_VALUE", probe="no-such-probe")
    with pytest.raises(InvalidRequest):
        server.heatmap("P_VALUE", feature="astrology.v1")


def test_a_probe_is_retrained_by_commands_and_served(tmp_path):
    """generate -> label -> extract -> train -> evaluate -> heatmap -> serve, on a small share of the questions."""
    shipped = read_generations(generations_path())
    chosen = [item for item in shipped if item.meta["relation"] in ("country", "timezone")][:500]
    questions = tmp_path / "questions.jsonl"
    kept = ("relation", "truth")
    lines = [
        {
            "id": item.id,
            "prompt": item.prompt,
            "group": item.group,
            "references": list(item.references),
            "meta": {name: item.meta[name] for name in kept},
        }
        for item in chosen
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers, labelled = tmp_path / "answers.jsonl", tmp_path / "labelled.jsonl"
    store, probe = tmp_path / "store", tmp_path / "probe"
    lapwing("generate", questions, "--out", answers, "--max-new-tokens", 24)
    lapwing("label", answers, "--out", labelled)
    again = {item.id: item for item in read_generations(labelled)}
    assert [again[item.id].label for item in chosen] == [item.label for item in chosen]
    lapwing("extract", labelled, "--out", store, "--stratum", "meta.relation")
    trained = json.loads(lapwing("train", store, "--out", probe, "--name", "mine", "--test-share", 0.3, "--json"))
    assert trained["revision"] == Probe.from_pretrained(probe).revision
    assert (probe / "report.md").read_text().startswith("# Report: mine")
    assert "<script" not in (probe / "report.html").read_text()
    examples = [one for side in Probe.from_pretrained(probe).metrics["examples"].values() for one in side]
    assert all(len(one["tokens"]) == len(one["contributions"]) for one in examples), "by the model at hand"
    judged = json.loads(lapwing("evaluate", probe, store, "--seen-groups", "--json"))
    assert judged["test"]["rows"] == 500
    lapwing("heatmap", "--probe", probe, "--out", tmp_path / "pair.png")
    assert (tmp_path / "pair.png").read_bytes().startswith(b"\x89PNG")
    with serving("--model", model_path(), "--probes", probe) as client:
        assert client.probe().name == "mine"
        mine = Detector.from_pretrained(model_path(), probe).score(QUESTION, "France")
        assert client.score(QUESTION, "France").logit == pytest.approx(mine.logit, abs=1e-5)


def test_the_demo_runs_and_draws(tmp_path):
    out = tmp_path / "pictures"
    text = lapwing("demo", "--out", out)
    for part in ("made up?", "FLAGGED", "held-out AUROC", "mean token log-probability", "LapEigvals", str(out)):
        assert part in text
    assert {path.name for path in out.iterdir()} == {"p_values.png", "selected_heads.png"}
    told = json.loads(lapwing("demo", "--out", out, "--json"))
    assert len(told["asked"]) == 12
    assert any(one["wrong"] for one in told["asked"])
    assert any(not one["wrong"] for one in told["asked"])
    for one in told["asked"]:
        assert one["trail"][-1] == pytest.approx(one["detection"]["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("heatmap", "--statistic", "MEAN"), 2, "known are P_VALUE"),
        (("heatmap", "--feature", "astrology"), 1, "it has"),
        (("heatmap", "--out", "map.pdf"), 2, ".png or .svg"),
        (("heatmap", "--probe", "no/such/probe"), 1, "lapwing train"),
        (("nonsense",), 2, "No such command"),
        (("train", "no-store", "--out", "probe"), 1, "no-store"),
        (("score", "--prompt", "only"), 2, "--response"),
        (("score", "--server", "127.0.0.1:1", "--prompt", "a", "--response", "b", "--timeout", "3"), 1, "127.0.0.1:1"),
    ],
)
def test_wrong_use_says_what_to_do_and_leaves_nothing_behind(tmp_path, arguments, code, expected):
    said = lapwing(*arguments, code=code, cwd=tmp_path)
    assert expected in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch_and_every_verb_teaches_by_an_example():
    listed = lapwing("--help")
    for verb in ("demo", "generate", "label", "extract", "train", "evaluate", "heatmap", "serve", "score"):
        assert verb in listed
        assert "Example: lapwing" in " ".join(lapwing(verb, "--help").split())
    code = "import sys; from lapwing_client.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_feature_has_a_versioned_id():
    assert all(feature == FEATURES[feature].id and feature.endswith(".v1") for feature in FEATURES)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
