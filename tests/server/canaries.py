"""Sends a canary in every field of every rpc, and collects all that comes back beside answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from engine_fakes import FakeEngine, FakeStreams
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from service_fakes import WAIT

from lapwing.v1 import detector_pb2, probes_pb2
from lapwing_detector.errors import CaptureError, InvalidInput

CANARY = "canary-7f3a9c"
WRITTEN = "ABCDEFGH"
"""What the fake engine generates."""

FORMS = (CANARY, CANARY.encode().hex(), str(list(CANARY.encode()))[1:-1], WRITTEN, str(list(WRITTEN.encode()))[1:-1])
"""How the two may show: as text, as bytes, as token ids."""

METHODS = [
    method
    for file in (detector_pb2.DESCRIPTOR, probes_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]

METADATA = (
    ("x-canary", CANARY),
    ("x-canary-bin", CANARY.encode()),
    ("x-request-id", f"{CANARY} is no name"),
    ("authorization", f"Bearer {CANARY}"),
)

NUMBERS = {"max_new_tokens": 12, "temperature": 0.5, "top_p": 0.9, "false_positive_rate": 0.05, "minimum_tokens": 1}
NUMBERS |= {"score_every": 1, "seed": 1, "stop_when_probability_above": 0.99}


def hits(text: str) -> list[str]:
    """The forms of the canary that the text holds."""
    return [form for form in FORMS if form in text]


class Quoting(FakeEngine):
    """Fails as `fails` says, and quotes what it was given."""

    fails = ""

    def tokens(self, prompt: Any, response: Any = None) -> Any:
        if self.fails == "tokens":
            raise RuntimeError(f"can't tokenise {prompt!r} and {response!r}")
        if self.fails == "template":
            raise InvalidInput("prompt", f"is refused: {prompt!r}") from ValueError(repr(prompt))
        return super().tokens(prompt, response)

    def score_ids(self, jobs: Any) -> Any:
        said = [bytes(job.ids.all) for job in jobs]
        if self.fails == "forward":
            raise ValueError(f"can't read {said}")
        if self.fails == "capture":
            raise CaptureError(f"no attention of {said}, {jobs}")
        return super().score_ids(jobs)

    def streams(self) -> FakeStreams:
        return QuotingStreams(self) if self.fails else super().streams()


class QuotingStreams(FakeStreams):
    """Fails at the tenth token."""

    def step(self) -> Any:
        for stream in self._streams:
            if len(stream.written) == 9:
                raise RuntimeError(f"wrote {bytes(stream.written)} after {stream.prompt} in {stream.options}")
        return super().step()


def requests_of(method: Any) -> Iterator[Message]:
    """Requests with the canary wherever there is text, first one that is taken, then others that are not."""
    kind = GetMessageClass(method.input_type)
    for request in GOOD.get(method.name, []):
        yield request
        broken = type(request)()
        broken.CopyFrom(request)
        broken.probe = CANARY
        yield broken
    yield filled(kind())
    for field in method.input_type.fields:
        alone = kind()
        fill(alone, field)
        yield alone


def filled(message: Any) -> Any:
    """The message with the canary in every field that can hold it."""
    for field in message.DESCRIPTOR.fields:
        fill(message, field)
    return message


def fill(message: Any, field: FieldDescriptor) -> None:
    """One field of it."""
    value: Any = {FieldDescriptor.CPPTYPE_STRING: CANARY}.get(field.cpp_type, NUMBERS.get(field.name, 3))
    if field.type == FieldDescriptor.TYPE_BYTES:
        value = CANARY.encode()
    if field.name.endswith("token_ids"):
        message.MergeFrom(type(message)(**{field.name: CANARY.encode()}))
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        return
    elif field.message_type is not None:
        inside = getattr(message, field.name)
        filled(inside.add() if field.is_repeated else inside).SetInParent()
    elif field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


TEXT = {"text": CANARY}
IDS = {"token_ids": CANARY.encode()}
CHAT = {"messages": [{"role": CANARY, "content": CANARY}]}
GOOD: dict[str, list[Any]] = {
    "Score": [detector_pb2.ScoreRequest(prompt=prompt, response=TEXT) for prompt in (TEXT, IDS, CHAT)],
    "ScoreBatch": [
        detector_pb2.ScoreBatchRequest(
            items=[{"prompt": TEXT, "response": IDS}, {"prompt": {"text": CANARY * 100}, "response": TEXT}, {}]
        )
    ],
    "Generate": [
        detector_pb2.GenerateRequest(prompt=prompt, max_new_tokens=12, stop_strings=[CANARY], contributions=True)
        for prompt in (TEXT, IDS, CHAT)
    ],
}


def every_way(target: str) -> str:
    """Sends the canary in every way; returns all that errors and metadata say, but no answer."""
    said: list[str] = []
    with grpc.insecure_channel(target, options=[("grpc.primary_user_agent", CANARY)]) as channel:
        for method in METHODS:
            path = f"/{method.containing_service.full_name}/{method.name}"
            payloads = [request.SerializeToString() for request in requests_of(method)]
            for payload in [*payloads, CANARY.encode(), b"\xff" + CANARY.encode()]:
                said += send(channel, path, payload, method.client_streaming, method.server_streaming)
        for path in (f"/{CANARY}", f"/lapwing.v1.Detector/{CANARY}", f"/{CANARY}.v1.Detector/Score"):
            said += send(channel, path, CANARY.encode(), False, False)
        said += send(channel, "/grpc.health.v1.Health/Check", b"\x0a\x0d" + CANARY.encode(), False, False)
    return "\n".join(said)


def send(channel: grpc.Channel, path: str, data: bytes, requests: bool, responses: bool) -> list[str]:
    """What the answer to these bytes says beside the answer itself."""
    kind = f"{'stream' if requests else 'unary'}_{'stream' if responses else 'unary'}"
    call = getattr(channel, kind)(path)
    body = iter([data]) if requests else data
    inside: list[str] = []
    try:
        if responses:
            running = call(body, timeout=WAIT, metadata=METADATA)
            list(running)
        else:
            answer, running = call.with_call(body, timeout=WAIT, metadata=METADATA)
            inside = errors_in(answer) if path.endswith("/ScoreBatch") else []
    except grpc.RpcError as error:
        running = error
    metadata = [*(running.initial_metadata() or ()), *(running.trailing_metadata() or ())]
    asked = path.replace(CANARY, "nobody")
    return [f"{asked} {running.code()} {running.details()}", *inside, *(f"{key}: {value!r}" for key, value in metadata)]


def errors_in(answer: bytes) -> list[str]:
    """What a batch says of the items that failed alone."""
    results = detector_pb2.ScoreBatchResponse.FromString(answer).results
    errors = [result.error for result in results if result.HasField("error")]
    return [f"{error.message} {[detail.value for detail in error.details]!r}" for error in errors]
