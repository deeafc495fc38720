"""Questions of a few words, and a run that stops in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from training_fakes import WORDS

from lapwing_detector.features import FEATURES
from lapwing_training.answers import generate as generate_module
from lapwing_training.answers.generate import GenerateOptions
from lapwing_training.data.generations import Question

GREEDY = GenerateOptions(max_new_tokens=6, batch_size=3)


def questions(count: int = 8) -> list[Question]:
    return [
        Question(id=f"q{n}", prompt=" ".join(WORDS[: 2 + n % 5]), group=f"g{n}", references=("x",), meta={"kind": "k"})
        for n in range(count)
    ]


ALL = tuple(FEATURES)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def power_cut(at: int) -> Iterator[None]:
    """The batch of this number, from 1, is not answered any more."""
    plain, calls = generate_module.answer, []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == at:
            raise RuntimeError("power cut")
        return plain(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(generate_module, "answer", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            yield
