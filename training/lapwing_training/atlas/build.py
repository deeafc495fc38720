"""Makes Atlas again from nothing: data, model, generations, probe and pictures, stage by stage.

Each stage leaves its result in the directory and is passed over when the result is there, so a build that was
killed goes on. The order matters for honesty: the model is judged by `rates.json` alone and frozen before any probe
exists.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lapwing_training.atlas.corpus import training_texts
from lapwing_training.atlas.facts import Fact, all_facts
from lapwing_training.atlas.posttrain import own_answers
from lapwing_training.atlas.pretrain import Schedule, new_model, save_model, train
from lapwing_training.atlas.questions import demo_set, labelled_questions
from lapwing_training.atlas.tokenizer import train_tokenizer
from lapwing_training.extract import ExtractOptions, extract
from lapwing_training.files import write_text
from lapwing_training.generate import GenerateOptions, generate
from lapwing_training.generations import LabelledGeneration, read_generations, write_generations
from lapwing_training.label import label_generations
from lapwing_training.models import LoadedModel, load
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STAGES = ("model", "generations", "store", "probe")


@dataclass(frozen=True)
class AtlasRecipe:
    """Everything that may be turned. Judged by hallucination rates alone, never by an AUROC."""

    seed: int = 0
    pretraining: Schedule = field(default_factory=lambda: Schedule(learning_rate=3e-3))
    posttraining: Schedule = field(default_factory=lambda: Schedule(learning_rate=1e-3, answers_only=True))
    posttraining_passes: int = 4
    """How many phrasings of each fact meet the model's own answer."""

    texts: int | None = None
    """Only so many training texts; None for all. For a quick look."""


def build(directory: Path, recipe: AtlasRecipe | None = None, until: str = "probe") -> None:
    """Makes everything up to and with the stage `until`.

    Args:
        directory: where the results lie: `model/`, `generations.jsonl.gz`, `rates.json`, `store/`, `probe/`,
            `demo_questions.json`.
        recipe: sizes and rates; the one that the shipped Atlas was made with by default.
        until: one of `STAGES`.
    """
    recipe = recipe or AtlasRecipe()
    stages = STAGES[: STAGES.index(until) + 1]
    directory.mkdir(parents=True, exist_ok=True)
    facts = all_facts()
    write_text(directory / "demo_questions.json", json.dumps(demo_set(facts), indent=1) + "\n")
    if "model" in stages:
        make_model(directory, facts, recipe)
    loaded = load(str(directory / "model"))
    if "generations" in stages:
        make_generations(directory, facts, loaded)
    if "store" in stages:
        make_store(directory, loaded)
    if "probe" in stages:
        make_probe(directory)


def make_model(directory: Path, facts: Sequence[Fact], recipe: AtlasRecipe) -> None:
    """Pre-training on the facts, then post-training on the model's own answers."""
    if (directory / "model").exists():
        return
    if not (directory / "pretrained").exists():
        texts = training_texts(facts, recipe.seed)[: recipe.texts]
        tokenizer = train_tokenizer(f"{prompt} {answer}" for prompt, answer in training_texts(facts, recipe.seed))
        model = new_model(tokenizer, recipe.seed)
        train(model, tokenizer, texts, recipe.pretraining, directory / "pretraining", "pre-training")
        save_model(model, tokenizer, directory / "pretrained")
    model = LlamaForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "pretrained")
    texts = own_answers(model, tokenizer, facts, recipe.posttraining_passes, recipe.seed)
    train(model, tokenizer, texts, recipe.posttraining, directory / "posttraining", "post-training")
    save_model(model, tokenizer, directory / "model")
    for scratch in ("pretraining", "posttraining"):
        shutil.rmtree(directory / scratch, ignore_errors=True)


def make_generations(directory: Path, facts: Sequence[Fact], loaded: LoadedModel) -> None:
    """Greedy answers to every labelled question, labelled by exact match, and their hallucination rates."""
    path = directory / "generations.jsonl.gz"
    if not path.exists():
        answers = directory / "answers.jsonl"
        generate(labelled_questions(facts), answers, loaded, GenerateOptions(max_new_tokens=24, batch_size=128))
        write_generations(path, label_generations(read_generations(answers)))
        answers.unlink()
    rates = hallucination_rates(read_generations(path))
    write_text(directory / "rates.json", json.dumps(rates, indent=1) + "\n")


def hallucination_rates(generations: Sequence[LabelledGeneration]) -> dict[str, dict[str, float]]:
    """Share of wrong answers and number of questions: of all, by relation, and by whether the subject was seen."""
    labels: dict[str, list[int]] = defaultdict(list)
    for item in generations:
        if item.label is not None:
            seen = "seen" if item.meta["seen"] else "never seen"
            for part in ("all", seen, item.meta["relation"], f"{item.meta['relation']}, {seen}"):
                labels[part].append(item.label)
    return {part: {"rate": sum(some) / len(some), "questions": len(some)} for part, some in sorted(labels.items())}


def make_store(directory: Path, loaded: LoadedModel) -> None:
    """Features of every labelled generation."""
    if not (directory / "store" / "index.json").exists():
        generations = read_generations(directory / "generations.jsonl.gz")
        extract(generations, directory / "store", loaded, ExtractOptions(stratum="meta.relation"))


def make_probe(directory: Path) -> None:
    """The default probe, with its report and pictures."""
    raise NotImplementedError
