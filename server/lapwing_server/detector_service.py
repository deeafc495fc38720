"""The rpcs of lapwing.v1.Detector: read, call, translate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from typing import Final

from grpc import StatusCode

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.detection import Detection
from lapwing_server import answers
from lapwing_server.asked import Asked, asked
from lapwing_server.attention_stream import AttentionReader
from lapwing_server.context import Context, note
from lapwing_server.information import Information
from lapwing_server.metrics import Metrics
from lapwing_server.mishap import to_refusal
from lapwing_server.readiness import Readiness
from lapwing_server.readings import read_options, read_prompt
from lapwing_server.refusal import Refusal, invalid
from lapwing_server.scheduler import Scheduler
from lapwing_server.security.principals import principal_of
from lapwing_server.waiting import Item, Outcome

FEW_PARTS: Final = 1000
"""Turns and token ids of a batch that are read on the event loop, which takes a few milliseconds at most."""


class DetectorService(detector_pb2_grpc.DetectorServicer):
    """Tells the scheduler what is asked for, and the client what came of it."""

    def __init__(
        self, readiness: Readiness, scheduler: Scheduler, attention: AttentionReader, metrics: Metrics
    ) -> None:
        self._readiness = readiness
        self._scheduler = scheduler
        self._information = Information(readiness)
        self._attention = attention
        self._metrics = metrics

    async def Score(self, request: detector_pb2.ScoreRequest, context: Context) -> detector_pb2.ScoreResponse:  # noqa: N802
        """One response."""
        item = asked(request, self._readiness).item(request)
        [outcome] = await self._scheduler.score(
            [item], deadline=deadline_of(context), client=principal_of(context).name
        )
        if isinstance(outcome, Exception):
            raise outcome
        note(prompt_tokens=outcome.prompt_tokens, response_tokens=outcome.response_tokens)
        return detector_pb2.ScoreResponse(detection=answers.detection_message(outcome))

    async def ScoreBatch(  # noqa: N802
        self, request: detector_pb2.ScoreBatchRequest, context: Context
    ) -> detector_pb2.ScoreBatchResponse:
        """Several responses; one bad item fails alone."""
        most = self._readiness.limits.batch_items
        if not 1 <= len(request.items) <= most:
            raise invalid("items", f"has {len(request.items)} items; give 1 to {most}", "BATCH_SIZE")
        shared = asked(request, self._readiness)
        read = await read_items(request.items, shared)
        good = [item for item in read if isinstance(item, Item)]
        note(items=len(read), readable=len(good))
        deadline, client = deadline_of(context), principal_of(context).name
        scored = iter(await self._scheduler.score(good, deadline=deadline, client=client) if good else ())
        outcomes = [next(scored) if isinstance(one, Item) else one for one in read]
        results = [self._result(one, i) for i, one in enumerate(outcomes)]
        note(failed=sum(one.HasField("error") for one in results))
        return detector_pb2.ScoreBatchResponse(results=results)

    async def Generate(self, request: detector_pb2.GenerateRequest, context: Context) -> None:  # noqa: N802
        """A new response, scored while it is written.

        Writes by itself and does not yield, so that the time limit and the end also reach it while it waits for a
        client that does not read.
        """
        limits, shared = self._readiness.limits, asked(request, self._readiness)
        prompt, options = read_prompt(request.prompt, shared.room), read_options(request, limits)
        deadline, principal = deadline_of(context), principal_of(context)
        with self._scheduler.places.take("generate", principal):
            stream = self._scheduler.generate(
                prompt,
                shared.probe,
                options,
                deadline=deadline,
                shadows=shared.shadows,
                role=shared.role,
                client=principal.name,
            )
            limit = asyncio.timeout(limits.stream_seconds)
            with closing(stream):
                try:
                    async with limit:
                        async for event in stream:
                            await context.write(answers.event_message(event, stream.seconds))
                except TimeoutError:
                    if not limit.expired():
                        raise  # the model's own, of a disk that does not answer for one
                    message = f"a stream may take {limits.stream_seconds:g} s; ask for fewer tokens"
                    raise Refusal(StatusCode.DEADLINE_EXCEEDED, "STREAM_TOO_LONG", message) from None

    async def ScoreAttention(  # noqa: N802
        self, request_iterator: AsyncIterator[detector_pb2.ScoreAttentionRequest], context: Context
    ) -> None:
        """A response of a model that runs elsewhere, by its attention; writes by itself, as `Generate` does."""
        principal = principal_of(context)
        with self._scheduler.places.take("attention", principal):
            await self._attention.answer(request_iterator, context, principal.name)

    async def GetServerInfo(  # noqa: N802
        self, request: detector_pb2.GetServerInfoRequest, context: Context
    ) -> detector_pb2.GetServerInfoResponse:
        """What runs here, or why it does not."""
        return self._information.message()

    def _result(self, outcome: Outcome, place: int) -> detector_pb2.ScoreResult:
        """What became of the item at the place."""
        if isinstance(outcome, Detection):
            return detector_pb2.ScoreResult(detection=answers.detection_message(outcome))
        refusal = to_refusal(outcome, "ScoreBatch").under(f"items[{place}]")
        self._metrics.item_failed(refusal.reason)
        return detector_pb2.ScoreResult(error=refusal.status())


async def read_items(items: Sequence[detector_pb2.ScoreItem], shared: Asked) -> list[Item | Refusal]:
    """What each item asks for, or why it can't be read; of many parts in a thread, since that takes long."""

    def read() -> list[Item | Refusal]:
        return [shared.item_or_refusal(item) for item in items]

    parts = sum(
        len(part) for item in items for part in (item.prompt.messages, item.prompt.token_ids, item.response.token_ids)
    )
    return read() if parts <= FEW_PARTS else await asyncio.to_thread(read)


def deadline_of(context: Context) -> float | None:
    """When the client stops waiting, as `time.monotonic` counts; None when it does not say."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
