"""Runs that are killed at chosen moments, and run again: are the files those of a run that was not?

    python kills.py MODEL DIRECTORY KILLS SEED

One process imports everything and forks a child for every run, since starting Python takes seconds. A moment is a call
of one of the functions that touch a file or ask the model; which of them, is drawn by lot.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from training_fakes import make_table, write_store

from lapwing_detector.language_model import LanguageModel
from lapwing_training.answers.generate import GenerateOptions, generate_answers
from lapwing_training.data.generations import LabelledGeneration, Question
from lapwing_training.probe.train import TrainOptions, train_probe
from lapwing_training.store.extract import ExtractOptions, extract_features

WATCHED = frozenset(
    (
        "open",
        "write",
        "flush",
        "close",
        "fsync",
        "replace",
        "unlink",
        "truncate",
        "mkdir",
        "mkstemp",
        "softmax",
        "linear",
        "cumsum",
    )
)
WORDS = ["the", "capital", "of", "france", "is", "paris", "rome", "berlin", "oslo", "where", "city", "in", "river"]


LAZY = ("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "sklearn.metrics")
"""What a run loads only when it draws; here once, before the runs."""


def generate(loaded: LanguageModel, place: Path) -> None:
    asked = [Question(id=f"q{number}", prompt=" ".join(WORDS[: 2 + number % 5])) for number in range(10)]
    options = GenerateOptions(max_new_tokens=5, batch_size=3, temperature=1.0)
    generate_answers(asked, place / "answers.jsonl", loaded, options, place / "store", k=3)


def extract(loaded: LanguageModel, place: Path) -> None:
    prompts = [" ".join(WORDS[: 3 + number % 4]) for number in range(20)]
    items = [
        LabelledGeneration(id=f"i{number}", prompt=prompt, response="is paris", label=number % 2)
        for number, prompt in enumerate(prompts)
    ]
    options = ExtractOptions(k=3, batch_size=3, shard_items=6, stages=(0.5,))
    extract_features(items, place / "store", loaded, options)


def train(store: Path, place: Path) -> None:
    train_probe(store, place / "probe", TrainOptions(k=2, test_share=0.3, resamples=5))


def tasks(loaded: LanguageModel, directory: Path) -> dict[str, Callable[[Path], None]]:
    store = write_store(directory / "store", make_table(rows=60, layers=2, heads=2, k=2, planted=(1,), strength=2.0))
    return {
        "generate": partial(generate, loaded),
        "extract": partial(extract, loaded),
        "train": partial(train, store),
    }


class Moments:
    """Counts calls of the watched functions and kills the process at one of them."""

    def __init__(self, fatal: int | None) -> None:
        self.count, self.fatal = 0, fatal

    def __call__(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in WATCHED:
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[Path], None], place: Path, fatal: int | None = None, counted: Path | None = None) -> bool:
    """Whether a child process came to the end of the work.

    Args:
        fatal: the moment at which it is killed.
        counted: where it writes how many moments there were. Watching for them takes longer than the work.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            moments = Moments(fatal)
            if fatal is not None or counted is not None:
                sys.setprofile(moments)
            work(place)
            sys.setprofile(None)
            if counted is not None:
                counted.write_text(str(moments.count))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a run failed by itself")
    return not os.WIFSIGNALED(status)


def contents(place: Path) -> dict[str, bytes]:
    """By relative path; a probe that was being saved lies in a hidden directory, which nobody reads."""
    paths = [path for path in sorted(place.rglob("*")) if path.is_file()]
    named = {str(path.relative_to(place)): path for path in paths}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".probe.")}


def runs_of(work: Callable[[Path], None], place: Path, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Kill the work again and again, each time in a new place, and let it go on there."""
    counted, told = place / "count", []
    assert forked(work, place / "whole", counted=counted)
    whole, moments = contents(place / "whole"), int(counted.read_text())
    for number in range(kills):
        killed, fatal = place / str(number), draw.randint(1, moments)
        finished = forked(work, killed, fatal)
        halfway = contents(killed)
        forked(work, killed)
        told.append(
            {
                "moment": fatal / moments,
                "finished": finished,
                "unlike": sorted(name for name in halfway if name in whole and halfway[name] != whole[name]),
                "same": contents(killed) == whole,
            }
        )
    return told


def main(model: str, directory: str, kills: str, seed: str) -> None:
    for module in LAZY:
        import_module(module)
    torch.set_num_threads(1)  # threads do not survive a fork
    tqdm.monitor_interval = 0
    loaded, draw, told = LanguageModel.load(model), random.Random(int(seed)), {}
    for task, work in tasks(loaded, Path(directory)).items():
        place = Path(directory) / task
        place.mkdir()
        told[task] = runs_of(work, place, int(kills), draw)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
