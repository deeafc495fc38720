"""What the verbs share: options, how a model is loaded, how results and refusals are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lapwing_detector.language_model import LanguageModel

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[str, typer.Option(help="Hub id or path of a causal language model; the embedded Atlas without it.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; as stored without it.")]
Features = Annotated[str, typer.Option(help="Comma-separated, such as laplacian_eigenvalues,attention_score.")]


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
