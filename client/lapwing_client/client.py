"""The client: one method for each thing that a server does."""

from __future__ import annotations

import ipaddress
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_client import replies, requests, results
from lapwing_client.errors import (
    Cancelled,
    DeadlineExceeded,
    LapwingError,
    PermissionDenied,
    Unavailable,
    Unimplemented,
    error_of_call,
)
from lapwing_client.requests import Prompt, Response

Reply = TypeVar("Reply")

SERVICES = (
    detector_pb2.DESCRIPTOR.services_by_name["Detector"],
    probes_pb2.DESCRIPTOR.services_by_name["Probes"],
)

RETRIES = {
    "methodConfig": [
        {
            # No streams: gRPC 1.85.1 never ends a stream, not even at its deadline, whose connection breaks while it
            # begins and that a retry policy covers.
            "name": [
                {"service": service.full_name, "method": method.name}
                for service in SERVICES
                for method in service.methods
                if not (method.client_streaming or method.server_streaming)
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""gRPC's own retries: a server that goes away hands over to the next one."""

LARGEST_REPLY = 64 * 2**20
"""Bytes; gRPC's default of 4 MiB is less than a batch of long texts answers with."""

SERVING = b"\x08\x01"
"""grpc.health.v1.HealthCheckResponse{status: SERVING}; the message is too small to depend on a package for it."""


class Client:
    """Talks to a Lapwing server; may be shared by threads.

    Args:
        target: HOST:PORT, or any other address that gRPC resolves.
        token: sent with every call; only to a server on this machine, because the connection is not encrypted.
        timeout: seconds that a call may take unless it is given its own.
        retry: whether calls to a server that does not answer are tried again, up to four times; Generate never is.

    Raises:
        InvalidRequest: the token would leave this machine or can't be sent, or the timeout is no number of seconds.
    """

    def __init__(
        self, target: str = "localhost:50051", *, token: str | None = None, timeout: float = 60.0, retry: bool = True
    ) -> None:
        if token is not None and not is_local(target):
            message = f"is {target!r}; a token goes only to this machine, the connection is not encrypted"
            raise requests.unusable("target", message)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise requests.unusable("token", "has characters that no header can hold; give printable ASCII")
        self.target = target
        self.timeout = patience(timeout)
        self._closed = False
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._channel = grpc.insecure_channel(target, options=channel_options(retry))
        self._detector = detector_pb2_grpc.DetectorStub(self._channel)  # type: ignore[no-untyped-call]
        self._probes = probes_pb2_grpc.ProbesStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Callable[..., bytes] = self._channel.unary_unary("/grpc.health.v1.Health/Check")

    def score(
        self,
        prompt: Prompt,
        response: Response,
        *,
        false_positive_rate: float | None = None,
        timeout: float | None = None,
    ) -> results.Detection:
        """How likely the response to the prompt is made up.

        Args:
            prompt: text, chat messages (`[{"role": "user", "content": "..."}]`), or token ids.
            response: text or token ids.
            false_positive_rate: operating point of `flagged`, in (0, 1); 0.05 without it.
            timeout: seconds.

        Raises:
            LapwingError: see its subclasses.
        """
        request = requests.score_request(prompt, response, false_positive_rate)
        return replies.detection_of(self._call(self._detector.Score, request, timeout).detection)

    def score_batch(
        self,
        items: Sequence[tuple[Prompt, Response]],
        *,
        false_positive_rate: float | None = None,
        timeout: float | None = None,
    ) -> list[results.Detection | LapwingError]:
        """The same for several responses; an item that is refused has its error in its place.

        Args:
            items: (prompt, response) each as for `score`; at most `server_info().limits.max_batch_items`.
            false_positive_rate: as for `score`.
            timeout: seconds for all of them.

        Raises:
            LapwingError: the whole call failed.
        """
        request = requests.score_batch_request(items, false_positive_rate)
        reply = self._call(self._detector.ScoreBatch, request, timeout)
        return [replies.outcome_of(result) for result in reply.results]

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        false_positive_rate: float | None = None,
        timeout: float | None = None,
    ) -> GenerationStream:
        """Lets the server's model write, token by token.

        Args:
            prompt: as for `score`.
            max_new_tokens: at most so many; 64 without it.
            temperature: 0, the default, takes the likeliest token each time.
            top_p: samples from the likeliest tokens that make up this probability, in (0, 1].
            seed: makes sampling repeatable.
            false_positive_rate: as for `score`.
            timeout: seconds for the whole response.

        Returns:
            An iterator of `GeneratedToken`, at the end one `Generation`. Leaving it (`with`, `close`, or dropping it)
            stops the model within a token.

        Raises:
            LapwingError: here or while iterating.
        """
        request = requests.generate_request(prompt, max_new_tokens, temperature, top_p, seed, false_positive_rate)
        return GenerationStream(self._call(self._detector.Generate, request, timeout), self.target)

    def heatmap(
        self,
        statistic: str = "P_VALUE",
        *,
        probe: str = "",
        feature: str = "",
        image: Literal["png", "svg"] | None = None,
        timeout: float | None = None,
    ) -> results.Heatmap:
        """One number of every layer and head of a probe.

        Args:
            statistic: `P_VALUE`, `Q_VALUE`, `AUROC`, `EFFECT_SIZE`, `HEAD_PROBE`, `WEIGHT` or `SELECTED`.
            probe: its name; the active one without it.
            feature: id such as `laplacian_eigenvalues.v1`; the probe's first one without it.
            image: also draw it.
            timeout: seconds.

        Raises:
            LapwingError: `NotFound` for the probe, `InvalidRequest` for the rest.
        """
        request = requests.heatmap_request(statistic, probe, feature, image)
        return replies.heatmap_of(self._call(self._probes.GetHeatmap, request, timeout))

    def probes(self, *, timeout: float | None = None) -> list[results.Probe]:
        """All probes of the server, by name; asks page by page."""
        found: list[results.Probe] = []
        token = ""
        while True:
            page = self._call(self._probes.ListProbes, probes_pb2.ListProbesRequest(page_token=token), timeout)
            found += [replies.probe_of(probe) for probe in page.probes]
            token = page.next_page_token
            if not token:
                return found

    def probe(self, name: str = "", *, timeout: float | None = None) -> results.Probe:
        """One probe; the active one without a name."""
        request = probes_pb2.GetProbeRequest(name=requests.text(name, "name"))
        return replies.probe_of(self._call(self._probes.GetProbe, request, timeout).probe)

    def server_info(self, *, timeout: float | None = None) -> results.ServerInfo:
        """What runs there; answers also while the model is loading."""
        return replies.server_info_of(
            self._call(self._detector.GetServerInfo, detector_pb2.GetServerInfoRequest(), timeout)
        )

    def wait_until_ready(self, timeout: float | None = None) -> results.ServerInfo:
        """Waits until the server is there and its model is loaded.

        Raises:
            Unavailable: the server said that its model could not be loaded.
            DeadlineExceeded: it took longer than the timeout.
            PermissionDenied, Unimplemented: waiting would not help.
        """
        seconds = self._patience(timeout)
        ends = time.monotonic() + seconds
        last = f"nobody answers at {self.target}"
        while (left := ends - time.monotonic()) > 0:
            try:
                if self._healthy(min(left, 1.0)):
                    return self.server_info(timeout=max(left, 1.0))
                info = self.server_info(timeout=left)
            except (Unavailable, DeadlineExceeded):
                pass
            else:
                last = info.message
                if info.state == "FAILED":
                    message = f"{self.target} is not serving: {last}"
                    raise Unavailable(message, reason="SERVER_FAILED", code="UNAVAILABLE")
            time.sleep(min(0.05, left))
        raise DeadlineExceeded(f"not ready after {seconds:g} s: {last}", code="DEADLINE_EXCEEDED")

    def close(self) -> None:
        """Ends every call and the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., Reply], request: Any, timeout: float | None, **options: Any) -> Reply:
        try:
            return method(request, timeout=self._patience(timeout), metadata=self._metadata, **options)
        except grpc.RpcError as error:
            raise error_of_call(error, self.target) from None
        except ValueError:  # what gRPC raises for a closed channel, and for other things
            if not self._closed:
                raise
            raise Cancelled("the client is closed; make another one", code="CANCELLED") from None

    def _healthy(self, timeout: float) -> bool:
        """Whether the server says that it is serving; Unavailable for every error that may pass."""
        try:
            return self._call(self._health, b"", timeout, wait_for_ready=True) == SERVING
        except LapwingError as error:
            if isinstance(error, Cancelled | PermissionDenied | Unimplemented):
                raise
            raise Unavailable(error.message, code=error.code) from None

    def _patience(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else patience(timeout)


class GenerationStream(Iterator[results.GeneratedToken | results.Generation]):
    """A response while it is written. A stream that is dropped is closed, because gRPC cancels a call that is."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target

    def __next__(self) -> results.GeneratedToken | results.Generation:
        try:
            return replies.event_of(next(self._call))
        except grpc.RpcError as error:
            raise error_of_call(error, self._target) from None

    def close(self) -> None:
        """Stops the model; as often as one likes."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def patience(timeout: float) -> float:
    """The timeout in seconds; what has passed already is one, too.

    Raises:
        InvalidRequest: it is not a finite number.
    """
    seconds = requests.real(timeout, "timeout")
    if seconds is None or not math.isfinite(seconds):
        raise requests.unusable("timeout", f"is {timeout}; give a finite number of seconds")
    return seconds


def channel_options(retry: bool) -> list[tuple[str, Any]]:
    """What gRPC is told about the connection."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", LARGEST_REPLY),
        ("grpc.enable_retries", int(retry)),
    ]
    return [*options, ("grpc.service_config", json.dumps(RETRIES))] if retry else options


def is_local(target: str) -> bool:
    """Whether the address is of this machine."""
    host = target.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or target.startswith("unix:")
