"""What a server counts. Label values come from fixed sets and from the shelf, never from what a client wrote."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.descriptor import FileDescriptor
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lapwing.v1 import detector_pb2, probes_pb2
from lapwing_detector.detection import Detection, State
from lapwing_server.drift import Drift
from lapwing_server.refusal import TRANSLATION

if TYPE_CHECKING:
    from lapwing_server.shelf import Shelf

Labelled = TypeVar("Labelled", Counter, Gauge, Histogram)

OTHER: Final = "other"
"""Label of everything that no fixed set holds."""

ROLES: Final = ("active", "named", "shadow")
"""Why a probe scored: it is the active one, the request named it, or it scores unseen beside the active one."""

STAGES: Final = ("queue", "tokenise", "forward", "read", "probe", "first_token")
SHED: Final = (
    "QUEUE_FULL",
    "DEADLINE_UNREACHABLE",
    "RATE_LIMITED",
    "TOO_MANY_STREAMS",
    "CLIENT_QUEUE_FULL",
    "ATTENTION_FULL",
    "TOO_MANY_PICTURES",
)
DROPPED: Final = ("cancelled", "expired")
UNSEEN: Final = ("failed", "no_room", "not_sent")
ITEM_ERRORS: Final = tuple(sorted({"INTERNAL", *(reason for _, reason in TRANSLATION.values())}))
VERDICTS: Final = ("flagged", "unflagged", "undecided", "unscored")

SECONDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    600.0,
)
ITEMS: Final = (1, 2, 4, 8, 16, 32, 64)
TOKENS: Final = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
SHARES: Final = tuple(step / 20 for step in range(1, 21))


def methods_of(*files: FileDescriptor) -> dict[str, str]:
    """Label of every method of the files by its path: /lapwing.v1.Detector/Score -> lapwing.v1.Detector/Score."""
    names = [
        f"{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    ]
    return {f"/{name}": name for name in names}


METHODS: Final[Mapping[str, str]] = methods_of(
    detector_pb2.DESCRIPTOR, probes_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR
)
CODES: Final = frozenset(code.name for code in StatusCode)


class Metrics:
    """The metrics of one server, on a registry of their own.

    Every method is cheap and, but for `in_flight`, may be called by any thread.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._calls = counter("lapwing_calls_total", "Calls that ended, by method and code.", ["method", "code"])
        self._call_seconds = histogram(
            "lapwing_call_seconds", "Time from a call's begin to its end.", ["method"], buckets=SECONDS
        )
        self._in_flight = gauge("lapwing_calls_in_flight", "Calls that have not ended.", ["method"])
        self._open: dict[str, int] = {}
        self._stages = histogram(
            "lapwing_stage_seconds",
            "Time of a part of a call; forward is that of the whole batch, first_token that of a stream until then, "
            "read that of taking in the attention that a client sent.",
            ["stage"],
            buckets=SECONDS,
        )
        self._items = histogram("lapwing_forward_items", "Sequences that shared a forward.", buckets=ITEMS)
        self._tokens = histogram("lapwing_forward_tokens", "Tokens of a forward, padding counted.", buckets=TOKENS)
        self._queue = gauge("lapwing_queue_items", "Items that wait for the model.")
        self._attention = gauge("lapwing_attention_bytes", "Bytes of sums that open ScoreAttention streams hold.")
        self._generated = counter("lapwing_generated_tokens_total", "Tokens that were written.")
        self._detections = counter(
            "lapwing_detections_total",
            "Verdicts. The share flagged is flagged / (flagged + unflagged). undecided: there is a score and no stored "
            "threshold for the rate that was asked for. unscored: there is no score, which is no verdict of truth.",
            ["role", "probe", "verdict"],
        )
        self._unscored = counter("lapwing_unscored_total", "Verdicts without a score, by why.", ["role", "reason"])
        self._probability = histogram(
            "lapwing_score_probability",
            "Calibrated probability of hallucination of what was scored.",
            ["role", "probe"],
            buckets=SHARES,
        )
        self._shed = counter("lapwing_shed_total", "Requests refused because there is too much to do.", ["reason"])
        self._dropped = counter("lapwing_dropped_total", "Work that nobody waited for when its turn came.", ["reason"])
        self._item_errors = counter(
            "lapwing_item_errors_total",
            "Items of a ScoreBatch that failed alone, by reason; the call itself counts as OK.",
            ["reason"],
        )
        self._unseen = counter(
            "lapwing_shadow_skips_total",
            "Times that a shadow gave no verdict: it failed, the queue had no room for it, or the sender of attention "
            "did not send what it reads.",
            ["reason"],
        )
        self._info = gauge("lapwing_probe_info", "1 for the probes that score.", ["role", "name", "revision"])
        self._shelved = gauge(
            "lapwing_probes", "Names of the shelf that have a probe, and revisions of it that were rejected.", ["state"]
        )
        self._rejected = counter("lapwing_probe_rejections_total", "Probes that failed their checks when loaded.")
        self._stale = gauge(
            "lapwing_stale_file", "1 while what a file said before stays in use, since it can't be read now.", ["file"]
        )
        self.drift = Drift()
        self.registry.register(self.drift)
        self._names: frozenset[str] = frozenset()
        self._scoring: frozenset[tuple[str, str, str]] = frozenset()
        self._rejections: frozenset[tuple[str, str, str]] = frozenset()
        self._children: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()
        for metric, values in (
            (self._stages, STAGES),
            (self._shed, SHED),
            (self._dropped, DROPPED),
            (self._unseen, UNSEEN),
            (self._item_errors, ITEM_ERRORS),
        ):
            for value in values:
                metric.labels(value)

    def in_flight(self, method: str, change: int) -> None:
        """A call of the method, given as path, began (1) or ended (-1); on the event loop only."""
        label = METHODS.get(method, OTHER)
        if label not in self._open:
            self._open[label] = 0
            self._in_flight.labels(label).set_function(partial(self._open.__getitem__, label))
        self._open[label] += change

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """A call ended with the code, such as "OK", after so many seconds."""
        label = METHODS.get(method, OTHER)
        self._child(self._calls, label, code if code in CODES else OTHER).inc()
        self._child(self._call_seconds, label).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """A part of a call took so long; `STAGES` has the names."""
        self._stages.labels(known(stage, STAGES)).observe(seconds)

    def batch(self, items: int, tokens: int) -> None:
        """One forward held so many sequences and, padding counted, tokens."""
        self._items.observe(items)
        self._tokens.observe(tokens)

    def queue_is(self, waiting: Callable[[], int]) -> None:
        """Who says how many items wait; asked whenever somebody reads the metrics."""
        self._queue.set_function(waiting)

    def attention_is(self, held: Callable[[], int]) -> None:
        """The same of the bytes that ScoreAttention streams hold."""
        self._attention.set_function(held)

    def generated(self, tokens: int) -> None:
        """So many more tokens were written."""
        self._generated.inc(tokens)

    def shed(self, reason: str) -> None:
        """A request was refused because there is too much to do; `SHED` has the reasons."""
        self._shed.labels(known(reason, SHED)).inc()

    def dropped(self, reason: str) -> None:
        """Work was not done, because its client had left ("cancelled") or its deadline had passed ("expired")."""
        self._dropped.labels(known(reason, DROPPED)).inc()

    def item_failed(self, reason: str) -> None:
        """An item of a batch was refused alone; `ITEM_ERRORS` has the reasons."""
        self._item_errors.labels(known(reason, ITEM_ERRORS)).inc()

    def unseen(self, reason: str, shadows: int = 1) -> None:
        """So many shadows gave no verdict; `UNSEEN` has the reasons."""
        self._unseen.labels(known(reason, UNSEEN)).inc(shadows)

    def watch(self, file: str, stale: Callable[[], bool]) -> None:
        """Shows from now on whether a file, called by the name of its setting, is stale."""
        self._stale.labels(file).set_function(lambda: float(stale()))

    def scored(self, detection: Detection, role: str) -> None:
        """A probe gave its verdict.

        Args:
            detection: the verdict on a whole response, not a running one.
            role: one of `ROLES`.
        """
        role, probe = known(role, ROLES), known(detection.probe_name, self._names)
        self._detections.labels(role, probe, verdict_of(detection)).inc()
        if detection.state is State.UNSCORED:
            self._unscored.labels(role, detection.reason.value if detection.reason else OTHER).inc()
        if detection.probability is None:
            return
        self._probability.labels(role, probe).observe(detection.probability)
        if role == "active":
            self.drift.add(detection.probe_revision, detection.probability, detection.response_tokens)

    def probes(self, shelf: Shelf) -> None:
        """The shelf was loaded or changed; forgets the label sets of probes that left it."""
        rejected = rejections(shelf)
        with self._lock:
            self._rejected.inc(len(rejected - self._rejections))
            self._rejections = rejected
            names = frozenset(entry.name for entry in shelf.entries if entry.probe is not None)
            for gone in self._names - names:
                self._forget(gone)
            self._names = names
            self._say_scoring(shelf)
            self._shelved.labels("sound").set(len(names))
            self._shelved.labels("rejected").set(len(rejected))
            self.drift.follow(shelf.active)

    def _child(self, metric: Labelled, *labels: str) -> Labelled:
        """The metric of these labels, which the library itself takes longer to find. Only for sets that stay."""
        child = self._children.get((metric, *labels))
        if child is None:
            child = self._children[metric, *labels] = metric.labels(*labels)
        return child

    def _say_scoring(self, shelf: Shelf) -> None:
        """First what is new, so that nobody reads of a moment without an active probe: there is none."""
        scoring = [("active", shelf.active), *(("shadow", shadow) for shadow in shelf.shadows)]
        now = [(role, probe.name, probe.revision) for role, probe in scoring]
        for labels in now:
            self._info.labels(*labels).set(1)
        for labels in self._scoring.difference(now):
            self._info.remove(*labels)
        self._scoring = frozenset(now)

    def _forget(self, probe: str) -> None:
        for role in ROLES:
            forget(self._probability, role, probe)
            for verdict in VERDICTS:
                forget(self._detections, role, probe, verdict)


def forget(metric: Counter | Histogram, *labels: str) -> None:
    """Takes the labels off the page; older versions of the library complain of labels that were never there."""
    with suppress(KeyError):
        metric.remove(*labels)


def rejections(shelf: Shelf) -> frozenset[tuple[str, str, str]]:
    """Name, revision and reason of all that was rejected."""
    found = {(entry.name, one.revision, one.reason) for entry in shelf.entries for one in entry.rejected}
    return frozenset(
        found | {(one.name, "", one.reason) for one in shelf.entries if one.probe is None and not one.rejected}
    )


def known(value: str, values: Iterable[str]) -> str:
    """The value if it is among them, else the label of all others."""
    return value if value in values else OTHER


def verdict_of(detection: Detection) -> str:
    """One of `VERDICTS`."""
    if detection.state is State.UNSCORED:
        return "unscored"
    if detection.flagged is None:
        return "undecided"
    return "flagged" if detection.flagged else "unflagged"
