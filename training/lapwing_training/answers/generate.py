"""Lets a model answer questions in batches and keeps what probes and baselines need; resumable after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lapwing_detector.language_model import LanguageModel
from lapwing_training.answers.answering import answer
from lapwing_training.answers.partial import Partial
from lapwing_training.answers.sampling import own_draws
from lapwing_training.data.generations import LabelledGeneration, Question, read_generations
from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.files import digest, unfinished, write_text
from lapwing_training.options import require_seed
from lapwing_training.progress import waiting
from lapwing_training.store.extract import DEFAULT_FEATURES, DEFAULT_K
from lapwing_training.store.gathering import Gathering
from lapwing_training.store.work import prompt_ids_of, require_unique


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are written; greedy at temperature 0."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise InvalidOption(
                f"max_new_tokens is {self.max_new_tokens} and batch_size {self.batch_size}; both must be at least 1"
            )
        if not 0.0 <= self.temperature < math.inf:
            raise InvalidOption(f"temperature is {self.temperature}; it must be finite and at least 0 (greedy)")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidOption(f"top_p is {self.top_p}; it must lie in (0, 1]")
        require_seed(self.seed)


def generate_answers(
    questions: Sequence[Question],
    path: Path,
    loaded: LanguageModel,
    options: GenerateOptions | None = None,
    store: Path | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
    k: int = DEFAULT_K,
) -> dict[str, Any]:
    """Answer every question and write the generations, in the order of the questions.

    Whole batches are appended to a partial file beside `path`, which is renamed at the end. A run that was killed goes
    on after its last whole batch, so that it ends with the bytes of a run that was not.

    Args:
        questions: what is asked.
        path: of the generations.
        loaded: who answers.
        options: how.
        store: directory of a feature store, which is filled from the very forwards that write the answers; once they
            are labelled, `extract_features` adds the labels without any other. None: no features.
        features: ids of the features that the store holds.
        k: eigenvalues kept per head there.

    Returns:
        how many answers there are, and how many an earlier run had left.

    Raises:
        InvalidOption: nothing can be written at `path`, labels stand there, or there is no such feature.
        InvalidData: a prompt that is empty, can't be tokenised, or leaves no room for an answer, or an id that is used
            twice; before any is asked.
        NonFiniteLogits: the model computes NaN.
        StoreMismatch: the store was begun with something else.
        NotEnoughData: none of the answers is long enough for the store; the generations are written all the same.
        OSError: there is no room; what was finished stays.
    """
    options = options or GenerateOptions()
    require_target(path)
    require_unique(questions)
    prompts = [prompt_ids_of(question, loaded, options.max_new_tokens) for question in waiting(questions)]
    gathering = None if store is None else Gathering.into(store, loaded, features, k)
    # Another dtype, and under capture another kernel, write other answers: one run must not go on with the other's.
    asked = [
        loaded.identity.digest,
        loaded.identity.dtype,
        asdict(options),
        [question.to_dict() for question in questions],
    ]
    asked += [] if gathering is None else ["captured"]
    written = Partial.beside(path, asked)
    for stale in unfinished(path):
        stale.unlink()
    done = _resume(written, questions, options.batch_size, gathering, digest(json.dumps(asked).encode()))
    config = _generation_config(loaded, options)
    draws = partial(own_draws, options.temperature, options.top_p, options.seed, loaded.model.device)
    with tqdm(total=len(questions), initial=done, desc="generate", unit="answer") as progress:
        for start in range(done, len(questions), options.batch_size):
            batch = questions[start : start + options.batch_size]
            ids = prompts[start : start + options.batch_size]
            answering = partial(answer, batch, ids, loaded, config, draws)
            number = start // options.batch_size
            answers = answering() if gathering is None else gathering.batch(number, answering)
            written.append([one.item for one in answers])
            progress.update(len(batch))
    write_text(path, written.path.read_text(encoding="utf-8"))
    told = {} if gathering is None else {"store": gathering.finish(read_generations(path))}
    written.path.unlink()
    return {"generations": str(path), "answers": len(questions), "resumed": done, **told}


def require_target(path: Path) -> None:
    """Find out before the model runs, not after it, that its answers could not be written.

    Raises:
        InvalidOption: the path is a directory, lies where nothing can be written, or is a file with labels, which
            would be lost.
    """
    if path.is_dir():
        raise InvalidOption(f"{path} is a directory; give the file to write with --out, such as {path / 'a.jsonl'}")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InvalidOption(f"nothing can be written in {place}; give another file with --out")
    if _holds_labels(path):
        raise InvalidOption(f"{path} holds labels; give another file with --out or remove it")


def _holds_labels(path: Path) -> bool:
    try:
        return path.exists() and any(item.label is not None for item in read_generations(path))
    except InvalidData:  # nothing that was generated
        return False


def _resume(
    written: Partial, questions: Sequence[Question], batch_size: int, gathering: Gathering | None, asked: str
) -> int:
    """Cut what an earlier run left back to its whole batches, with their features; how many answers it holds then."""
    answers: list[LabelledGeneration] = written.answers([question.id for question in questions])
    if gathering is not None:
        done = gathering.begin(asked, answers, batch_size)
    else:
        done = len(answers) if len(answers) == len(questions) else len(answers) // batch_size * batch_size
    written.keep(done)
    return done


def _generation_config(loaded: LanguageModel, options: GenerateOptions) -> Any:
    import transformers

    config: Any = transformers.GenerationConfig
    # Everything is named: a model's own defaults (top_k, repetition penalty) would change the distribution silently.
    return config(
        do_sample=False,  # what is sampled is drawn by `own_draws`
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=loaded.pad_id,
        eos_token_id=sorted(loaded.stop_tokens) or None,
        output_logits=True,
        return_dict_in_generate=True,
    )
