"""Where the embedded default lies: the Atlas model and its probe, inside the package."""

from __future__ import annotations

from pathlib import Path

ATLAS = Path(__file__).parent / "atlas"


def model_path() -> Path:
    """Directory of the embedded model, as transformers loads it."""
    return ATLAS / "model"


def probe_path() -> Path:
    """Directory of the embedded probe."""
    return ATLAS / "probe"


def generations_path() -> Path:
    """Labelled generations of the embedded model, JSON Lines with gzip."""
    return ATLAS / "generations.jsonl.gz"


def sampled_path() -> Path:
    """The same at temperature 1.0, four answers to each question about a fifth of the subjects."""
    return ATLAS / "sampled.jsonl.gz"
