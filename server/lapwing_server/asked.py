"""What all parts of one request share: the probe that answers, how strictly it flags, how much may be asked."""

from __future__ import annotations

from dataclasses import dataclass

from lapwing.v1 import detector_pb2
from lapwing_detector.probe import Probe
from lapwing_server.context import answered_by
from lapwing_server.limits import Room
from lapwing_server.probes_service import find, sound
from lapwing_server.readiness import Readiness
from lapwing_server.readings import read_prompt, read_rate, read_response
from lapwing_server.refusal import Refusal
from lapwing_server.waiting import Item

Request = (
    detector_pb2.ScoreRequest
    | detector_pb2.ScoreBatchRequest
    | detector_pb2.GenerateRequest
    | detector_pb2.AttentionHeader
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One look at the shelf; what happens to the shelf later is of no consequence for this request."""

    probe: Probe
    shadows: tuple[Probe, ...]
    """Those that score beside the active probe; none beside another."""

    role: str
    """Why `probe` scores, as the metrics call it."""

    false_positive_rate: float
    room: Room

    def item(self, message: detector_pb2.ScoreRequest | detector_pb2.ScoreItem) -> Item:
        """A prompt and response to be scored.

        Raises:
            Refusal: names the field that can't be read.
        """
        prompt, response = read_prompt(message.prompt, self.room), read_response(message.response, self.room)
        return Item(prompt, response, self.probe, self.false_positive_rate, self.shadows, self.role)

    def item_or_refusal(self, message: detector_pb2.ScoreItem) -> Item | Refusal:
        """The same, or why it can't be read."""
        try:
            return self.item(message)
        except Refusal as refusal:
            return refusal


def asked(request: Request, readiness: Readiness) -> Asked:
    """What a request asks for.

    Raises:
        Refusal: nothing is loaded, there is no such probe, or it is not sound.
    """
    loaded = readiness.loaded
    probe = sound(find(loaded.shelf, request.probe, "probe")) if request.probe else loaded.shelf.active
    answered_by(probe.name, probe.revision)
    active = probe is loaded.shelf.active
    return Asked(
        probe,
        loaded.shelf.shadows if active else (),
        "active" if active else "named",
        read_rate(request),
        readiness.limits.room(loaded.engine.max_tokens),
    )
