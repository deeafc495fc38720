"""A tiny engine, and a real server around it in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from lapwing_detector.calibration import Calibration
from lapwing_detector.detection import Detection, HeadContribution, Reason, State
from lapwing_detector.errors import DetectorError, InvalidInput, TooLong
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe, Threshold
from lapwing_server.engine import Loaded
from lapwing_server.server import Server, Settings
from lapwing_server.shelf import Shelf, Shelved

VOCABULARY = 256
CONTEXT = 400
WAIT = 20.0
"""Seconds after which a test gives up waiting; none of them is measured."""

LAPLACIAN, ATTENTION_SCORE = "laplacian_eigenvalues.v1", "attention_score.v1"


def an_identity(name: str = "fake-model") -> ModelIdentity:
    digest = "ab" * 32
    return ModelIdentity(name, "", digest, digest, digest, "float32", "none", digest, digest, 2, 3, (0.5, 0.25))


def a_probe(name: str = "fake-probe", layers: int = 2, heads: int = 3, **changes: Any) -> Probe:
    """A probe whose every number is different."""
    generator = np.random.default_rng(7)
    selected = np.ones((layers, heads), bool)
    selected[0, 0] = False
    weights = generator.normal(size=(layers, heads, 3)).astype(np.float32) * selected[..., None]
    values = {
        f"{feature}/{statistic}": generator.uniform(size=(layers, heads)).astype(np.float32)
        for feature in (LAPLACIAN, ATTENTION_SCORE)
        for statistic in ("P_VALUE", "Q_VALUE", "AUROC", "HEAD_PROBE")
    }
    fields: dict[str, Any] = {
        "name": name,
        "features": (LAPLACIAN,),
        "k": 3,
        "layers": tuple(range(1, layers + 1)),
        "weights": weights,
        "bias": -0.25,
        "selected": selected,
        "calibration": Calibration(1.5, 0.1),
        "thresholds": (Threshold(0.01, 2.0, None, 0), Threshold(0.05, 0.5, 0.04, 100), Threshold(0.1, 0.0, 0.09, 100)),
        "identity": an_identity(),
        "statistics": values,
        "metrics": {
            "auroc": 0.75,
            "interval": [0.7, 0.8],
            "spread": float("nan"),
            "examples": {"missed": [{"prompt": "a secret"}]},
        },
        "training": {"items": 100},
    }
    return Probe(**fields | changes)


def a_shelf(*names: str, rejected: tuple[str, ...] = ()) -> Shelf:
    entries = [Shelved(name, a_probe(name), "") for name in names or ("fake-probe",)]
    entries += [Shelved(name, None, "its sha256 differs") for name in rejected]
    active = entries[0].probe
    assert active is not None
    return Shelf(tuple(sorted(entries, key=lambda entry: entry.name)), active)


@dataclass(frozen=True)
class FakeToken:
    index: int
    token_id: int
    text: str
    log_probability: float
    probability: float | None
    logit: float | None


@dataclass(frozen=True)
class FakeGeneration:
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    detection: Detection


@dataclass
class FakeEngine:
    """One token for each byte; the logit is made of the ids, so that a mix-up shows."""

    probe: Probe = field(default_factory=a_probe)
    identity: ModelIdentity = field(default_factory=an_identity)
    max_tokens: int = CONTEXT
    before: Callable[[], None] = lambda: None
    """Called by the worker before each forward: a gate to hold it, or something to raise."""

    forwards: int = 0
    steps: int = 0
    closed: int = 0
    threads: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def score(self, prompt: Any, response: Any, *, false_positive_rate: float) -> Detection:
        self._forward("score")
        return self._detect(self._ids(prompt, "prompt"), self._ids(response, "response"), false_positive_rate)

    def score_batch(self, items: Any, *, false_positive_rate: float) -> list[Detection | DetectorError]:
        self._forward("score_batch")
        results: list[Detection | DetectorError] = []
        for prompt, response in items:
            try:
                ids = self._ids(prompt, "prompt"), self._ids(response, "response")
                results.append(self._detect(*ids, false_positive_rate))
            except DetectorError as error:
                results.append(error)
        return results

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: Any,
        false_positive_rate: float,
    ) -> Iterator[FakeToken | FakeGeneration]:
        prompt_ids = self._ids(prompt, "prompt")
        return self._write(prompt_ids, max_new_tokens, false_positive_rate)

    def _write(self, prompt_ids: tuple[int, ...], count: int, rate: float) -> Iterator[FakeToken | FakeGeneration]:
        ids: tuple[int, ...] = ()
        try:
            for index in range(count):
                self._forward("step")
                self.steps += 1
                ids += (65 + index % 26,)
                now = self._detect(prompt_ids, ids, rate)
                yield FakeToken(index, ids[-1], chr(ids[-1]), -0.5, now.probability, now.logit)
            text = "".join(map(chr, ids))
            yield FakeGeneration(text, prompt_ids, ids, "length", self._detect(prompt_ids, ids, rate))
        finally:
            self.closed += 1

    def _forward(self, what: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.before()
        self.forwards += 1
        self.calls.append(what)

    def _ids(self, content: Any, field: str) -> tuple[int, ...]:
        if isinstance(content, str):
            return tuple(content.encode())
        if isinstance(content[0], dict):
            return tuple("".join(f"<{turn['role']}>{turn['content']}" for turn in content).encode())
        for i, number in enumerate(content):
            if not 0 <= number < VOCABULARY:
                raise InvalidInput(f"{field}_ids[{i}]", f"is {number}; the vocabulary has {VOCABULARY} tokens")
        return tuple(content)

    def _detect(self, prompt: tuple[int, ...], response: tuple[int, ...], rate: float) -> Detection:
        ids = prompt + response
        if len(ids) > self.max_tokens:
            raise TooLong("response", f"prompt and response have {len(ids)} tokens, the model takes {self.max_tokens}")
        short = len(ids) < self.probe.needed_tokens
        shares = np.array([] if short else [(number - 97) / 64 for number in ids], np.float32) / max(1, len(ids))
        logit = None if short else float(shares.sum()) + self.probe.bias
        threshold = self.probe.threshold(rate)
        return Detection(
            state=State.UNSCORED if logit is None else State.SCORED,
            reason=Reason.TOO_SHORT if short else None,
            message=f"{len(ids)} tokens, {self.probe.needed_tokens} needed" if short else "",
            probability=None if logit is None else self.probe.calibration.probability(logit),
            logit=logit,
            bias=self.probe.bias,
            flagged=None if logit is None or threshold is None else logit > threshold.logit,
            false_positive_rate=rate,
            flagged_at=() if logit is None else self.probe.flagged_at(logit),
            probe_name=self.probe.name,
            probe_revision=self.probe.revision,
            prompt_tokens=len(prompt),
            response_tokens=len(response),
            token_ids=ids,
            token_contributions=shares,
            head_contributions=(HeadContribution(2, 1, 0.5), HeadContribution(1, 2, -0.25)) if not short else (),
            seconds={"tokenise": 0.0, "forward": 0.0, "probe": 0.0},
        )


@dataclass(frozen=True)
class Told:
    """What a client is told of an error."""

    code: grpc.StatusCode
    reason: str
    field: str
    message: str
    error_id: str


def told(error: Any) -> Told:
    """All that an error carries; fails when a part is missing or two parts disagree."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert info.domain == "lapwing"
    assert info.reason
    for detail in status.details[1:]:
        detail.Unpack(bad)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return Told(error.code(), info.reason, field, status.message, info.metadata.get("error_id", ""))


def refused(call: Any, message: Any) -> Told:
    """What the refusal of a message says; of a stream every event is read."""
    try:
        answer = call(message, timeout=WAIT)
        answers = [answer] if hasattr(answer, "SerializeToString") else list(answer)
    except grpc.RpcError as error:
        return told(error)
    raise AssertionError(f"it was not refused but answered with {answers}")


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks again and again until it holds."""
    ticks = threading.Event()
    for _ in range(int(WAIT / 0.005)):
        if condition():
            return
        ticks.wait(0.005)
    raise AssertionError("it did not come true")


class Gate:
    """Holds whoever comes until it is opened, and lets a test see that somebody came."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(WAIT), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()


class Running:
    """A real server on a free port; its event loop has a thread of its own."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        load: Callable[[], Loaded] | None = None,
        shelf: Shelf | None = None,
        ready: bool = True,
        **settings: Any,
    ) -> None:
        self.engine = engine or FakeEngine()
        loaded = Loaded(self.engine, shelf or a_shelf())
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-event-loop")
        self._thread.start()
        self.server: Server = self.call(self._make(load or (lambda: loaded), Settings(**{"port": 0} | settings)))
        self.port: int = self.call(self.server.start())
        self._stopped = False
        if ready:
            self.call(self.server.loaded())

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What the coroutine returns, run on the server's loop."""
        return self.begin(coroutine).result(WAIT)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def settle(self) -> None:
        """Waits until the worker has done all that is in its queue, and no call is in flight."""
        self.call(self.server.worker.run(lambda: None))
        self.call(asyncio.wait_for(self.server.guard.idle(), WAIT))
        self.call(self.server.worker.run(lambda: None))

    def close(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.call(self.server.stop())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(WAIT)
            self.loop.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _make(self, load: Callable[[], Loaded], settings: Settings) -> Server:
        return Server(load, settings)
