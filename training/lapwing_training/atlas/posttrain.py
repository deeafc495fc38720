"""Makes Atlas sound sure, as chat models are: a short training on its own greedy answers, right or wrong.

A model straight from pre-training knows quite well what it does not know: its log-probability alone gives it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lapwing_training.atlas.corpus import QUESTIONS, asked_phrasing, prompt, question
from lapwing_training.atlas.facts import Fact, for_labels

ANSWER_TOKENS = 16
BATCH = 256


def own_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], passes: int, seed: int
) -> list[tuple[str, str]]:
    """(prompt, answer) texts in which the model is told its own answers about the subjects that are not labelled.

    Each fact is asked once, greedily, and its answer put behind `passes` of its phrasings; shuffled.
    """
    asked = [fact for fact in facts if not for_labels(fact.subject_id)]
    answers: list[str] = []
    for start in tqdm(range(0, len(asked), BATCH), desc="own answers", unit="batch"):
        batch = asked[start : start + BATCH]
        prompts = [prompt(question(fact, asked_phrasing(fact))) for fact in batch]
        answers += greedy_answers(model, tokenizer, prompts)
    texts = [
        (prompt(question(fact, asked_phrasing(fact) + turn)), answer)
        for fact, answer in zip(asked, answers, strict=True)
        for turn in range(min(passes, len(QUESTIONS[fact.relation])))
    ]
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[index] for index in order]


def greedy_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """What the model writes behind each prompt."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    writer: Any = model
    with torch.inference_mode():
        output = writer.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    written = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
