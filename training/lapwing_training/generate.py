"""Lets a model answer questions in batches and keeps what the baselines need; resumable after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lapwing_detector.errors import InvalidInput
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.tokens import TokenIds, build_ids
from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.files import digest, write_text
from lapwing_training.generations import LabelledGeneration, Question, to_line


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
        if self.temperature < 0.0:
            raise InvalidOption(f"temperature is {self.temperature}; it must be at least 0, which is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidOption(f"top_p is {self.top_p}; it must lie in (0, 1]")


def generate_answers(
    questions: Sequence[Question], path: Path, loaded: LanguageModel, options: GenerateOptions | None = None
) -> dict[str, Any]:
    """Answer every question and write the generations, in the order of the questions.

    Whole batches are appended to a partial file beside `path`, which is renamed at the end. A run that was killed goes
    on after its last whole batch, so that it ends with the bytes of a run that was not.

    Returns:
        how many answers there are, and how many an earlier run had left.
    """
    from tqdm import tqdm

    options = options or GenerateOptions()
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
            answers = answer(batch, loaded, options, options.seed + start, tokenizer.tokenizer)
            file.write("".join(to_line(item) for item in answers))
            file.flush()
            progress.update(len(batch))
    write_text(path, partial.read_text(encoding="utf-8"))
    partial.unlink()
    return {"generations": str(path), "answers": len(questions), "resumed": done}


def answer(
    batch: Sequence[Question], loaded: LanguageModel, options: GenerateOptions, seed: int, tokenizer_digest: str
) -> list[LabelledGeneration]:
    """One padded batch; sampling depends on the seed alone, not on what ran before."""
    import torch

    prompts = [ids_of(question, loaded).prompt_ids for question in batch]
    longest = max(len(ids) for ids in prompts)
    rows = [[loaded.pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = loaded.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        model: Any = loaded.model
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),  # (batch, tokens)
            attention_mask=torch.tensor(masks, device=device),
            generation_config=_generation_config(loaded, options),
        )
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


def _finished(
    question: Question,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    scores: Sequence[float],
    loaded: LanguageModel,
    tokenizer_digest: str,
) -> LabelledGeneration:
    length = next((place for place, token in enumerate(tokens) if token in loaded.stop_tokens), len(tokens))
    response_ids = list(tokens[:length])
    meta = {
        **question.meta,
        "log_probability": sum(scores[:length]) / length if length else None,
        "token_ids": [*prompt_ids, *response_ids],
        "prompt_tokens": len(prompt_ids),
        "tokenizer": tokenizer_digest[:12],
        "finish_reason": "stop" if length < len(tokens) else "length",
    }
    asked = {entry.name: getattr(question, entry.name) for entry in fields(Question)} | {"meta": meta}
    text = loaded.tokenizer.decode(response_ids, skip_special_tokens=True)
    return LabelledGeneration(**asked, response=str(text).strip(), model=loaded.name)


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
    while found < min(len(whole), len(ids)) and json.loads(whole[found])["id"] == ids[found]:
        found += 1
    done = found if found == len(questions) else found // batch_size * batch_size
    with partial.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in whole[:done]))
    return done
