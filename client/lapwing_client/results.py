"""What a server answers, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lapwing_client import notebook
from lapwing_client.values import Matrix, Result


@dataclass(frozen=True, repr=False)
class HeadContribution(Result):
    """How much one attention head moved the logit."""

    layer: int
    head: int
    contribution: float
    """Signed; positive speaks for hallucination."""


@dataclass(frozen=True, repr=False)
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
    """Signed share of each token in the logit; with `bias` they sum to it. Empty when UNSCORED. Of a stream of
    attention, of the tokens whose attention was sent."""

    heads_contribution: float
    """What all heads together add to the logit: with `bias` and `statistic_contributions` it makes the logit."""

    statistic_contributions: Mapping[str, float]
    """What each statistic of the response's log-probabilities adds to the logit; empty for a probe that reads
    attention only."""

    strongest_heads: tuple[HeadContribution, ...]
    """The heads with the largest shares, strongest first."""

    seconds: Mapping[str, float]
    """Time in the server by stage: `queue`, `tokenise`, `forward`, `probe`; of a generation also `first_token`."""

    def _repr_html_(self) -> str:
        return notebook.detection(self)


@dataclass(frozen=True, repr=False)
class GeneratedToken(Result):
    """One token of a response and the running score."""

    index: int
    token_id: int
    text: str
    """What this token adds; empty while a character is incomplete, or while the text may become a stop string."""

    log_probability: float
    probability: float | None
    """That the response so far is made up; None while it is too short to tell, and where `score_every` passes over."""

    logit: float | None
    token_contributions: tuple[float, ...]
    """Of each token of prompt and response so far; empty unless asked for."""


@dataclass(frozen=True, repr=False)
class Generation(Result):
    """A finished response."""

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Of the response. Scoring these ids gives the same score; the text may tokenise differently."""

    finish_reason: str
    """`STOP`: the model ended by itself; `LENGTH`: it reached the limit; `STOP_STRING`: it wrote one of them;
    `FLAGGED`: the probability rose above the one that was to stop it."""

    detection: Detection


@dataclass(frozen=True, repr=False)
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

    def _repr_html_(self) -> str | None:
        return notebook.heatmap(self)


@dataclass(frozen=True, repr=False)
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


@dataclass(frozen=True, repr=False)
class Threshold(Result):
    """One operating point: flagged when the logit is strictly above."""

    false_positive_rate: float
    logit: float
    realised_rate: float | None
    negatives: int


@dataclass(frozen=True, repr=False)
class RejectedRevision(Result):
    """A revision of a probe that failed its checks."""

    revision: str
    """Empty where it could not even be read."""

    message: str
    """Why."""


@dataclass(frozen=True, repr=False)
class Probe(Result):
    """A probe of the server."""

    name: str
    revision: str
    state: str
    """`ACTIVE`, `LOADED`, `SHADOW` (scores beside the active one, for the metrics only) or `REJECTED`; of a rejected
    one only the name, `state_message` and the revisions are known."""

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

    revisions: tuple[str, ...]
    """Those that the registry holds, newest first."""

    rejected_revisions: tuple[RejectedRevision, ...]
    """Of those, the ones that failed their checks."""

    statistic_weights: Mapping[str, float]
    """Weights of the statistics of the response's log-probabilities; empty for a probe that reads attention only."""


@dataclass(frozen=True, repr=False)
class Activation(Result):
    """Which probe scores from now on, and which one scored before."""

    active: Probe
    previous_name: str
    previous_revision: str
    """Activate it to go back."""


@dataclass(frozen=True, repr=False)
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

    max_streams_per_client: int
    """Of one token or certificate, else of one address."""

    max_stop_strings: int
    max_stop_string_characters: int
    max_stream_seconds: float
    max_attention_streams: int
    max_attention_bytes: int
    """Bytes of sums that one stream of attention may make the server hold."""


@dataclass(frozen=True, repr=False)
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
