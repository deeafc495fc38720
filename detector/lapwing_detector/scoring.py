"""From the captured attention of one sequence to a detection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.detection import DEFAULT_FALSE_POSITIVE_RATE, Detection, HeadContribution, Reason, State
from lapwing_detector.errors import CaptureError, DetectorError
from lapwing_detector.probe import Probe, Share
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import TokenIds


@dataclass(frozen=True)
class ScoreJob:
    """One sequence that is to be scored."""

    ids: TokenIds
    probe: Probe
    false_positive_rate: float = DEFAULT_FALSE_POSITIVE_RATE
    """Operating point at which `flagged` is decided."""

    shadows: tuple[Probe, ...] = ()
    """Further probes, which score the same attention."""


@dataclass(frozen=True)
class Scored:
    """What became of a job."""

    detection: Detection
    shadows: tuple[Detection | DetectorError, ...] = ()
    """In the order of `ScoreJob.shadows`; the error of one that could not score."""


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to the stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds what was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def detect(
    probe: Probe,
    summary: AttentionSummary,
    ids: TokenIds,
    false_positive_rate: float,
    seconds: dict[str, float],
    log_probabilities: Sequence[float] | NDArray[np.floating] | None = None,
) -> Detection:
    """What the probe says of one captured sequence.

    Args:
        probe: that scores.
        summary: attention of the sequence.
        ids: the sequence.
        false_positive_rate: operating point at which `flagged` is decided.
        seconds: that it took so far, by stage.
        log_probabilities: (response tokens,) for a probe that reads them; see `Probe.score`.
    """
    clock = Stopwatch()
    logit, share, reason, message = None, None, None, ""
    with clock.stage("probe"):
        if summary.token_count < probe.needed_tokens:
            reason = Reason.TOO_SHORT
            message = f"{summary.token_count} tokens; the probe needs {probe.needed_tokens}; score a longer text"
        elif not ids.response_ids:
            reason, message = Reason.TOO_SHORT, "the response has no tokens; there is nothing in it to be made up"
        elif not finite(read := probe.read(summary)):
            reason, message = Reason.NON_FINITE, "the model's attention is not finite; load it in float32 or bfloat16"
        elif probe.reads_log_probabilities and np.isnan(() if log_probabilities is None else log_probabilities).any():
            reason, message = Reason.NON_FINITE, "the model's logits are not finite; load it in float32 or bfloat16"
        else:
            logit, share = probe.score_read(read, log_probabilities)
    point = probe.threshold(false_positive_rate)
    return Detection(
        state=State.UNSCORED if logit is None else State.SCORED,
        reason=reason,
        message=message,
        probability=None if logit is None else probe.calibration.probability(logit),
        logit=logit,
        bias=probe.bias,
        flagged=None if logit is None or point is None else logit > point.logit,
        false_positive_rate=false_positive_rate,
        flagged_at=() if logit is None else probe.flagged_at(logit),
        probe_name=probe.name,
        probe_revision=probe.revision,
        prompt_tokens=len(ids.prompt_ids),
        response_tokens=len(ids.response_ids),
        token_ids=ids.all,
        token_contributions=np.empty(0, np.float32) if share is None else share.tokens,
        head_contributions=() if share is None else strongest(probe, share),
        seconds=seconds | clock.seconds,
        heads_contribution=0.0 if share is None else float(share.heads.sum(dtype=np.float64)),
        statistic_contributions={} if share is None else share.statistics,
    )


def among(summary: AttentionSummary, probe: Probe) -> AttentionSummary:
    """The layers that the probe knows of attention that was captured for others, too."""
    rows = [row for row, layer in enumerate(summary.layers) if layer in probe.layers]
    if len(rows) == len(summary.layers):
        return summary
    return AttentionSummary(summary.diagonal[rows], summary.received[rows], tuple(summary.layers[row] for row in rows))


def attempted(detect: Callable[[], Detection]) -> Detection | DetectorError:
    """The detection or the error instead of it."""
    try:
        return detect()
    except DetectorError as error:
        return error
    except Exception as error:
        return CaptureError(type(error).__name__)


def finite(summary: AttentionSummary) -> bool:
    """Whether all its numbers are."""
    return bool(np.isfinite(summary.diagonal).all() and np.isfinite(summary.received).all())


def strongest(probe: Probe, share: Share) -> tuple[HeadContribution, ...]:
    """The selected heads with their shares, the strongest first."""
    rows, heads = probe.places
    shares = share.heads[rows, heads]
    order = np.argsort(-np.abs(shares), kind="stable")
    layers = np.array(probe.layers)[rows]
    return tuple(map(HeadContribution, layers[order].tolist(), heads[order].tolist(), shares[order].tolist()))
