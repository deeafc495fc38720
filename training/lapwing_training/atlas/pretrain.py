"""Trains a small Llama on (prompt, answer) texts: seeded, with a progress bar, resumable after a kill."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lapwing_training.atlas.tokenizer import CONTEXT

IGNORED = -100
"""Label of positions that do not enter the loss, as in transformers."""


@dataclass(frozen=True)
class Schedule:
    """How a model is trained."""

    learning_rate: float
    batch: int = 128
    warm_up: int = 60
    """Steps until the learning rate is at its height; it then falls to a tenth on a cosine."""

    weight_decay: float = 0.05
    answers_only: bool = False
    """True: the loss counts the answer's tokens only, as in post-training."""

    checkpoint_every: int = 100


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 3.2 million parameters: 6 layers of 8 heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


Encoded = tuple[list[int], list[int]]
"""Token ids and labels of one text."""


def make_batches(encoded: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    """Batches of texts of like length, in an order that has nothing to do with length.

    Among 16 batches of neighbours the texts are sorted by length, which leaves little padding.
    """
    window, batches = 16 * size, []
    for start in range(0, len(encoded), window):
        near = sorted(encoded[start : start + window], key=lambda text: len(text[0]))
        batches += [near[first : first + size] for first in range(0, len(near), size)]
    order = np.random.default_rng(len(encoded)).permutation(len(batches))
    return [batches[index] for index in order]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]], answers_only: bool) -> list[Encoded]:
    """Token ids and labels of every text: BOS prompt answer EOS, tokenised as the detector does it."""
    prompts = tokenizer([prompt for prompt, _ in texts]).input_ids
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False).input_ids
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tail = [*answer, tokenizer.eos_token_id]
        encoded.append((prompt + tail, ([IGNORED] * len(prompt) if answers_only else prompt) + tail))
    return encoded


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[tuple[str, str]],
    schedule: Schedule,
    checkpoint: Path,
    what: str,
) -> None:
    """Goes through the texts once, in their order; leaves the model trained and in eval mode.

    Args:
        model: changed in place.
        tokenizer: with EOS and padding tokens.
        texts: (prompt, answer) pairs.
        schedule: learning rate and the like.
        checkpoint: directory in which the state is kept until the caller removes it; training goes on from there.
        what: heading of the progress bar.
    """
    batches = make_batches(encode(tokenizer, texts, schedule.answers_only), schedule.batch)
    steps = len(batches)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    done = load_checkpoint(checkpoint, model, optimizer)
    model.train()
    with tqdm(total=steps, initial=done, desc=what, unit="step") as bar:
        for step in range(done, steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * rate(step, steps, schedule.warm_up)
            batch = pad(batches[step], tokenizer.pad_token_id)
            # Padding is on the right and attention causal, so no row that counts can see it: no mask is needed.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == steps:
                save_checkpoint(checkpoint, model, optimizer, step + 1)
    model.train(False)


def rate(step: int, steps: int, warm_up: int) -> float:
    """Learning rate relative to its height."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def pad(rows: Sequence[Encoded], pad_token: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_token] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
    }


def save_checkpoint(directory: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, moments and the step in one file, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"weight/{name}": parameter.detach()}
        tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "state.safetensors.partial"
    save_file(tensors, partial)
    os.replace(partial, directory / "state.safetensors")


def load_checkpoint(directory: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Puts the saved state back; returns the steps already done, 0 where nothing is saved."""
    path = directory / "state.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
        state: dict[str, Any] = {key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        optimizer.state[parameter] = state
    return int(tensors["step"])


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Float16 safetensors, tokenizer and configuration, as transformers loads them; replaces what was there."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    half: Any = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
