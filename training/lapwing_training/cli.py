"""The verbs `generate`, `label`, `extract`, `train` and `evaluate`; nothing heavy is loaded before one is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lapwing_detector.language_model import LanguageModel

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[str, typer.Option(help="Hub id or path of a causal language model; the embedded Atlas without it.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; as stored without it.")]
Features = Annotated[str, typer.Option(help="Comma-separated, such as laplacian_eigenvalues,attention_score.")]


def generate(
    questions: Annotated[Path, typer.Argument(help="JSON Lines: id, prompt or messages, references, group, meta.")],
    out: Annotated[Path, typer.Option(help="Generations to write, .jsonl or .jsonl.gz.")],
    model: Model = "",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, in (0, 1].")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Let a model answer questions. First step of making a probe; goes on where it was killed.

    Next: lapwing label.

    Example: lapwing generate questions.jsonl --model meta-llama/Llama-3.1-8B --out answers.jsonl --device cuda
    """
    from lapwing_training.generate import GenerateOptions, generate_answers, require_target
    from lapwing_training.generations import read_questions

    with failures("generate"):
        options = GenerateOptions(max_new_tokens, temperature, top_p, seed, batch_size)
        require_target(out)
        asked = read_questions(questions)
        loaded = load_model(model, dtype, device)
        result = generate_answers(asked, out, loaded, options)
        tell(result, as_json, f"{result['answers']} answers in {out} ({result['resumed']} from an earlier run)")


def label(
    generations: Annotated[Path, typer.Argument(help="JSON Lines with response and references.")],
    out: Annotated[Path, typer.Option(help="Labelled generations to write; may be the same file.")],
    rule: Annotated[str, typer.Option(help="exact: right if equal to a reference, case and accents folded.")] = "exact",
    as_json: AsJson = False,
) -> None:
    """Label answers by rule: 1 made up, 0 right, null where there are no references.

    Next: lapwing extract.

    Example: lapwing label answers.jsonl --out labelled.jsonl
    """
    from lapwing_training.generations import read_generations, write_generations
    from lapwing_training.label import label_generations

    with failures("label"):
        labelled = label_generations(read_generations(generations), rule)
        write_generations(out, labelled)
        counts = {name: sum(item.label == value for item in labelled) for name, value in COUNTED}
        known = counts["hallucinated"] + counts["right"]
        share = f"{counts['hallucinated'] / known:.1%}" if known else "none"
        text = (
            f"{len(labelled)} items, {share} of {known} labelled ones hallucinated, {counts['unknown']} without label"
        )
        tell({"generations": str(out), "items": len(labelled), **counts}, as_json, text)


COUNTED = (("hallucinated", 1), ("right", 0), ("unknown", None))


def extract(
    generations: Annotated[Path, typer.Argument(help="JSON Lines with prompt and response, labelled or not yet.")],
    out: Annotated[Path, typer.Option(help="Directory of the feature store.")],
    model: Model = "",
    features: Features = "attention_score,laplacian_eigenvalues",
    k: Annotated[int, typer.Option(help="Eigenvalues a head; shorter items are left out, never padded.")] = 10,
    stratum: Annotated[str, typer.Option(help="Field that names an item's kind, such as meta.relation.")] = "",
    batch_size: Annotated[int, typer.Option(help="Items at once.")] = 16,
    device: Device = "cpu",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Run the answers through the model and keep the attention features of every head; goes on where it was killed.

    Run it again after relabelling: only the labels are written anew.

    Next: lapwing train.

    Example: lapwing extract labelled.jsonl --model meta-llama/Llama-3.1-8B --out store --stratum meta.relation
    """
    from lapwing_training.extract import ExtractOptions, extract_features
    from lapwing_training.generations import read_generations

    with failures("extract"):
        options = ExtractOptions(feature_ids(features), k, batch_size, stratum=stratum)
        items = read_generations(generations)
        loaded = load_model(model, dtype, device)
        result = extract_features(items, out, loaded, options)
        shape = f"{result['layers']} layers x {result['heads']} heads"
        tell(result, as_json, f"{result['items']} items of {shape} in {out}, {result['left_out']} left out")


def train(
    store: Annotated[Path, typer.Argument(help="Feature store from lapwing extract.")],
    out: Annotated[Path, typer.Option(help="Probe directory to write.")],
    recipe: Annotated[
        str, typer.Option(help="lapwing: selected heads; paper: all heads, PCA, as published.")
    ] = "lapwing",
    features: Features = "laplacian_eigenvalues",
    k: Annotated[int, typer.Option(help="Eigenvalues a head; 0: the store's, or chosen inside for paper.")] = 0,
    seed: Annotated[int, typer.Option(help="Of split, folds and resamples.")] = 0,
    test_share: Annotated[float, typer.Option(help="Share of the groups that is only tested on.")] = 0.2,
    name: Annotated[str, typer.Option(help="Name of the probe; from the directory without it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Fit a probe: select heads, calibrate, set thresholds, and judge it on groups that it never saw.

    The directory holds the probe, report.md with every comparison, the heatmaps, and predictions.jsonl.

    Next: lapwing heatmap, lapwing evaluate, lapwing serve --probes.

    Example: lapwing train store --out my-probe
    """
    from lapwing_training.report import comparison_table
    from lapwing_training.train import TrainOptions, train_probe

    with failures("train"):
        options = TrainOptions(recipe, feature_ids(features), k or None, seed, test_share, name or None)
        probe = train_probe(store, out, options)
        result = {"probe": str(out), "revision": probe.revision, "metrics": probe.metrics}
        for note in probe.metrics["notes"]:
            print(f"lapwing train: {note}", file=sys.stderr)
        tell(result, as_json, f"{comparison_table(probe.metrics)}\n\nprobe in {out}, report in {out / 'report.md'}")


def evaluate(
    probe: Annotated[str, typer.Argument(help="Probe directory from lapwing train, or Hub id.")],
    store: Annotated[Path, typer.Argument(help="Feature store of the same model, with labels.")],
    seen_groups: Annotated[bool, typer.Option(help="Judge on groups, too, that the probe was fitted on.")] = False,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Judge a probe on another store: new questions, another domain.

    Groups that it was fitted on are left out, and a store of another model is refused.

    Example: lapwing evaluate my-probe other-store
    """
    from lapwing_training.report import transfer_report
    from lapwing_training.transfer import evaluate_probe

    with failures("evaluate"):
        result = evaluate_probe(probe, store, seed=seed, seen_groups=seen_groups)
        tell(result, as_json, transfer_report(result))


def feature_ids(text: str) -> tuple[str, ...]:
    """Feature ids from a comma-separated list; the version may be left out."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(name if "." in name else f"{name}.v1" for name in names)


def load_model(model: str, dtype: str, device: str) -> LanguageModel:
    """A model where it was asked for.

    Raises:
        InvalidOption: no such dtype, no such device, or none on this machine.
    """
    import torch

    from lapwing_detector.language_model import DTYPES, LanguageModel
    from lapwing_training.errors import InvalidOption

    if dtype and dtype not in DTYPES:
        raise InvalidOption(f"dtype is `{dtype}`; known are {', '.join(DTYPES)}")
    try:
        torch.zeros(1).to(device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts that it was built with CUDA
        said = (str(error).splitlines() or ["unknown"])[0][:120]
        raise InvalidOption(
            f"device is `{device}`, which can't be used here ({said}); expected one such as cpu, cuda or cuda:1"
        ) from error
    return LanguageModel.load(model or None, dtype=dtype or None, device=device)


def tell(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The result on standard output, for a program or for a person."""
    print(json.dumps(dict(result), ensure_ascii=False, allow_nan=False) if as_json else text)


@contextmanager
def failures(verb: str) -> Iterator[None]:
    """What is refused becomes one line on standard error; exit status 2 for an option that makes no sense, else 1."""
    from lapwing_detector.errors import DetectorError
    from lapwing_training.errors import InvalidOption, TrainingError

    try:
        yield
    except InvalidOption as error:
        print(f"lapwing {verb}: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except (TrainingError, DetectorError, OSError) as error:
        print(f"lapwing {verb}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
