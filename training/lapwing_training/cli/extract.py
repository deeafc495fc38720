"""The verb `extract`, and how features are named on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapwing_training.cli.common import AsJson, Device, Dtype, Model, failures, feature_ids, load_model, tell

if TYPE_CHECKING:
    from lapwing_training.store.extract import ExtractOptions

StoredFeatures = Annotated[
    str,
    typer.Option(
        help="Comma-separated, or all. Without it those of the store; score and Laplacian eigenvalues in a new one."
    ),
]
StoredK = Annotated[
    int | None,
    typer.Option(
        help="Eigenvalues a head; shorter items are left out, never padded. Without it the store's; 10 in a new one."
    ),
]


def extract(
    generations: Annotated[Path, typer.Argument(help="JSON Lines with prompt and response, labelled or not yet.")],
    out: Annotated[Path, typer.Option(help="Directory of the feature store.")],
    model: Model = "",
    features: StoredFeatures = "",
    k: StoredK = None,
    stages: Annotated[
        str, typer.Option(help="Fractions of the response at which the text is read, too, such as 0.25,0.5,0.75.")
    ] = "",
    stratum: Annotated[str, typer.Option(help="Field that names an item's kind, such as meta.relation.")] = "",
    batch_size: Annotated[int, typer.Option(help="Items at once.")] = 16,
    device: Device = "cpu",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Run the answers through the model and keep the attention features of every head; goes on where it was killed.

    Run it again after relabelling, or on the store that lapwing generate filled: only the labels are written anew.

    Next: lapwing train.

    Example: lapwing extract labelled.jsonl --model meta-llama/Llama-3.1-8B --out store --stratum meta.relation
    """
    from lapwing_training.data.generations import read_generations
    from lapwing_training.store.extract import extract_features

    with failures("extract"):
        kept = stored(out, features, k)
        options = replace(kept, batch_size=batch_size, stratum=stratum, stages=fractions(stages))
        items = read_generations(generations)
        loaded = load_model(model, dtype, device)
        result = extract_features(items, out, loaded, options)
        shape = f"{result['layers']} layers x {result['heads']} heads"
        tell(result, as_json, f"{result['items']} items of {shape} in {out}, {result['left_out']} left out")


def stored(store: Path | None, features: str, k: int | None) -> ExtractOptions:
    """Features and k as they were asked for, else as the store was begun with, else as in any new one.

    Raises:
        InvalidOption: they make no sense, or there is no store to keep them in.
    """
    from lapwing_detector.features import FEATURES
    from lapwing_training.errors import InvalidOption
    from lapwing_training.store.extract import DEFAULT_FEATURES, DEFAULT_K, ExtractOptions
    from lapwing_training.store.plan import read_plan

    if store is None and (features or k is not None):
        raise InvalidOption(f"features are `{features}` and k is {k}, but store is not given; name one with --store")
    begun = {} if store is None else read_plan(store) or {}
    names = tuple(begun.get("features", DEFAULT_FEATURES))
    if features:
        names = tuple(FEATURES) if features.strip() == "all" else feature_ids(features)
    return ExtractOptions(names, begun.get("k", DEFAULT_K) if k is None else k)


def fractions(text: str) -> tuple[float, ...]:
    """Fractions from a comma-separated list.

    Raises:
        InvalidOption: one is no number.
    """
    from lapwing_training.errors import InvalidOption

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidOption(f"stages is `{text[:80]}`; expected fractions such as 0.25,0.5,0.75") from None
