"""How a probe is fitted and judged, and the command line that says so. Knows no store."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from lapwing_training.options import require_resamples, require_seed
from lapwing_training.statistics.metrics import RESAMPLES


@dataclass(frozen=True)
class TrainOptions:
    """How a probe is fitted and judged."""

    recipe: str = "lapwing"
    features: tuple[str, ...] | None = None
    """Without them those of the recipe."""

    k: int | None = None
    """Values per head of a ranked feature; chosen inside without it."""

    seed: int = 0
    test_share: float | None = None
    """Share of the groups that is only tested on; without it nested cross-validation, or the split of the items."""

    name: str | None = None
    """The probe's name; made from the directory's without it."""

    resamples: int = RESAMPLES
    selection: str = "fdr"
    heads: int | None = None
    """How many are read; chosen inside without it."""

    guarantee: bool = False
    """Set a fifth of the groups apart, so that thresholds keep their promise for exchangeable groups."""

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_resamples(self.resamples)

    def command(self, store: Path, out: Path) -> str:
        """The command line that makes the same probe; paths by their last name only, since they will be other ones."""
        given = {
            "--recipe": self.recipe,
            "--selection": self.selection if self.recipe in ("lapwing", "combined") else None,
            "--features": ",".join(self.features) if self.features else None,
            "--k": self.k,
            "--heads": self.heads,
            "--test-share": self.test_share,
            "--name": self.name,
            "--resamples": self.resamples,
            "--seed": self.seed,
        }
        words = ["lapwing", "train", store.resolve().name, "--out", out.resolve().name]
        words += [str(word) for name, value in given.items() if value is not None for word in (name, value)]
        return shlex.join([*words, "--guarantee"] if self.guarantee else words)
