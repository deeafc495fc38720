"""Every call of a client: what is sent, to which method, and how the answer is read. Sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_client import replies, requests, results
from lapwing_client.errors import LapwingError
from lapwing_client.requests import Prompt, Response

Answer = TypeVar("Answer", covariant=True)

SERVING = b"\x08\x01"
"""grpc.health.v1.HealthCheckResponse{status: SERVING}; the message is too small to depend on a package for it."""


class Stubs:
    """The methods of a server over one channel, a blocking or an asynchronous one."""

    def __init__(self, channel: Any) -> None:
        self.detector = detector_pb2_grpc.DetectorStub(channel)  # type: ignore[no-untyped-call]
        self.probes = probes_pb2_grpc.ProbesStub(channel)  # type: ignore[no-untyped-call]
        self.health = SimpleNamespace(Check=channel.unary_unary("/grpc.health.v1.Health/Check"))


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One call."""

    service: str
    """Of `Stubs`."""

    name: str
    request: Any
    read: Callable[[Any], Answer]
    """From the message to what the caller gets."""

    def method(self, stubs: Stubs) -> Any:
        """What makes the call."""
        return getattr(getattr(stubs, self.service), self.name)


def score(prompt: Prompt, response: Response, **options: Any) -> Call[results.Detection]:
    """Options as for `requests.score_request`."""
    request = requests.score_request(prompt, response, **options)
    return Call("detector", "Score", request, lambda reply: replies.detection_of(reply.detection))


def score_batch(
    items: Sequence[tuple[Prompt, Response]], **options: Any
) -> Call[list[results.Detection | LapwingError]]:
    """Options as for `requests.score_batch_request`."""
    request = requests.score_batch_request(items, **options)
    return Call("detector", "ScoreBatch", request, lambda reply: [replies.outcome_of(one) for one in reply.results])


def generate(prompt: Prompt, **options: Any) -> Call[results.GeneratedToken | results.Generation]:
    """A stream; options as for `requests.generate_request`."""
    return Call("detector", "Generate", requests.generate_request(prompt, **options), replies.event_of)


def score_attention() -> Call[results.Detection]:
    """A stream in both directions, whose messages are written one by one."""
    return Call("detector", "ScoreAttention", None, lambda reply: replies.detection_of(reply.detection))


def server_info() -> Call[results.ServerInfo]:
    """What runs there."""
    return Call("detector", "GetServerInfo", detector_pb2.GetServerInfoRequest(), replies.server_info_of)


def heatmap(statistic: str, probe: str, feature: str, image: str | None) -> Call[results.Heatmap]:
    """One number of every layer and head."""
    request = requests.heatmap_request(statistic, probe, feature, image)
    return Call("probes", "GetHeatmap", request, replies.heatmap_of)


def probes_page(token: str) -> Call[tuple[list[results.Probe], str]]:
    """Some probes, and how to ask for the next ones."""

    def read(reply: probes_pb2.ListProbesResponse) -> tuple[list[results.Probe], str]:
        return [replies.probe_of(probe) for probe in reply.probes], reply.next_page_token

    return Call("probes", "ListProbes", probes_pb2.ListProbesRequest(page_token=token), read)


def probe(name: str) -> Call[results.Probe]:
    """One probe."""
    request = probes_pb2.GetProbeRequest(name=requests.text(name, "name"))
    return Call("probes", "GetProbe", request, lambda reply: replies.probe_of(reply.probe))


def activate_probe(name: str, revision: str) -> Call[results.Activation]:
    """Another active probe."""
    request = probes_pb2.ActivateProbeRequest(
        name=requests.text(name, "name"), revision=requests.text(revision, "revision")
    )
    return Call("probes", "ActivateProbe", request, replies.activation_of)


def reload_probes() -> Call[list[results.Probe]]:
    """New probes and revisions."""
    return Call(
        "probes",
        "ReloadProbes",
        probes_pb2.ReloadProbesRequest(),
        lambda reply: [replies.probe_of(probe) for probe in reply.probes],
    )


def healthy() -> Call[bool]:
    """Whether the server says that it is serving."""
    return Call("health", "Check", b"", lambda reply: reply == SERVING)
