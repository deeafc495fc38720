"""The rpcs of lapwing.v1.Detector: read, call, translate."""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from grpc import StatusCode

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_detector.errors import DetectorError
from lapwing_server import answers
from lapwing_server.context import Context
from lapwing_server.engine import Prompt, Response
from lapwing_server.guard import to_refusal
from lapwing_server.limits import Room
from lapwing_server.readiness import Readiness
from lapwing_server.readings import fingerprint, read_prompt, read_rate, read_response, read_sampling
from lapwing_server.refusal import Refusal, invalid
from lapwing_server.stream import Stream
from lapwing_server.worker import Worker

if TYPE_CHECKING:
    from lapwing_detector import GeneratedToken, Generation

log = logging.getLogger("lapwing.server")

Result = TypeVar("Result")
Item = tuple[Prompt, Response]

PORTION_BYTES = 16_384
"""Bytes of one forward of a batch, padding counted: about 4,096 tokens, which are counted only after it began."""


class DetectorService(detector_pb2_grpc.DetectorServicer):
    """Scores with the engine, in its worker."""

    def __init__(self, readiness: Readiness, worker: Worker) -> None:
        self._readiness = readiness
        self._worker = worker
        self._streams = 0

    async def Score(self, request: detector_pb2.ScoreRequest, context: Context) -> detector_pb2.ScoreResponse:  # noqa: N802
        """One response."""
        engine, room, rate = self._readiness.loaded.engine, self._room, read_rate(request)
        prompt, response = read_prompt(request.prompt, room), read_response(request.response, room)

        def score(waited: float) -> detector_pb2.ScoreResponse:
            log.info("Score prompt %s response %s", fingerprint(prompt), fingerprint(response))
            detection = engine.score(prompt, response, false_positive_rate=rate)
            return detector_pb2.ScoreResponse(detection=answers.detection_message(detection, waited))

        return await self._timed(score)

    async def ScoreBatch(  # noqa: N802
        self, request: detector_pb2.ScoreBatchRequest, context: Context
    ) -> detector_pb2.ScoreBatchResponse:
        """Several responses, a portion at a time; one bad item fails alone."""
        engine, room, most = self._readiness.loaded.engine, self._room, self._readiness.limits.batch_items
        if not 1 <= len(request.items) <= most:
            raise invalid("items", f"has {len(request.items)} items; give 1 to {most}", "BATCH_SIZE")
        rate = read_rate(request)
        read = [read_item(item, room) for item in request.items]
        good = {i: item for i, item in enumerate(read) if not isinstance(item, Refusal)}
        log.info("ScoreBatch of %d items, %d of them readable", len(read), len(good))
        results = {i: result_message(item, i) for i, item in enumerate(read) if isinstance(item, Refusal)}
        # Between two portions other work gets its turn, and a call that was cancelled ends.
        for portion in portions({i: request.items[i].ByteSize() for i in good}):

            def score(waited: float, portion: Sequence[int] = portion) -> dict[int, detector_pb2.ScoreResult]:
                outcomes = engine.score_batch([good[i] for i in portion], false_positive_rate=rate)
                return {i: result_message(one, i, waited) for i, one in zip(portion, outcomes, strict=True)}

            results |= await self._timed(score)
        return detector_pb2.ScoreBatchResponse(results=[results[i] for i in range(len(read))])

    async def Generate(self, request: detector_pb2.GenerateRequest, context: Context) -> None:  # noqa: N802
        """A new response, scored while it is written.

        Writes by itself and does not yield, so that the time limit and the end also reach it while it waits for a
        client that does not read.
        """
        engine, limits = self._readiness.loaded.engine, self._readiness.limits
        prompt, sampling = read_prompt(request.prompt, self._room), read_sampling(request, limits)

        def start() -> Iterator[GeneratedToken | Generation]:
            log.info("Generate prompt %s at most %d tokens", fingerprint(prompt), sampling["max_new_tokens"])
            return engine.generate(prompt, **sampling)

        with self._place(), closing(Stream(self._worker, start)) as stream:
            try:
                async with asyncio.timeout(limits.stream_seconds):
                    async for event in stream:
                        await context.write(answers.event_message(event))
            except TimeoutError:
                message = f"a stream may take {limits.stream_seconds:g} s; ask for fewer tokens"
                raise Refusal(StatusCode.DEADLINE_EXCEEDED, "STREAM_TOO_LONG", message) from None

    async def ScoreAttention(  # noqa: N802
        self, request_iterator: AsyncIterator[detector_pb2.ScoreAttentionRequest], context: Context
    ) -> detector_pb2.ScoreAttentionResponse:
        """Not there yet."""
        raise unimplemented("ScoreAttention", "send the token ids to Score of a server that runs the same model")

    async def GetServerInfo(  # noqa: N802
        self, request: detector_pb2.GetServerInfoRequest, context: Context
    ) -> detector_pb2.GetServerInfoResponse:
        """What runs here, or why it does not."""
        readiness = self._readiness
        info = detector_pb2.GetServerInfoResponse(
            version=version_of("lapwing"),
            state=f"SERVER_STATE_{readiness.phase.value}",
            message=readiness.message,
            limits=answers.limits_message(readiness.limits),
            library_versions={"python": platform.python_version()}
            | {name: version_of(name) for name in ("grpcio", "torch", "transformers")},
        )
        if (loaded := readiness.loaded_or_none) is not None:
            identity = answers.identity_message(loaded.engine.identity)
            info.model.CopyFrom(detector_pb2.ModelInfo(identity=identity, max_tokens=loaded.engine.max_tokens))
            info.probe_name, info.probe_revision = loaded.engine.probe.name, loaded.engine.probe.revision
        return info

    @property
    def _room(self) -> Room:
        return self._readiness.limits.room(self._readiness.loaded.engine.max_tokens)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Counts a stream while it runs.

        Raises:
            Refusal: there are as many as the server takes.
        """
        most = self._readiness.limits.generate_streams
        if self._streams >= most:
            message = f"{self._streams} streams run, the server takes {most} at the same time; try again"
            raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_after=1.0)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def _timed(self, call: Callable[[float], Result]) -> Result:
        """What the call returns in the worker; it is told how many seconds it waited for it."""
        asked = time.monotonic()
        return await self._worker.run(lambda: call(time.monotonic() - asked))


def portions(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Neighbouring places whose padded forward stays within the budget; one alone may be over it."""
    portion: list[int] = []
    for place in sizes:
        longest = max(sizes[one] for one in (*portion, place))
        if portion and (len(portion) + 1) * longest > PORTION_BYTES:
            yield portion
            portion = []
        portion.append(place)
    if portion:
        yield portion


def read_item(item: detector_pb2.ScoreItem, room: Room) -> Item | Refusal:
    """The prompt and response of an item, or why they can't be read."""
    try:
        return read_prompt(item.prompt, room), read_response(item.response, room)
    except Refusal as refusal:
        return refusal


def result_message(
    outcome: Detection | DetectorError | Refusal, place: int, waited: float = 0.0
) -> detector_pb2.ScoreResult:
    """What became of the item at the place."""
    if isinstance(outcome, Detection):
        return detector_pb2.ScoreResult(detection=answers.detection_message(outcome, waited))
    return detector_pb2.ScoreResult(error=to_refusal(outcome, "ScoreBatch").under(f"items[{place}]").status())


def unimplemented(method: str, mend: str) -> Refusal:
    """The refusal of an rpc that is in the interface and not yet in the server."""
    return Refusal(StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED", f"{method} is not implemented in this version; {mend}")


@cache
def version_of(distribution: str) -> str:
    """Its version, without importing it; empty when it is not installed. Finding it takes milliseconds."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
