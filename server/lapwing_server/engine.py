"""What the server needs of a detector, and how it gets the real one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lapwing_detector.detection import Detection, Reason
from lapwing_detector.errors import CaptureError, DetectorError
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_server.shelf import Shelf, shelve

if TYPE_CHECKING:
    from lapwing_detector import GeneratedToken, Generation

log = logging.getLogger("lapwing.server")

Prompt = str | list[dict[str, str]] | list[int]
Response = str | list[int]

WARM_UP = (
    "Where is the lapwing at home?",
    "It breeds on wet meadows and on fields from Ireland to the sea of Japan. " * 4,
)


class Engine(Protocol):
    """A detector as the server knows it; every method is called in the worker thread only."""

    @property
    def probe(self) -> Probe:
        """The probe that scores."""

    @property
    def identity(self) -> ModelIdentity:
        """The model that runs."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together."""

    def score(self, prompt: Prompt, response: Response, *, false_positive_rate: float) -> Detection:
        """The score of one response."""

    def score_batch(
        self, items: Sequence[tuple[Prompt, Response]], *, false_positive_rate: float
    ) -> Sequence[Detection | DetectorError]:
        """The score of each response, or why it has none; one bad item fails alone."""

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        false_positive_rate: float,
    ) -> Iterator[GeneratedToken | Generation]:
        """The tokens of a new response, and at the end the whole of it."""


@dataclass(frozen=True)
class Loaded:
    """All that scoring needs."""

    engine: Engine
    shelf: Shelf


def loader(
    model: str | None = None,
    probes: Path | None = None,
    probe: str | None = None,
    make: Callable[..., Any] | None = None,
) -> Callable[[], Loaded]:
    """A function that loads everything and warms it up; it takes long, and belongs into the worker.

    Args:
        model: Hub id or path; the embedded model without one.
        probes: a probe directory or a directory of probe directories; the embedded probe without one.
        probe: name of the probe that scores; the first one without a name.
        make: makes the engine of a model and a probe; the real detector's constructor without one.
    """

    def load() -> Loaded:
        shelf = shelve(probes, probe)
        engine: Engine = (make or real_detector)(model, shelf.active)
        warm_up(engine)
        return Loaded(engine, shelf)

    return load


def real_detector(model: str | None, probe: Probe) -> Engine:
    """The detector of a model; imports torch, which takes seconds."""
    import torch
    from transformers.utils import logging as transformers_logging

    from lapwing_detector.detector import Detector

    # In a log it would be a line for every step.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    return Detector.from_pretrained(model, probe)


def warm_up(engine: Engine) -> None:
    """Scores one text, so that the first client does not wait for what is set up on first use.

    Raises:
        CaptureError: the attention is not finite; no client would ever get a score.
    """
    detection = engine.score(*WARM_UP, false_positive_rate=0.05)
    if detection.reason is Reason.NON_FINITE:
        raise CaptureError(
            f"the attention of {engine.identity.name} is not finite on a plain text; load it in float32 or bfloat16"
        )
    log.info("warmed up: %s in %s s", detection.state, {stage: round(s, 3) for stage, s in detection.seconds.items()})
