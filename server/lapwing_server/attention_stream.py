"""A ScoreAttention stream from its header to its score: takes message by message, and answers when asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Final

from grpc import StatusCode

from lapwing.v1 import detector_pb2
from lapwing_detector.detection import Detection
from lapwing_detector.errors import DetectorError
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import Stopwatch, detect
from lapwing_detector.tokens import TokenIds
from lapwing_server.answers import detection_message
from lapwing_server.asked import Asked, asked
from lapwing_server.attention_assembly import Assembly
from lapwing_server.attention_bytes import AttentionBytes
from lapwing_server.attention_header import Header, read_header
from lapwing_server.context import Context, note
from lapwing_server.engine import Engine
from lapwing_server.metrics import Metrics
from lapwing_server.mishap import report
from lapwing_server.parsing import NEWS
from lapwing_server.readiness import Readiness
from lapwing_server.refusal import Refusal, invalid
from lapwing_server.worker import Worker

Request = detector_pb2.ScoreAttentionRequest

ENDED_EARLY: Final = ("EMPTY_STREAM", "INCOMPLETE")
"""Reasons for which a stream may be refused whose client left: gRPC shows that first as the end of its messages."""


class Sender:
    """What one stream has said so far. All of it computes, and belongs into the reader's thread.

    Args:
        header: of the stream.
        shared: the probes that score it.
        most_bytes: that its sums may take.
        hold: see `Assembly`.

    Raises:
        Refusal: what the header declares would take more.
    """

    def __init__(self, header: Header, shared: Asked, most_bytes: int, hold: Callable[[int], None]) -> None:
        self.role = shared.role
        self.shadows = len(shared.shadows)
        self._header = header
        self._shared = shared
        self._clock = Stopwatch()
        self._shadows = [shadow for shadow in shared.shadows if not shadow.reads_log_probabilities]
        self._assembly = Assembly(header, shared.probe, self._shadows, most_bytes=most_bytes, hold=hold)

    def add(self, message: Request) -> None:
        """Takes a slice.

        Raises:
            Refusal: it is not the next one, or can't be of an attention map.
        """
        with self._clock.stage("read"):
            if message.HasField("summary"):
                self._assembly.add_summary(message.summary)
            else:
                self._assembly.add_rows(message.rows)

    def running(self) -> Detection:
        """The score of what came so far, calibrated for a response that is still being written.

        Raises:
            Refusal: some heads of the probe have come further than others.
        """
        probe = self._shared.probe
        detection = self._detect(probe, self._assembly.tokens("score_now"))
        assert detection is not None, "all heads of the probe have come as far"
        if detection.logit is None:
            return detection
        return replace(detection, probability=probe.running_probability(detection.logit, detection.response_tokens))

    def final(self) -> tuple[Detection, list[Detection]]:
        """The score of the whole, and those of the shadows that got all that they read.

        Raises:
            Refusal: it is not whole.
        """
        tokens = self._assembly.require_whole()
        detection = self._detect(self._shared.probe, tokens)
        assert detection is not None, "all heads of the probe are whole"
        shadows = (self._attempt(shadow, tokens) for shadow in self._shadows)
        return detection, [shadow for shadow in shadows if shadow is not None]

    def _attempt(self, shadow: Probe, tokens: int) -> Detection | None:
        """What a shadow says; its failure is nobody else's."""
        try:
            return self._detect(shadow, tokens)
        except DetectorError as error:
            report(error, "a shadow")
            return None

    def _detect(self, probe: Probe, tokens: int) -> Detection | None:
        """What a probe says; None for a shadow whose heads did not come, or not as those of an attention map."""
        summary = self._assembly.summary(probe, tokens)
        if summary is None:
            return None
        prompt = min(tokens, self._header.prompt_tokens)
        counts = TokenIds((0,) * prompt, (0,) * (tokens - prompt))  # the ids themselves are not sent
        detection = detect(probe, summary, counts, self._shared.false_positive_rate, dict(self._clock.seconds))
        return replace(detection, token_ids=())


class AttentionReader:
    """Answers ScoreAttention. Numbers are read in a thread of their own: neither the event loop nor the model waits."""

    def __init__(self, readiness: Readiness, worker: Worker, metrics: Metrics) -> None:
        self._readiness = readiness
        self._worker = worker
        self._metrics = metrics
        self._bytes = AttentionBytes(readiness.limits, metrics)

    async def answer(self, requests: AsyncIterator[Request], context: Context, client: str) -> None:
        """Reads a stream of a client to its end and writes the answers.

        The next message is read when the one before is dealt with, so that a sender gets ahead by no more than gRPC's
        flow control lets it.

        Raises:
            Refusal: of the stream, or of a message in it.
        """
        seconds = self._readiness.limits.stream_seconds
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                with self._bytes.share(client) as hold:
                    return await self._read(requests, context, hold)
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"a stream may take {seconds:g} s; send the attention when all of it is there"
            refusal = Refusal(StatusCode.DEADLINE_EXCEEDED, "STREAM_TOO_LONG", message)
        except Refusal as error:
            refusal = error
        # gRPC keeps the last error until the next call, and an error its traceback, which would keep all that came.
        refusal.__context__ = None
        refusal = refusal.with_traceback(None)
        if refusal.reason in ENDED_EARLY:
            await asyncio.sleep(NEWS)  # ends here if the client left
        raise refusal

    async def _read(self, requests: AsyncIterator[Request], context: Context, hold: Callable[[int], None]) -> None:
        engine = self._readiness.loaded.engine
        sender: Sender | None = None
        async for request in requests:
            part = request.WhichOneof("part")
            if part is None:
                raise invalid("part", "is not set; give header, summary, rows or score_now")
            if sender is None:
                sender = await self._begin(request, part, engine, hold)
            elif part == "header":
                raise invalid("header", "came before; it is the first message and only it", "OUT_OF_ORDER")
            elif part == "score_now":
                await write(await self._worker.run(sender.running), context, running=True)
            else:
                await self._worker.run(partial(sender.add, request))
        if sender is None:
            raise invalid("header", "never came; the stream ended before its first message", "EMPTY_STREAM")
        detection, shadows = await self._worker.run(sender.final)
        note(response_tokens=detection.response_tokens)
        await write(detection, context, running=False)
        # Not before: grpc.aio tells a stream that was cancelled from one that is whole only a moment later.
        self._count(sender, detection, shadows)

    async def _begin(self, request: Request, part: str, engine: Engine, hold: Callable[[int], None]) -> Sender:
        if part != "header":
            raise invalid("header", f"must come before {part}", "OUT_OF_ORDER")
        try:
            shared = asked(request.header, self._readiness)
            read = partial(read_header, request.header, shared.probe, engine.identity, engine.max_tokens)
            header = await self._worker.run(read)
        except Refusal as refusal:
            raise refusal.under("header") from None
        note(prompt_tokens=header.prompt_tokens)
        return Sender(header, shared, self._readiness.limits.attention_bytes, hold)

    def _count(self, sender: Sender, detection: Detection, shadows: list[Detection]) -> None:
        for stage in ("read", "probe"):
            self._metrics.stage(stage, detection.seconds[stage])
        self._metrics.scored(detection, sender.role)
        for shadow in shadows:
            self._metrics.scored(shadow, "shadow")
        self._metrics.unseen("not_sent", sender.shadows - len(shadows))


async def write(detection: Detection, context: Context, *, running: bool) -> None:
    """Sends one answer."""
    await context.write(detector_pb2.ScoreAttentionResponse(detection=detection_message(detection), running=running))
