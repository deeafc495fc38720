"""When a call is tried again: by gRPC for one answer, by us for a stream that has not begun."""

from __future__ import annotations

from typing import Any

from lapwing.v1 import detector_pb2, probes_pb2
from lapwing_client.errors import Cancelled, LapwingError, Unavailable

ATTEMPTS = 5
"""The most that gRPC makes. They take a second and a half: longer than a replica that came back goes unseen."""

FIRST_PAUSE, LONGEST_PAUSE, FACTOR = 0.1, 2.0, 2
"""Seconds between attempts, and by what they grow."""

HEALTH = detector_pb2.DESCRIPTOR.services_by_name["Detector"].full_name
"""The service whose health says whether a replica gets calls."""

SERVICES = (
    detector_pb2.DESCRIPTOR.services_by_name["Detector"],
    probes_pb2.DESCRIPTOR.services_by_name["Probes"],
)


def service_config(retry: bool, several: bool) -> dict[str, Any]:
    """What gRPC does by itself.

    Args:
        retry: whether calls with one answer are tried again; gRPC keeps to a server's push-back, and -1 ends it.
        several: whether calls take turns among replicas, leaving out those that don't say that they are serving.
    """
    config: dict[str, Any] = {}
    if several:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        config["healthCheckConfig"] = {"serviceName": HEALTH}
    if retry:
        config["methodConfig"] = [{"name": unary_methods(), "retryPolicy": policy()}]
    return config


def unary_methods() -> list[dict[str, str]]:
    """Every method with one answer.

    No streams: gRPC 1.85.1 never ends a stream, not even at its deadline, whose connection breaks while it begins and
    that a retry policy covers.
    """
    return [
        {"service": service.full_name, "method": method.name}
        for service in SERVICES
        for method in service.methods
        if not (method.client_streaming or method.server_streaming)
    ]


def policy() -> dict[str, Any]:
    """A server that goes away hands over to the next one; one that is too busy says when to come again.

    `CANCELLED`, which a caller's own cancelling never comes back as here, is what a server that is ending answers to
    calls that it had taken from the network but not begun.
    """
    return {
        "maxAttempts": ATTEMPTS,
        "initialBackoff": f"{FIRST_PAUSE}s",
        "maxBackoff": f"{LONGEST_PAUSE}s",
        "backoffMultiplier": FACTOR,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
    }


class Beginning:
    """The attempts to begin one stream. Once it has said anything, it is not begun again."""

    def __init__(self, retry: bool) -> None:
        self._left = ATTEMPTS - 1 if retry else 0
        self._pause = FIRST_PAUSE

    def pause_after(self, error: LapwingError) -> float | None:
        """Seconds after which to begin again; None when that would not help, or not any more."""
        if self._left <= 0 or not isinstance(error, Unavailable | Cancelled):
            return None
        self._left -= 1
        pause, self._pause = self._pause, min(self._pause * FACTOR, LONGEST_PAUSE)
        return pause

    def begun(self) -> None:
        """It has said something."""
        self._left = 0
