"""One batch of questions answered by a model. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lapwing_detector.language_model import LanguageModel
from lapwing_training.data.generations import LabelledGeneration, Question
from lapwing_training.errors import NonFiniteLogits


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    item: LabelledGeneration
    log_probabilities: tuple[float, ...]
    """Of each token of the response, under the model itself, before temperature."""


def answer(
    batch: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    loaded: LanguageModel,
    config: Any,
    draws: Callable[[Sequence[str]], Any] | None = None,
) -> list[Answer]:
    """One padded batch; what is sampled depends on the item and the seed, not on who else is in the batch.

    Args:
        batch: what is asked.
        prompts: its token ids.
        loaded: who answers.
        config: transformers' settings of the generation.
        draws: what samples, from the ids of the batch; greedy without it.

    Raises:
        NonFiniteLogits: the model computes NaN.
    """
    import torch

    longest = max(len(ids) for ids in prompts)
    rows = [[loaded.pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = loaded.model.device
    model: Any = loaded.model
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),  # (batch, tokens)
            attention_mask=torch.tensor(masks, device=device),
            generation_config=config,
            logits_processor=draws([question.id for question in batch]) if draws else None,
        )
    written = output.sequences[:, longest:].tolist()  # (batch, new tokens)
    scores = _log_probabilities(output, longest)
    return [
        _finished(question, ids, tokens, row_scores, loaded)
        for question, ids, tokens, row_scores in zip(batch, prompts, written, scores, strict=True)
    ]


def _not_finite(question: Question, loaded: LanguageModel) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"the logits of {loaded.name} in {loaded.identity.dtype} are not finite for item `{question.id}` or its batch; "
        "expected numbers: try --dtype float32"
    )


def _finished(
    question: Question, prompt_ids: Sequence[int], tokens: Sequence[int], scores: Sequence[float], loaded: LanguageModel
) -> Answer:
    # Tokens after the end are padding, and what the model makes of them is nobody's business.
    length = next((place for place, token in enumerate(tokens) if token in loaded.stop_tokens), len(tokens))
    response_ids = list(tokens[:length])
    if not all(math.isfinite(score) for score in scores[: length + 1]):
        raise _not_finite(question, loaded)
    generation = {
        "log_probability": sum(scores[:length]) / length if length else None,
        "token_ids": [*prompt_ids, *response_ids],
        "prompt_tokens": len(prompt_ids),
        "tokenizer": loaded.identity.tokenizer[:12],
        "model": loaded.identity.digest[:12],
        "finish_reason": "stop" if length < len(tokens) else "length",
    }
    asked = {entry.name: getattr(question, entry.name) for entry in fields(Question)}
    text = str(loaded.tokenizer.decode(response_ids, skip_special_tokens=True)).strip()
    item = LabelledGeneration(**asked, response=text, model=loaded.name, mode="generated", generation=generation)
    return Answer(item, tuple(scores[:length]))


def _log_probabilities(output: Any, prompt_length: int) -> list[list[float]]:
    """Log-probability of each written token under the model itself, before temperature; (batch, new tokens)."""
    import torch

    columns = [
        torch.log_softmax(logits.float(), dim=-1).gather(1, output.sequences[:, prompt_length + step, None])[:, 0]
        for step, logits in enumerate(output.logits)  # each (batch, vocabulary)
    ]
    return [list(row) for row in torch.stack(columns, dim=1).double().tolist()]
