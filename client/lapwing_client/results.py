"""What a server answers, as plain frozen values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


class Result:
    """A value that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; NaN, which JSON does not have, is None."""
        assert is_dataclass(self)
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}


def plain(value: Any) -> Any:
    """A value as JSON values."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class HeadContribution(Result):
    """How much one attention head moved the logit."""

    layer: int
    head: int
    contribution: float
    """Signed; positive speaks for hallucination."""


@dataclass(frozen=True)
class Detection(Result):
    """How likely it is that a response is made up; or, with `state` UNSCORED, that this could not be told."""

    state: str
    """`SCORED` or `UNSCORED`. UNSCORED means neither "hallucinated" nor "not hallucinated"."""

    reason: str | None
    """Why it is UNSCORED: `TOO_SHORT`, `NON_FINITE`, `TRUNCATED`; None when it is SCORED."""

    message: str
    """The reason in words; empty when SCORED."""

    probability: float | None
    """Calibrated, in [0, 1]; None when UNSCORED."""

    logit: float | None
    """The probe's linear score before calibration; None when UNSCORED."""

    bias: float
    """The part of the logit that belongs to no token and no head."""

    flagged: bool | None
    """Whether the score passes the threshold of `false_positive_rate`; None when UNSCORED or when it has none."""

    false_positive_rate: float
    """The operating point that was asked for."""

    flagged_at: tuple[float, ...]
    """Every stored operating point whose threshold is passed."""

    probe_name: str
    probe_revision: str
    prompt_tokens: int
    response_tokens: int
    token_ids: tuple[int, ...]
    """Prompt and response as the model read them."""

    token_contributions: tuple[float, ...]
    """Signed share of each token in the logit; with `bias` they sum to it. Empty when UNSCORED."""

    strongest_heads: tuple[HeadContribution, ...]
    """The heads with the largest shares, strongest first."""

    seconds: Mapping[str, float]
    """Time in the server by stage: `queue`, `tokenise`, `forward`, `probe`."""


@dataclass(frozen=True)
class GeneratedToken(Result):
    """One token of a response and the running score."""

    index: int
    token_id: int
    text: str
    """What this token adds; empty while a character is incomplete."""

    log_probability: float
    probability: float | None
    """That the response so far is made up; None while it is too short to tell."""

    logit: float | None


@dataclass(frozen=True)
class Generation(Result):
    """A finished response."""

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Of the response. Scoring these ids gives the same score; the text may tokenise differently."""

    finish_reason: str
    """`STOP`: the model ended by itself; `LENGTH`: it reached the limit."""

    detection: Detection


@dataclass(frozen=True)
class Matrix(Result):
    """Numbers in rows and columns, without needing numpy."""

    shape: tuple[int, int]
    values: tuple[float, ...]
    """Row by row."""

    def __getitem__(self, place: tuple[int, int]) -> float:
        row, column = place
        if not (0 <= row < self.shape[0] and 0 <= column < self.shape[1]):
            raise IndexError(f"[{row}, {column}] is outside of {self.shape}")
        return self.values[row * self.shape[1] + column]

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The same as one tuple for each row."""
        width = self.shape[1]
        return tuple(self.values[i * width : (i + 1) * width] for i in range(self.shape[0]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"shape": list(self.shape), "rows": plain(self.rows)}


@dataclass(frozen=True)
class Heatmap(Result):
    """One number of every layer and head."""

    probe_name: str
    probe_revision: str
    feature: str
    statistic: str
    values: Matrix
    """(layers, heads)."""

    layers: tuple[int, ...]
    """Index in the model of each row."""

    column_label: str
    row_label: str
    value_label: str
    image: bytes
    """A picture in the format asked for; empty without one."""


@dataclass(frozen=True)
class ModelIdentity(Result):
    """Which model it is; digests are hexadecimal SHA-256."""

    name: str
    commit: str
    architecture: str
    parameters: str
    weights: str
    dtype: str
    quantisation: str
    tokenizer: str
    chat_template: str
    layers: int
    heads: int


@dataclass(frozen=True)
class Threshold(Result):
    """One operating point: flagged when the logit is strictly above."""

    false_positive_rate: float
    logit: float
    realised_rate: float | None
    negatives: int


@dataclass(frozen=True)
class Probe(Result):
    """A probe of the server."""

    name: str
    revision: str
    state: str
    """`ACTIVE`, `LOADED` or `REJECTED`; of a rejected one only the name and `state_message` are known."""

    state_message: str
    features: tuple[str, ...]
    k: int
    layers: tuple[int, ...]
    heads: int
    width: int
    needed_tokens: int
    selected_heads: tuple[tuple[int, int], ...]
    """(layer, head) of every head that it reads."""

    slope: float
    intercept: float
    """probability = sigmoid(slope * logit + intercept), or by the knots where there are any."""

    knots: tuple[tuple[float, float], ...]
    """(logit, probability) of an isotonic calibration, ascending; empty for Platt's."""

    thresholds: tuple[Threshold, ...]
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    model: ModelIdentity | None
    heatmaps: tuple[tuple[str, str], ...]
    """(feature, statistic) of every heatmap that it has."""


@dataclass(frozen=True)
class Limits(Result):
    """What the server takes at most."""

    max_request_bytes: int
    max_batch_items: int
    max_new_tokens: int
    max_generate_streams: int
    max_heatmap_pixels: int
    max_messages: int
    max_characters_per_token: int
    """More than this for each of `max_tokens` is refused without being tokenised."""


@dataclass(frozen=True)
class ServerInfo(Result):
    """What runs in a server."""

    version: str
    state: str
    """`LOADING`, `SERVING`, `FAILED` or `STOPPING`."""

    message: str
    """Why it is not serving; empty when it is."""

    model: ModelIdentity | None
    max_tokens: int
    """Of prompt and response together; 0 until the model is loaded."""

    limits: Limits
    probe_name: str
    probe_revision: str
    library_versions: Mapping[str, str]
