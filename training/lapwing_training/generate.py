"""Lets a model answer questions in batches and keeps what the baselines need; resumable after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lapwing_detector.errors import InvalidInput
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.tokens import TokenIds, build_ids
from lapwing_training.errors import InvalidData, InvalidOption, NonFiniteLogits
from lapwing_training.files import digest, write_text
from lapwing_training.generations import LabelledGeneration, Question, parse_line, to_line
from lapwing_training.options import require_seed
from lapwing_training.progress import waiting


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
    questions: Sequence[Question], path: Path, loaded: LanguageModel, options: GenerateOptions | None = None
) -> dict[str, Any]:
    """Answer every question and write the generations, in the order of the questions.

    Whole batches are appended to a partial file beside `path`, which is renamed at the end. A run that was killed goes
    on after its last whole batch, so that it ends with the bytes of a run that was not.

    Returns:
        how many answers there are, and how many an earlier run had left.

    Raises:
        InvalidOption: nothing can be written at `path`.
        InvalidData: a prompt that is empty, can't be tokenised, or leaves no room for an answer; before any is asked.
        NonFiniteLogits: the model computes NaN.
    """
    options = options or GenerateOptions()
    require_target(path)
    prompts = [prompt_ids_of(question, loaded) for question in waiting(questions)]
    tokenizer = loaded.identity
    partial = _partial(path, questions, options, tokenizer.digest)
    done = _resume(partial, questions, options.batch_size)
    starts = range(done, len(questions), options.batch_size)
    with (
        partial.open("a", encoding="utf-8", newline="\n") as file,
        tqdm(total=len(questions), initial=done, desc="generate", unit="answer") as progress,
    ):
        for start in starts:
            batch = questions[start : start + options.batch_size]
            ids = prompts[start : start + options.batch_size]
            answers = answer(batch, ids, loaded, options, options.seed + start, tokenizer.tokenizer)
            file.write("".join(to_line(item) for item in answers))
            file.flush()
            progress.update(len(batch))
    write_text(path, partial.read_text(encoding="utf-8"))
    partial.unlink()
    return {"generations": str(path), "answers": len(questions), "resumed": done}


def require_target(path: Path) -> None:
    """Find out before the model runs, not after it, that its answers could not be written.

    Raises:
        InvalidOption: the path is a directory, or lies where nothing can be written.
    """
    if path.is_dir():
        raise InvalidOption(f"{path} is a directory; give the file to write with --out, such as {path / 'a.jsonl'}")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InvalidOption(f"nothing can be written in {place}; give another file with --out")


def answer(
    batch: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    loaded: LanguageModel,
    options: GenerateOptions,
    seed: int,
    tokenizer_digest: str,
) -> list[LabelledGeneration]:
    """One padded batch; sampling depends on the seed alone, not on what ran before.

    Raises:
        NonFiniteLogits: the model computes NaN.
    """
    import torch

    longest = max(len(ids) for ids in prompts)
    rows = [[loaded.pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = loaded.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        model: Any = loaded.model
        try:
            output = model.generate(
                input_ids=torch.tensor(rows, device=device),  # (batch, tokens)
                attention_mask=torch.tensor(masks, device=device),
                generation_config=_generation_config(loaded, options),
            )
        except RuntimeError as error:  # of the sampling, which is the first to look at the numbers
            if "`nan`" in str(error):
                raise _not_finite(batch[0], loaded) from error
            raise
    written = output.sequences[:, longest:].tolist()  # (batch, new tokens)
    scores = _log_probabilities(output, longest)
    return [
        _finished(question, ids, tokens, row_scores, loaded, tokenizer_digest)
        for question, ids, tokens, row_scores in zip(batch, prompts, written, scores, strict=True)
    ]


def ids_of(question: Question, loaded: LanguageModel, response: str | None = None) -> TokenIds:
    """Prompt and response as token ids.

    Raises:
        InvalidData: the item's text can't be tokenised as it stands.
    """
    prompt = list(question.messages) if question.messages else question.prompt or ""
    try:
        return build_ids(loaded.tokenizer, prompt, response)
    except InvalidInput as error:
        raise InvalidData(f"item `{question.id}`", None, str(error)) from error


def prompt_ids_of(question: Question, loaded: LanguageModel) -> tuple[int, ...]:
    """The prompt as token ids, with room for an answer.

    Raises:
        InvalidData: the prompt is empty, can't be tokenised or is too long.
    """
    ids = ids_of(question, loaded).prompt_ids
    if len(ids) >= loaded.max_tokens:
        raise InvalidData(
            f"item `{question.id}`",
            None,
            f"the prompt has {len(ids)} tokens, {loaded.name} reads at most {loaded.max_tokens} with its answer; "
            "shorten it or leave it out",
        )
    return ids


def _not_finite(question: Question, loaded: LanguageModel) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"the logits of {loaded.name} in {loaded.identity.dtype} are not finite for item `{question.id}` or its batch; "
        "expected numbers: try --dtype float32"
    )


def _finished(
    question: Question,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    scores: Sequence[float],
    loaded: LanguageModel,
    tokenizer_digest: str,
) -> LabelledGeneration:
    # Tokens after the end are padding, and what the model makes of them is nobody's business.
    length = next((place for place, token in enumerate(tokens) if token in loaded.stop_tokens), len(tokens))
    response_ids = list(tokens[:length])
    if not all(math.isfinite(score) for score in scores[: length + 1]):
        raise _not_finite(question, loaded)
    generation = {
        "log_probability": sum(scores[:length]) / length if length else None,
        "token_ids": [*prompt_ids, *response_ids],
        "prompt_tokens": len(prompt_ids),
        "tokenizer": tokenizer_digest[:12],
        "finish_reason": "stop" if length < len(tokens) else "length",
    }
    asked = {entry.name: getattr(question, entry.name) for entry in fields(Question)}
    text = loaded.tokenizer.decode(response_ids, skip_special_tokens=True)
    return LabelledGeneration(**asked, response=str(text).strip(), model=loaded.name, generation=generation)


def _generation_config(loaded: LanguageModel, options: GenerateOptions) -> Any:
    import transformers

    config: Any = transformers.GenerationConfig
    # Everything is named: a model's own defaults (top_k, repetition penalty) would change the distribution silently.
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0.0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return config(
        **sampling,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=loaded.pad_id,
        eos_token_id=sorted(loaded.stop_tokens) or None,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _log_probabilities(output: Any, prompt_length: int) -> list[list[float]]:
    """Log-probability of each written token under the model itself, before temperature; (batch, new tokens)."""
    import torch

    columns = [
        torch.log_softmax(logits.float(), dim=-1).gather(1, output.sequences[:, prompt_length + step, None])[:, 0]
        for step, logits in enumerate(output.logits)  # each (batch, vocabulary)
    ]
    return [list(row) for row in torch.stack(columns, dim=1).double().tolist()]


def _partial(path: Path, questions: Sequence[Question], options: GenerateOptions, model: str) -> Path:
    """A file that only the same questions, options and model go on with."""
    asked = json.dumps([model, asdict(options), [question.to_dict() for question in questions]], ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{digest(asked.encode())[:12]}.partial")


def _resume(partial: Path, questions: Sequence[Question], batch_size: int) -> int:
    """Cut the partial file back to its whole batches; how many answers it holds then."""
    if not partial.exists():
        return 0
    whole = partial.read_bytes().split(b"\n")[:-1]  # what follows the last line end was being written
    ids = [question.id for question in questions]
    found = 0
    while found < min(len(whole), len(ids)) and _id_in(whole[found]) == ids[found]:
        found += 1
    done = found if found == len(questions) else found // batch_size * batch_size
    with partial.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in whole[:done]))
    return done


def _id_in(line: bytes) -> str | None:
    """Id of a whole answer; None for a line that a crash left damaged."""
    try:
        return parse_line(line.decode(), LabelledGeneration).id
    except (InvalidData, UnicodeDecodeError):
        return None
