"""What may happen to a server in its life, one scenario at a time: each says which codes it may end with."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

import grpc
from attention_fakes import a_header, a_summary, requests, score_now, some_maps
from service_fakes import WAIT, FakeEngine, a_probe

from lapwing.v1 import detection_pb2, detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from tests.detector.registries import write_probe

OK = frozenset({"OK"})
CUT_SHORT = frozenset({"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
LEFT = frozenset({"OK", "CANCELLED"})
WRONG = frozenset({"INVALID_ARGUMENT"})

MAPS = some_maps(24)

KILLED_CLIENT = """
import sys, threading, grpc
from lapwing.v1 import detector_pb2, detector_pb2_grpc
channel = grpc.insecure_channel(sys.argv[1])
stub = detector_pb2_grpc.DetectorStub(channel)
call = stub.Generate(detector_pb2.GenerateRequest.FromString(bytes.fromhex(sys.argv[2])))
next(call)
print("writing", flush=True)
threading.Event().wait()
"""


def named(name: str, bias: float = -0.25) -> Probe:
    """A probe of a registry, whose bias makes it a revision of its own."""
    return a_probe(name, bias=bias, metrics={})


def prompt(text: str) -> detection_pb2.Prompt:
    return detection_pb2.Prompt(text=text)


@dataclass
class Life:
    """A server's clients, its registry, and what came of everything."""

    target: str
    engine: FakeEngine
    registry: Registry
    room: Path
    """Where probes are made before they are published."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(scenario, code) -> how often."""

    unexpected: list[tuple[str, str, str]] = field(default_factory=list)
    published: int = 0
    _one_publisher: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.target)
        self.detector = detector_pb2_grpc.DetectorStub(self.channel)
        self.probes = probes_pb2_grpc.ProbesStub(self.channel)

    def happen(self, draw: random.Random, rare: bool = True) -> None:
        """One scenario, drawn at random; the rare ones take a process or a disk."""
        name = draw.choices([*OFTEN, *(RARE if rare else ())], [20] * len(OFTEN) + [1] * (len(RARE) if rare else 0))[0]
        allowed, scenario = (OFTEN | RARE)[name]
        try:
            code, text = scenario(self, draw) or "OK", ""
        except grpc.RpcError as error:
            code, text = error.code().name, str(error.details())  # type: ignore[attr-defined]
        except AssertionError as error:
            code, text = "WRONG ANSWER", str(error)
        self.codes[name, code] += 1
        if code not in allowed:
            self.unexpected.append((name, code, text))

    def close(self) -> None:
        self.channel.close()


def score(life: Life, draw: random.Random) -> None:
    text = "word " * draw.randint(1, 12)
    request = detector_pb2.ScoreRequest(prompt=prompt("Where?"), response=detection_pb2.Response(text=text))
    detection = life.detector.Score(request, timeout=WAIT).detection
    assert detection.probability <= 1.0
    assert detection.response_tokens == len(text)


def batch(life: Life, draw: random.Random) -> None:
    items = [
        detector_pb2.ScoreItem(prompt=prompt("Where?"), response=detection_pb2.Response(text="x" * draw.randint(1, 40)))
        for _ in range(draw.randint(1, 9))
    ]
    results = life.detector.ScoreBatch(detector_pb2.ScoreBatchRequest(items=items), timeout=WAIT).results
    assert [one.detection.response_tokens for one in results] == [len(one.response.text) for one in items]


def generate(life: Life, draw: random.Random) -> None:
    count = draw.randint(1, 20)
    request = detector_pb2.GenerateRequest(prompt=prompt("Go on"), max_new_tokens=count)
    assert len(list(life.detector.Generate(request, timeout=WAIT))) == count + 1


def cancel(life: Life, draw: random.Random) -> str:
    request = detector_pb2.GenerateRequest(prompt=prompt("Go on"), max_new_tokens=60)
    call = life.detector.Generate(request, timeout=WAIT)
    for _ in range(draw.randint(1, 5)):
        next(call)
    call.cancel()
    return str(call.code().name)


def attention(life: Life, draw: random.Random) -> None:
    tokens = draw.randint(8, MAPS.shape[2])
    cut = draw.randint(1, tokens - 1)
    sent = requests(a_header(), a_summary(MAPS, 0, cut), score_now(), a_summary(MAPS, cut, tokens))
    running, last = life.detector.ScoreAttention(sent, timeout=WAIT)
    assert (running.running, last.running) == (True, False)
    assert last.detection.response_tokens == tokens - 2


def attention_left(life: Life, draw: random.Random) -> str:
    left = Event()

    def half() -> Iterator[detector_pb2.ScoreAttentionRequest]:
        yield from requests(a_header(), a_summary(MAPS, 0, draw.randint(1, 8)), score_now())
        left.wait(WAIT)

    call = life.detector.ScoreAttention(half(), timeout=WAIT)
    try:
        next(call)
        call.cancel()
    finally:
        left.set()
    return str(call.code().name)


def deadline(life: Life, draw: random.Random) -> None:
    request = detector_pb2.ScoreRequest(prompt=prompt("Where?"), response=detection_pb2.Response(text="there " * 20))
    life.detector.Score(request, timeout=draw.uniform(0.0001, 0.02))


def malformed(life: Life, draw: random.Random) -> None:
    call: Callable[..., Any] = life.channel.unary_unary("/lapwing.v1.Detector/Score")
    call(b"\x0a\xff" + draw.randbytes(6), timeout=WAIT)


def wrong(life: Life, draw: random.Random) -> None:
    request = detector_pb2.GenerateRequest(prompt=prompt("Go on"), max_new_tokens=-draw.randint(1, 9))
    list(life.detector.Generate(request, timeout=WAIT))


def heatmap(life: Life, draw: random.Random) -> None:
    request = probes_pb2.GetHeatmapRequest(statistic=probes_pb2.STATISTIC_AUROC)
    assert life.probes.GetHeatmap(request, timeout=WAIT).values.data


def reload(life: Life, draw: random.Random) -> None:
    with life._one_publisher:  # or it might read a revision before it is damaged, and rightly keep it
        life.probes.ReloadProbes(probes_pb2.ReloadProbesRequest(), timeout=WAIT)


def publish(life: Life, draw: random.Random) -> None:
    with life._one_publisher:
        life.published += 1
        bias = -0.25 - life.published / 1024  # another revision each time
        directory = write_probe(life.room / f"probe-{life.published}", named("alpha", bias))
        life.registry.publish(directory, activate=True)
        shutil.rmtree(directory)
        life.probes.ReloadProbes(probes_pb2.ReloadProbesRequest(), timeout=WAIT)


def corrupt_publish(life: Life, draw: random.Random) -> None:
    """A revision of a name that does not score is damaged on the disk; after a reload everything goes on."""
    with life._one_publisher:
        life.published += 1
        directory = write_probe(life.room / f"probe-{life.published}", named("beta", float(life.published)))
        published = life.registry.publish(directory)
        shutil.rmtree(directory)
        weights = life.registry.root / "beta" / published.revision / "probe.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(draw.randbytes(100))
        reply = life.probes.ReloadProbes(probes_pb2.ReloadProbesRequest(), timeout=WAIT)
    [beta] = [probe for probe in reply.probes if probe.name == "beta"]
    assert published.revision != beta.revision
    assert published.revision in {one.revision for one in beta.rejected_revisions}


def killed_client(life: Life, draw: random.Random) -> None:
    request = detector_pb2.GenerateRequest(prompt=prompt("Go on"), max_new_tokens=100)
    command = [sys.executable, "-c", KILLED_CLIENT, life.target, request.SerializeToString().hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() in (b"writing\n", b"")  # refused, where there is no place for a stream
        client.send_signal(signal.SIGKILL)


Scenario = Callable[[Life, random.Random], str | None]
STREAM = frozenset({"OK", "RESOURCE_EXHAUSTED"})
"""There is not always a place for a stream."""

OFTEN: dict[str, tuple[frozenset[str], Scenario]] = {
    "score": (OK, score),
    "batch": (OK, batch),
    "generate": (STREAM, generate),
    "cancel": (LEFT | STREAM, cancel),
    "attention": (STREAM, attention),
    "attention_left": (LEFT | STREAM, attention_left),
    "deadline": (CUT_SHORT, deadline),
    "malformed": (WRONG, malformed),
    "wrong": (WRONG, wrong),
    "heatmap": (OK, heatmap),
}
RARE: dict[str, tuple[frozenset[str], Scenario]] = {
    "reload": (OK, reload),
    "publish": (OK, publish),
    "corrupt_publish": (OK, corrupt_publish),
    "killed_client": (OK, killed_client),
}
