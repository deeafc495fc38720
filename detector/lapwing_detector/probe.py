"""A fitted linear probe: from features to a calibrated probability, and whose share is what. Knows no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.calibration import Calibration, StageCalibration, at_stage
from lapwing_detector.errors import ProbeMismatch, TooShort
from lapwing_detector.features import FEATURES
from lapwing_detector.head_map import STATISTICS, HeadMap
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.threshold import Threshold as Threshold
from lapwing_detector.token_statistics import TOKEN_STATISTICS, statistics_logit, token_contributions

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""What a probe may be called."""


@dataclass(frozen=True)
class Share:
    """Whose share of a logit is what. `tokens` sum to logit - bias, and so do `heads` and `statistics` together."""

    tokens: NDArray[np.float32]
    """(tokens,)."""

    heads: NDArray[np.float32]
    """(layers, heads), zero for heads that were not selected."""

    statistics: Mapping[str, float] = field(default_factory=dict)
    """By id, for a probe that reads log-probabilities, too."""


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe. Nothing about it can be refitted."""

    name: str
    """Matches `^[a-z0-9][a-z0-9-]{0,62}$`."""

    features: tuple[str, ...]
    """Feature ids, in their order along the width of `weights`."""

    k: int
    """How many values of a ranked feature."""

    layers: tuple[int, ...]
    """Index in the model of each layer of `weights`."""

    weights: NDArray[np.float32]
    """(layers, heads, width) in the order of `features`; zero for heads that were not selected."""

    bias: float
    selected: NDArray[np.bool_]
    """(layers, heads)."""

    calibration: Calibration
    thresholds: tuple[Threshold, ...]
    """Ascending by false-positive rate; rates for which there was too little data are absent."""

    identity: ModelIdentity
    """The model it was fitted on, and the only one that it scores."""

    stages: tuple[StageCalibration, ...] = ()
    """Ascending by fraction: calibrations of scores while the response is being written; empty where none were fitted,
    and then that of finished responses serves for all."""

    statistic_weights: Mapping[str, float] = field(default_factory=dict)
    """Of statistics of the response's token log-probabilities, by id: see `token_statistics`. Empty for a probe that
    reads attention alone."""

    statistics: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    """`feature id/STATISTIC` -> (layers, heads): what the heatmaps show, from training rows only."""

    metrics: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """How good it is, as the training wrote it (JSON values)."""

    training: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What it was fitted on and how (JSON values)."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"the probe's name {self.name[:80]!r} must match {NAME.pattern}")
        unknown = [feature for feature in self.features if feature not in FEATURES]
        if unknown:
            raise ValueError(f"feature {unknown[0]!r} is not known; known are {', '.join(FEATURES)}")
        if not self.features or len(set(self.features)) < len(self.features):
            raise ValueError(f"features {self.features} must be one or more, each once")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers {self.layers} must be indices, ascending")
        expected = (len(self.layers), self.selected.shape[-1] if self.selected.ndim else 0, self.width)
        if self.selected.ndim != 2 or self.weights.shape != expected or self.selected.shape != expected[:2]:
            raise ValueError(
                f"weights {self.weights.shape} and selected {self.selected.shape} must be {expected} and {expected[:2]}"
            )
        if not (np.isfinite(self.weights).all() and math.isfinite(self.bias)):
            raise ValueError("weights and bias must be finite")
        if [stage.fraction for stage in self.stages] != sorted({stage.fraction for stage in self.stages}):
            raise ValueError("stages must ascend by their fraction, each once")
        if np.any(self.weights[~self.selected]):
            raise ValueError("a head that was not selected has a weight")
        for id, weight in self.statistic_weights.items():
            if id not in TOKEN_STATISTICS or not math.isfinite(weight):
                known = ", ".join(TOKEN_STATISTICS)
                raise ValueError(f"statistic {id[:80]!r} of weight {weight} must be finite and one of {known}")

    @property
    def width(self) -> int:
        """Numbers per head over all features."""
        return sum(FEATURES[feature].width(self.k) for feature in self.features)

    @property
    def needed_tokens(self) -> int:
        """Least number of tokens of a sequence that it can score."""
        return max(FEATURES[feature].needed(self.k) for feature in self.features)

    @property
    def reads_log_probabilities(self) -> bool:
        """Whether it reads more than attention, so that `score` needs the response's token log-probabilities."""
        return bool(self.statistic_weights)

    @cached_property
    def revision(self) -> str:
        """Digest of everything that changes a score, a threshold or the model; 12 hexadecimal digits."""
        described = {
            "name": self.name,
            "features": self.features,
            "k": self.k,
            "layers": self.layers,
            "bias": self.bias,
            "calibration": [self.calibration.slope, self.calibration.intercept, *self.calibration.knots],
            "thresholds": [[point.false_positive_rate, point.logit] for point in self.thresholds],
            "identity": self.identity.digest,
        }
        if self.stages:
            described["stages"] = [list(vars(stage).values()) for stage in self.stages]
        if self.statistic_weights:
            described["statistic_weights"] = dict(self.statistic_weights)
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.weights, dtype="<f4").tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def heads(self) -> dict[int, tuple[int, ...]]:
        """The heads that it reads, by layer, ascending: what `capture_attention` needs to keep for it."""
        rows = zip(self.layers, self.selected, strict=True)
        return {layer: tuple(map(int, np.flatnonzero(row))) for layer, row in rows if row.any()}

    @cached_property
    def places(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Row in `weights` and head of every head that it reads, in the order in which `read` puts them."""
        rows, heads = np.nonzero(self.selected)
        for part in (rows, heads):
            part.flags.writeable = False
        return rows, heads

    @cached_property
    def _read_weights(self) -> NDArray[np.float64]:
        """(read heads, width)."""
        return self.weights[self.selected].astype(np.float64)

    def logit(self, features: NDArray[np.float32], statistics: NDArray[np.floating] | None = None) -> Any:
        """The linear score.

        Args:
            features: (..., layers, heads, width) in the order of `features`.
            statistics: (..., statistics) in the order of `TOKEN_STATISTICS`, where the probe reads log-probabilities.

        Returns:
            A float for one item, an array (...) for several.

        Raises:
            ProbeMismatch: it reads log-probabilities, and there are no statistics of them.
        """
        scores = np.tensordot(features.astype(np.float64), self.weights.astype(np.float64), axes=3) + self.bias
        if self.reads_log_probabilities:
            scores = scores + statistics_logit(self.statistic_weights, self._required(statistics))
        return float(scores) if scores.ndim == 0 else scores

    def probability(self, features: NDArray[np.float32], statistics: NDArray[np.floating] | None = None) -> Any:
        """Calibrated probability of hallucination, in [0, 1]; arguments, shapes and errors as for `logit`."""
        logits = self.logit(features, statistics)
        if isinstance(logits, float):
            return self.calibration.probability(logits)
        return self.calibration.probabilities(logits)

    def running_probability(self, logit: float, response_tokens: int) -> float:
        """Calibrated probability while the response is being written, in [0, 1].

        Args:
            logit: of the prompt and what is written so far.
            response_tokens: written so far.
        """
        return at_stage(self.calibration, self.stages, response_tokens).probability(logit)

    def features_of(self, summary: AttentionSummary) -> NDArray[np.float32]:
        """(layers, heads, width): what `logit` takes; of all heads, selected or not.

        Raises:
            TooShort: the sequence has too few tokens for one of the features.
            ProbeMismatch: the summary has other layers or heads than the probe, or was captured of few heads.
        """
        self._require_layers(summary, self.layers, "capture all heads: capture_attention(model)")
        return np.concatenate([FEATURES[feature].compute(summary, self.k) for feature in self.features], axis=-1)

    def score(
        self, summary: AttentionSummary, log_probabilities: Sequence[float] | NDArray[np.floating] | None = None
    ) -> tuple[float, Share]:
        """The logit of one sequence, from the selected heads only, and the exact share of every token and head.

        Every ranked value belongs to one token and the probe is linear, so the shares are no estimate.

        Args:
            summary: of prompt and response.
            log_probabilities: (response tokens,) of the last tokens of the sequence, for a probe that reads them, too;
                natural logarithms at temperature 1. Others pass them over.

        Raises:
            TooShort: the sequence has too few tokens for one of the features.
            ProbeMismatch: the summary has other layers or heads than the probe, or it reads log-probabilities and
                there are none.
        """
        return self.score_read(self.read(summary), log_probabilities)

    def score_read(
        self, read: AttentionSummary, log_probabilities: Sequence[float] | NDArray[np.floating] | None = None
    ) -> tuple[float, Share]:
        """The same for what `read` has picked; arguments, results and errors as for `score`."""
        said = self._required(log_probabilities) if self.reads_log_probabilities else ()
        if read.token_count < self.needed_tokens:
            raise TooShort(read.token_count, self.needed_tokens)
        tokens = np.zeros(read.token_count)
        per_head = np.zeros(len(self._read_weights))
        start = 0
        for feature in (FEATURES[id] for id in self.features):
            width = feature.width(self.k)
            values = feature.token_values(read)[0].astype(np.float64)  # (read, tokens)
            part = self._read_weights[:, start : start + width]
            if feature.ranked:
                ranked = np.argsort(-values, axis=-1, kind="stable")[:, :width]  # (read, k): token of each rank
                shares = values[np.arange(len(values))[:, None], ranked] * part
                tokens += np.bincount(ranked.ravel(), shares.ravel(), len(tokens))
            else:
                shares = values * part / read.token_count
                tokens += shares.sum(axis=0)
            per_head += shares.sum(axis=1)
            start += width
        heads = np.zeros(self.selected.shape, np.float32)
        heads[self.places] = per_head
        statistics: Mapping[str, float] = {}
        if self.reads_log_probabilities:
            of_tokens, statistics = token_contributions(said, self.statistic_weights)
            tokens[read.token_count - len(of_tokens) :] += of_tokens
        logit = float(per_head.sum()) + sum(statistics.values()) + self.bias
        return logit, Share(tokens.astype(np.float32), heads, statistics)

    def read(self, summary: AttentionSummary) -> AttentionSummary:
        """What it looks at: the selected heads, all in one layer; (1, selected heads, tokens).

        Args:
            summary: of one sequence; may lack the layers that it reads nothing of.

        Raises:
            ProbeMismatch: the summary has other heads than the probe, or not all the layers that it reads.
        """
        self._require_layers(summary, self.heads, "capture its heads: capture_attention(model, heads=probe.heads)")
        places = np.array([summary.layers.index(layer) if layer in self.heads else -1 for layer in self.layers])
        rows, columns = self.places
        rows = places[rows]
        return AttentionSummary(summary.diagonal[rows, columns][None], summary.received[rows, columns][None], (0,))

    def flagged_at(self, logit: float) -> tuple[float, ...]:
        """The false-positive rates of all operating points that this logit passes, strictest first."""
        return tuple(point.false_positive_rate for point in self.thresholds if logit > point.logit)

    def threshold(self, false_positive_rate: float) -> Threshold | None:
        """The stored operating point with this rate; None where there was too little data for it."""
        for point in self.thresholds:
            if math.isclose(point.false_positive_rate, false_positive_rate):
                return point
        return None

    def head_map(self, feature: str, statistic: str) -> HeadMap:
        """One statistic of one feature for every head.

        Raises:
            ValueError: the probe has no such feature or statistic; the message lists those it has.
        """
        if statistic not in STATISTICS:
            raise ValueError(f"statistic {statistic!r} is not known; known are {', '.join(STATISTICS)}")
        if feature not in self.mapped_features:
            raise ValueError(f"feature {feature!r} is not in this probe; it has {', '.join(self.mapped_features)}")
        stored = self.statistics.get(f"{feature}/{statistic}")
        if stored is not None:
            return HeadMap(stored, feature, statistic, self.layers)
        if statistic == "SELECTED":
            read = self.selected if feature in self.features else np.zeros_like(self.selected)
            return HeadMap(read.astype(np.float32), feature, statistic, self.layers)
        if statistic == "WEIGHT":
            return HeadMap(self._weight_norms(feature), feature, statistic, self.layers)
        raise ValueError(f"{statistic} of {feature} was not stored with this probe; fit it again: lapwing train")

    @property
    def mapped_features(self) -> tuple[str, ...]:
        """Features of which the probe has heatmaps: those that it reads, and those tested beside them."""
        tested = (key.partition("/")[0] for key in self.statistics)
        return tuple(dict.fromkeys((*self.features, *sorted(tested))))

    def require(self, identity: ModelIdentity) -> None:
        """Refuses a model that the probe was not fitted on.

        Raises:
            ProbeMismatch: names what differs, both values and the command that fits a probe for this model.
        """
        different = self.identity.differences(identity)
        if different:
            what, mine, theirs = different[0]
            raise ProbeMismatch(
                f"the probe {self.name!r} was fitted on {self.identity.name} with {what} {mine[:12]}, "
                f"the model {identity.name} brings {theirs[:12]}; fit one for it: "
                f"lapwing extract --model {identity.name} and lapwing train"
            )

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Probe:
        """Loads and verifies a probe directory, or one from the Hugging Face Hub by its id.

        Raises:
            ProbeCorrupt: a file is missing, changed, too large or holds what it should not.
        """
        from lapwing_detector.probe_files import load

        return load(source)

    def save_pretrained(
        self, directory: str | Path, *, files: Mapping[str, bytes] | None = None, card: str | None = None
    ) -> Path:
        """Writes the probe directory whole or not at all, replacing a probe that was there.

        Args:
            directory: where; must not exist, or be a probe directory.
            files: further files by name, such as `predictions.jsonl`.
            card: text of README.md; one is made from the probe without it.

        Returns:
            The directory.
        """
        from lapwing_detector.probe_files import save

        return save(self, Path(directory), files or {}, card)

    def push_to_hub(self, repo_id: str, *, directory: str | Path | None = None, private: bool = False) -> str:
        """Uploads the probe to the Hugging Face Hub.

        Args:
            repo_id: such as `me/my-probe`; made if there is none.
            directory: where this probe was saved, to upload its report, card and predictions as they are.
            private: for a repository that is made.

        Returns:
            The address of the commit.

        Raises:
            ProbeCorrupt: the directory is damaged.
            ValueError: the directory holds another probe.
        """
        from lapwing_detector.probe_files import load, push

        if directory is not None and (other := load(directory)).revision != self.revision:
            raise ValueError(f"{directory} holds revision {other.revision}, this probe is {self.revision}")
        return push(self, repo_id, private, None if directory is None else Path(directory))

    def _required(self, given: Any) -> Any:
        if given is None:
            raise ProbeMismatch(
                f"the probe {self.name!r} reads more than attention: the log-probabilities of the response's tokens, "
                "which were not given; give them with the attention, or fit one that reads attention alone: "
                "lapwing train --recipe lapwing"
            )
        return given

    def _require_layers(self, summary: AttentionSummary, needed: Collection[int], mend: str) -> None:
        foreign = set(summary.layers) - set(self.layers) or set(needed) - set(summary.layers)
        if foreign or summary.diagonal.shape[1] != self.weights.shape[1]:
            raise ProbeMismatch(
                f"the probe {self.name!r} has layers {self.layers} of {self.weights.shape[1]} heads and needs "
                f"{tuple(needed)}, the attention has layers {summary.layers} of {summary.diagonal.shape[1]}; "
                f"use the model that it fits, and {mend}"
            )

    def _weight_norms(self, feature: str) -> NDArray[np.float32]:
        if feature not in self.features:
            return np.zeros(self.selected.shape, np.float32)
        start = sum(FEATURES[id].width(self.k) for id in self.features[: self.features.index(feature)])
        part = self.weights[..., start : start + FEATURES[feature].width(self.k)]
        return np.asarray(np.linalg.norm(part, axis=-1), dtype=np.float32)
