"""The rpcs of lapwing.v1.Detector: read, call, translate."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import AsyncIterator, Callable
from functools import cache, partial
from importlib import metadata
from typing import TypeVar

from grpc import StatusCode

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_detector.errors import DetectorError
from lapwing_server import answers
from lapwing_server.context import Context, at_end
from lapwing_server.engine import Prompt, Response
from lapwing_server.guard import to_refusal
from lapwing_server.readiness import Readiness
from lapwing_server.readings import fingerprint, read_prompt, read_rate, read_response, read_sampling
from lapwing_server.refusal import Refusal, invalid
from lapwing_server.stream import Stream
from lapwing_server.worker import Worker

log = logging.getLogger("lapwing.server")

Result = TypeVar("Result")


class DetectorService(detector_pb2_grpc.DetectorServicer):
    """Scores with the engine, in its worker."""

    def __init__(self, readiness: Readiness, worker: Worker) -> None:
        self._readiness = readiness
        self._worker = worker
        self._streams = 0

    async def Score(self, request: detector_pb2.ScoreRequest, context: Context) -> detector_pb2.ScoreResponse:  # noqa: N802
        """One response."""
        engine = self._readiness.loaded.engine
        prompt, response = read_prompt(request.prompt), read_response(request.response)
        rate = read_rate(request)
        log.info("Score prompt %s response %s", fingerprint(prompt), fingerprint(response))
        waited, detection = await self._timed(partial(engine.score, prompt, response, false_positive_rate=rate))
        return detector_pb2.ScoreResponse(detection=answers.detection_message(detection, waited))

    async def ScoreBatch(  # noqa: N802
        self, request: detector_pb2.ScoreBatchRequest, context: Context
    ) -> detector_pb2.ScoreBatchResponse:
        """Several responses; one bad item fails alone."""
        engine, most = self._readiness.loaded.engine, self._readiness.limits.batch_items
        if not 1 <= len(request.items) <= most:
            raise invalid("items", f"has {len(request.items)} items; give 1 to {most}", "BATCH_SIZE")
        rate = read_rate(request)
        read = [read_item(item) for item in request.items]
        good = [item for item in read if not isinstance(item, Refusal)]
        log.info("ScoreBatch of %d items, %d of them readable", len(read), len(good))
        waited, scores = await self._timed(partial(engine.score_batch, good, false_positive_rate=rate))
        scores_in_order = iter(scores)
        outcomes = [item if isinstance(item, Refusal) else next(scores_in_order) for item in read]
        results = [result_message(outcome, f"items[{i}]", waited) for i, outcome in enumerate(outcomes)]
        return detector_pb2.ScoreBatchResponse(results=results)

    async def Generate(  # noqa: N802
        self, request: detector_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[detector_pb2.GenerateResponse]:
        """A new response, scored while it is written."""
        engine, limits = self._readiness.loaded.engine, self._readiness.limits
        prompt, sampling = read_prompt(request.prompt), read_sampling(request, limits)
        self._admit(context)
        log.info("Generate prompt %s at most %d tokens", fingerprint(prompt), sampling["max_new_tokens"])
        stream = Stream(self._worker, partial(engine.generate, prompt, **sampling))
        # Runs as soon as the client leaves, also while the server waits for it to read.
        at_end(context, stream.stop)
        ends = time.monotonic() + limits.stream_seconds
        async for event in stream:
            if time.monotonic() > ends:
                message = f"a stream may take {limits.stream_seconds:g} s; ask for fewer tokens"
                raise Refusal(StatusCode.DEADLINE_EXCEEDED, "STREAM_TOO_LONG", message)
            yield answers.event_message(event)

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

    def _admit(self, context: Context) -> None:
        """Counts the stream until it ends.

        Raises:
            Refusal: there are as many as the server takes.
        """
        most = self._readiness.limits.generate_streams
        if self._streams >= most:
            message = f"{self._streams} streams run, the server takes {most} at the same time; try again"
            raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_after=1.0)
        self._streams += 1

        def leave() -> None:
            self._streams -= 1

        at_end(context, leave)

    async def _timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds until the worker began, and what the call returned."""
        asked = time.monotonic()
        return await self._worker.run(lambda: (time.monotonic() - asked, call()))


def read_item(item: detector_pb2.ScoreItem) -> tuple[Prompt, Response] | Refusal:
    """The prompt and response of an item, or why they can't be read."""
    try:
        return read_prompt(item.prompt), read_response(item.response)
    except Refusal as refusal:
        return refusal


def result_message(outcome: Detection | DetectorError | Refusal, path: str, waited: float) -> detector_pb2.ScoreResult:
    """What became of the item at the path."""
    if isinstance(outcome, Detection):
        return detector_pb2.ScoreResult(detection=answers.detection_message(outcome, waited))
    return detector_pb2.ScoreResult(error=to_refusal(outcome, "ScoreBatch").under(path).status())


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
