"""The rpcs of lapwing.v1.Probes: read, call, translate."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable, Sequence
from typing import Final

from grpc import StatusCode

from lapwing.v1 import probes_pb2, probes_pb2_grpc
from lapwing_detector.errors import DetectorError, RegistryError, UnknownProbe
from lapwing_detector.head_map import STATISTICS, escaped, figure_bytes
from lapwing_detector.pictures import draw
from lapwing_detector.probe import Probe
from lapwing_server import answers
from lapwing_server.admission import pushback
from lapwing_server.context import Context
from lapwing_server.readiness import Readiness
from lapwing_server.refusal import Refusal, code_and_reason, invalid
from lapwing_server.shelf import LONGEST_REASON, Shelf, Shelved
from lapwing_server.swapping import Swapper
from lapwing_server.worker import Worker

DEFAULT_PAGE = 50
PAGE_TOKEN = re.compile(r"after:(?P<name>[^\x00-\x1f]{1,255})")
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

PICTURES: Final = 16
"""That are drawn or wait for it; one more is refused at once."""

PICTURE_SECONDS: Final = 0.2
"""Roughly, of one picture."""

FORMATS = {probes_pb2.IMAGE_FORMAT_PNG: "png", probes_pb2.IMAGE_FORMAT_SVG: "svg"}


class ProbesService(probes_pb2_grpc.ProbesServicer):
    """Shows the probes of the shelf; pictures are drawn in a worker of their own, so that no token waits for one.

    Args:
        readiness: has the shelf.
        artist: draws.
        swapper: changes the shelf.
        shed: told the reason of every call that is refused for there being too many.
    """

    def __init__(
        self, readiness: Readiness, artist: Worker, swapper: Swapper, shed: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._readiness = readiness
        self._artist = artist
        self._swapper = swapper
        self._shed = shed
        self._pictures = 0

    async def ListProbes(  # noqa: N802
        self, request: probes_pb2.ListProbesRequest, context: Context
    ) -> probes_pb2.ListProbesResponse:
        """A page of probes; a token names the last one of its page, so that a reload in between is harmless."""
        shelf = self._readiness.loaded.shelf
        size = page_size(request.page_size, self._readiness.limits.page_size)
        after = last_of_page(request.page_token)
        rest = [entry for entry in shelf.entries if entry.name > after]
        page = rest[:size]
        return probes_pb2.ListProbesResponse(
            probes=await shown(shelf, page),
            next_page_token=f"after:{page[-1].name}" if len(rest) > size else "",
            total_size=len(shelf.entries),
        )

    async def GetProbe(  # noqa: N802
        self, request: probes_pb2.GetProbeRequest, context: Context
    ) -> probes_pb2.GetProbeResponse:
        """One probe."""
        shelf = self._readiness.loaded.shelf
        [probe] = await shown(shelf, [find(shelf, request.name, "name")])
        return probes_pb2.GetProbeResponse(probe=probe)

    async def GetHeatmap(  # noqa: N802
        self, request: probes_pb2.GetHeatmapRequest, context: Context
    ) -> probes_pb2.GetHeatmapResponse:
        """One number of every layer and head, and a picture of it when asked for."""
        probe = sound(find(self._readiness.loaded.shelf, request.probe, "probe"))
        feature, statistic = read_map(request, probe)
        head_map = probe.head_map(feature, statistic)
        response = probes_pb2.GetHeatmapResponse(
            probe_name=probe.name,
            probe_revision=probe.revision,
            feature=feature,
            statistic=request.statistic,
            values=answers.tensor(head_map.values),
            layers=head_map.layers,
            column_label="head index",
            row_label="layer index",
            value_label=STATISTICS[statistic].label,
            image_format=request.image_format,
        )
        if request.image_format:
            response.image = await self._picture(probe, feature, statistic, FORMATS[request.image_format])
        return response

    async def _picture(self, probe: Probe, feature: str, statistic: str, format: str) -> bytes:
        """Waits for the artist, among not too many."""
        if self._pictures >= PICTURES:
            self._shed("TOO_MANY_PICTURES")
            message = f"{self._pictures} pictures are being drawn, which is the most; try again, or ask for the numbers"
            wait = pushback(PICTURES * PICTURE_SECONDS / 2)
            raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_PICTURES", message, retry_after=wait)
        most = self._readiness.limits.heatmap_pixels
        self._pictures += 1
        try:
            return await self._artist.run(lambda: picture(probe, feature, statistic, format, most))
        finally:
            self._pictures -= 1

    async def ActivateProbe(  # noqa: N802
        self, request: probes_pb2.ActivateProbeRequest, context: Context
    ) -> probes_pb2.ActivateProbeResponse:
        """Another active probe; a registry keeps it."""
        if not request.name:
            raise invalid("name", "is empty; give the name of a probe, such as ListProbes shows")
        try:
            done = await self._swapper.activate(request.name, request.revision or None)
        except (DetectorError, OSError) as error:
            raise not_activated(error, request.name) from error
        [active] = await shown(done.shelf, [find(done.shelf, "", "name")])
        return probes_pb2.ActivateProbeResponse(
            active=active,
            previous_name=done.before.name,
            previous_revision=done.before.revision,
        )

    async def ReloadProbes(  # noqa: N802
        self, request: probes_pb2.ReloadProbesRequest, context: Context
    ) -> probes_pb2.ReloadProbesResponse:
        """The probes as their directory has them now."""
        try:
            shelf = await self._swapper.reload()
        except RegistryError as error:
            raise failed(error) from error
        return probes_pb2.ReloadProbesResponse(probes=await shown(shelf, shelf.entries))


async def shown(shelf: Shelf, entries: Sequence[Shelved]) -> list[probes_pb2.Probe]:
    """The messages of entries of the shelf, made in a thread: what a probe says of itself takes milliseconds."""

    def make() -> list[probes_pb2.Probe]:
        return [answers.probe_message(entry, shelf.active, shelf.shadows) for entry in entries]

    return await asyncio.to_thread(make)


def failed(error: DetectorError) -> Refusal:
    """The refusal of a change that a registry or probe does not allow; its errors are written for this."""
    code, reason = code_and_reason(error)
    return Refusal(code, reason, escaped(str(error), LONGEST_REASON))


def not_activated(error: Exception, name: str) -> Exception:
    """What a client is told when a probe could not be activated; what nobody foresaw stays what it is."""
    if isinstance(error, UnknownProbe):
        what, reason = ("probe", "UNKNOWN_PROBE") if error.field == "name" else ("revision", "UNKNOWN_REVISION")
        message = f"{error.field}: no such {what}; known are {', '.join(error.known)}"
        return Refusal(StatusCode.NOT_FOUND, reason, message, field=error.field)
    if isinstance(error, OSError) and error.errno in READ_ONLY:
        message = (
            "this server may not write the registry; activate the probe where one may, with: "
            f"lapwing probes activate {name[:63]}, and then call ReloadProbes"
        )
        return Refusal(StatusCode.FAILED_PRECONDITION, "REGISTRY_READ_ONLY", message)
    return failed(error) if isinstance(error, DetectorError) else error


def picture(probe: Probe, feature: str, statistic: str, format: str, most: int) -> bytes:
    """The drawn map as a file.

    Raises:
        Refusal: it has more pixels than the server draws.
    """
    figure = draw(probe, statistic, [feature])
    width, height = (int(side * figure.dpi) for side in figure.get_size_inches())
    if width * height > most:
        message = f"the picture has {width} x {height} pixels, the server draws {most}; leave it out for the numbers"
        raise invalid("image_format", message, "TOO_LARGE")
    return figure_bytes(figure, format)


def find(shelf: Shelf, name: str, field: str) -> Shelved:
    """The probe of this name, the active one for none.

    Raises:
        Refusal: there is no such probe.
    """
    entry = shelf.find(name)
    if entry is None:
        known = ", ".join(shelf.names[:20])
        raise Refusal(StatusCode.NOT_FOUND, "UNKNOWN_PROBE", f"{field}: no such probe; known are {known}", field=field)
    return entry


def sound(entry: Shelved) -> Probe:
    """The probe itself.

    Raises:
        Refusal: it was rejected when it was loaded.
    """
    if entry.probe is None:
        raise Refusal(
            StatusCode.FAILED_PRECONDITION, "PROBE_REJECTED", f"probe {entry.name} was rejected: {entry.reason}"
        )
    return entry.probe


def read_map(request: probes_pb2.GetHeatmapRequest, probe: Probe) -> tuple[str, str]:
    """Feature and statistic.

    Raises:
        Refusal: the probe does not have them, or there is no such format.
    """
    feature = request.feature or probe.features[0]
    if feature not in probe.mapped_features:
        known = ", ".join(probe.mapped_features)
        raise invalid("feature", f"is not in probe {probe.name}; known are {known}", "UNKNOWN_FEATURE")
    known_statistics = answers.statistics_of(probe, feature)
    names = {number: name.removeprefix("STATISTIC_") for name, number in probes_pb2.Statistic.items()}
    name = names.get(request.statistic, "")
    if name not in known_statistics:
        said = name or f"number {request.statistic}"
        raise invalid(
            "statistic",
            f"{said} of {feature} is not in probe {probe.name}; known are {', '.join(known_statistics)}",
            "UNKNOWN_STATISTIC",
        )
    if request.image_format and request.image_format not in FORMATS:
        raise invalid("image_format", f"number {request.image_format} is not known; known are PNG, SVG")
    return feature, name


def page_size(asked: int, most: int) -> int:
    """How many probes to answer with."""
    if asked < 0:
        raise invalid("page_size", f"is {asked}; give 0 (for {DEFAULT_PAGE}) to {most}")
    return min(asked or DEFAULT_PAGE, most)


def last_of_page(token: str) -> str:
    """Name of the last probe of the page before; empty for the first page."""
    if not token:
        return ""
    found = PAGE_TOKEN.fullmatch(token)
    if found is None:
        raise invalid("page_token", "is not one that ListProbes gave; leave it empty for the first page")
    return found["name"]
