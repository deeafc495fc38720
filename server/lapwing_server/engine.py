"""What the server needs of a detector, and how it gets the real one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lapwing_detector.detection import Reason
from lapwing_detector.errors import CaptureError
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.options import GenerationOptions
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import Scored, ScoreJob
from lapwing_detector.tokens import TokenIds
from lapwing_server.shelf import Shelf
from lapwing_server.shelving import fitting, shelve

if TYPE_CHECKING:
    from lapwing_detector import GeneratedToken, Generation

log = logging.getLogger("lapwing.server")

Prompt = str | list[dict[str, str]] | list[int]
Response = str | list[int]

WARM_UP = (
    "Where is the lapwing at home?",
    "It breeds on wet meadows and on fields from Ireland to the sea of Japan. " * 4,
)
WARM_UP_TOKENS = 3


class Engine(Protocol):
    """A model as the server knows it. It has no probe of its own.

    What runs the model or its tokenizer is called in the worker's thread only. Which model it is, any thread may ask,
    once it is loaded, while the worker computes: that changes nothing and runs nothing.
    """

    @property
    def identity(self) -> ModelIdentity:
        """The model that runs; the same for good. Any thread."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and response together; the same for good. Any thread."""

    def require(self, probe: Probe) -> None:
        """Refuses a probe that was fitted on another model. Any thread: probes are loaded beside the worker.

        Raises:
            ProbeMismatch: says what differs.
        """

    def tokens(self, prompt: Prompt, response: Response | None = None) -> TokenIds:
        """The ids that are scored. Worker's thread only.

        Raises:
            InvalidInput: with the field that can't be used; TooLong if it is the length.
        """

    def score_ids(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        """The scores of several sequences, by one padded forward. Worker's thread only."""

    def streams(self) -> Streams:
        """Generations that share forwards; none so far. Worker's thread only, as all that is done with them."""


class Streams(Protocol):
    """Several generations that share forwards. A stream is told apart by what it is, not by what it holds.

    For the worker's thread only.
    """

    wanted: Callable[[Any], bool] | None
    """Asked before every forward of each stream that it would hold: False ends the stream, without an event."""

    def add(self, prompt: TokenIds, probe: Probe, options: GenerationOptions) -> Hashable:
        """A new stream; runs nothing.

        Raises:
            TooLong: the prompt leaves no room for a response.
        """

    def step(self) -> Sequence[tuple[Hashable, GeneratedToken | Generation | Exception]]:
        """A forward for each group of streams and one for new prompts; an exception ends its stream alone."""

    def cancel(self, stream: Any) -> None:
        """No further forward holds the stream; as often as one likes."""

    def pause(self, stream: Any) -> None:
        """The stream takes part in no forward until `resume`."""

    def resume(self, stream: Any) -> None:
        """The stream takes part again."""

    def tidy(self) -> None:
        """Gives back the memory of streams that have ended."""

    def __len__(self) -> int:
        """Streams that take part in the next step."""


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
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Callable[[], Loaded]:
    """A function that loads everything and warms it up; it takes long, and belongs into the worker.

    Args:
        model: Hub id or path; the embedded model without one.
        probes: a registry, a probe directory or a directory of them; the embedded probe without one.
        probe: name of the probe that scores; the first one without a name.
        make: makes the engine of a model and a probe; the real detector's constructor without one.
        device: where the real model runs; the CPU without it.
        dtype: of its weights; without it as stored, but float32 for float16 on a CPU.
    """
    make = make or partial(real_detector, device=device, dtype=dtype)

    def load() -> Loaded:
        shelf = shelve(probes, probe)
        engine: Engine = make(model, shelf.active)
        shelf = fitting(shelf, engine.require)
        warm_up(engine, shelf.active)
        return Loaded(engine, shelf)

    return load


def real_detector(model: str | None, probe: Probe, device: str | None = None, dtype: str | None = None) -> Engine:
    """The detector of a model; imports torch, which takes seconds."""
    import torch
    from transformers.utils import logging as transformers_logging

    from lapwing_detector.detector import Detector

    # In a log it would be a line for every step.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Its own handler writes on standard error in a form of its own, and waits for whoever reads there.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    return Detector.from_pretrained(model, probe, device=device, dtype=dtype)


def warm_up(engine: Engine, probe: Probe) -> None:
    """Scores two texts in one padded forward and writes a few tokens, so that the first client waits for nothing.

    Raises:
        CaptureError: the attention is not finite; no client would ever get a score.
    """
    begun = time.monotonic()
    ids = engine.tokens(*WARM_UP)
    detection, _ = (
        one.detection
        for one in engine.score_ids(
            [ScoreJob(ids, probe), ScoreJob(TokenIds(ids.prompt_ids, ids.response_ids[:1]), probe)]
        )
    )
    if detection.reason is Reason.NON_FINITE:
        raise CaptureError(
            f"the attention of {engine.identity.name} is not finite on a plain text; load it in float32 or bfloat16"
        )
    streams = engine.streams()
    streams.add(engine.tokens(WARM_UP[0]), probe, GenerationOptions(max_new_tokens=WARM_UP_TOKENS))
    while len(streams):
        for _, event in streams.step():
            if isinstance(event, Exception):
                raise event
    log.info("warmed up: %s in %.1f s", detection.state, time.monotonic() - begun)
