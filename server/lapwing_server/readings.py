"""What a request says, checked field by field; every refusal names its field."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from lapwing.v1 import detection_pb2, detector_pb2
from lapwing_detector.detection import DEFAULT_FALSE_POSITIVE_RATE
from lapwing_detector.options import GenerationOptions
from lapwing_server.engine import Prompt, Response
from lapwing_server.limits import Limits, Room
from lapwing_server.refusal import invalid

HOTTEST = 100.0
"""Largest temperature; far above it every token is as likely as any other."""


def read_prompt(prompt: detection_pb2.Prompt, room: Room, path: str = "prompt") -> Prompt:
    """The prompt in the one form in which it was given.

    Raises:
        Refusal: none or several forms are set, or the one is empty or has no room.
    """
    given = [name for name in ("messages", "token_ids") if getattr(prompt, name)]
    given += ["text"] if prompt.HasField("text") else []
    one_of(path, given, "text, messages, token_ids")
    if given == ["messages"]:
        return read_messages(prompt, room, path)
    if given == ["token_ids"]:
        return read_ids(prompt.token_ids, room, path)
    return read_text(prompt.text, room, path)


def read_response(response: detection_pb2.Response, room: Room, path: str = "response") -> Response:
    """The response in the one form in which it was given; raises like `read_prompt`."""
    given = ["token_ids"] if response.token_ids else []
    given += ["text"] if response.HasField("text") else []
    one_of(path, given, "text, token_ids")
    if response.token_ids:
        return read_ids(response.token_ids, room, path)
    return read_text(response.text, room, path)


def read_ids(ids: Sequence[int], room: Room, path: str) -> list[int]:
    """The token ids; refuses more than the model takes."""
    fits(len(ids), room.tokens, "token ids", f"{path}.token_ids")
    return list(ids)


def read_text(text: str, room: Room, path: str) -> str:
    """The text; refuses an empty one and one that no tokenizer makes short enough."""
    fits(len(text), room.characters, "characters", f"{path}.text")
    return not_empty(text, f"{path}.text")


def read_messages(prompt: detection_pb2.Prompt, room: Room, path: str) -> list[dict[str, str]]:
    """The turns of a conversation, as chat templates take them."""
    fits(len(prompt.messages), room.messages, "messages", f"{path}.messages")
    said = sum(len(one.role) + len(one.content) for one in prompt.messages)
    fits(said, room.characters, "characters", f"{path}.messages")
    for i, message in enumerate(prompt.messages):
        not_empty(message.role, f"{path}.messages[{i}].role")
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def read_options(request: detector_pb2.GenerateRequest, limits: Limits) -> GenerationOptions:
    """How to generate.

    Raises:
        Refusal: a number is out of its range or not a number, or there are too many or too long stop strings.
    """
    new_tokens = request.max_new_tokens if request.HasField("max_new_tokens") else min(64, limits.new_tokens)
    if not 1 <= new_tokens <= limits.new_tokens:
        raise invalid("max_new_tokens", f"is {new_tokens}; give 1 to {limits.new_tokens}")
    if not 0.0 <= request.temperature <= HOTTEST:  # also refuses NaN
        raise invalid("temperature", f"is {request.temperature}; give 0 (the likeliest token) to {HOTTEST:g}")
    if request.seed < 0:
        raise invalid("seed", f"is {request.seed}; give 0 or more")
    return GenerationOptions(
        max_new_tokens=new_tokens,
        temperature=request.temperature,
        top_p=read_share(request, "top_p"),
        seed=request.seed if request.HasField("seed") else None,
        false_positive_rate=read_rate(request),
        stop_strings=read_stop_strings(request.stop_strings, limits),
        stop_when_probability_above=read_stop(request),
        minimum_tokens=read_count(request, "minimum_tokens"),
        score_every=read_count(request, "score_every"),
        contributions=request.contributions,
    )


def read_share(request: detector_pb2.GenerateRequest, field: str) -> float:
    """A share of probability, 1 when it is not set; refuses what is not in (0, 1]."""
    share: float = getattr(request, field) if request.HasField(field) else 1.0
    if not 0.0 < share <= 1.0:
        raise invalid(field, f"is {share}; give more than 0 and at most 1")
    return share


def read_stop(request: detector_pb2.GenerateRequest) -> float | None:
    """The probability above which the response ends; None when it is not set. Refuses what is not in [0, 1)."""
    field = "stop_when_probability_above"
    if not request.HasField(field):
        return None
    if not 0.0 <= request.stop_when_probability_above < 1.0:
        raise invalid(field, f"is {request.stop_when_probability_above}; give 0 or more and less than 1")
    return request.stop_when_probability_above


def read_count(request: detector_pb2.GenerateRequest, field: str) -> int:
    """A number of tokens, 1 when it is not set; refuses less."""
    count: int = getattr(request, field) if request.HasField(field) else 1
    if count < 1:
        raise invalid(field, f"is {count}; give 1 or more")
    return count


def read_stop_strings(strings: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """What ends a response; refuses too many, an empty one and one that is too long."""
    if len(strings) > limits.stop_strings:
        raise invalid("stop_strings", f"has {len(strings)} strings, the server takes {limits.stop_strings}")
    for i, one in enumerate(strings):
        if not 1 <= len(one) <= limits.stop_string_characters:
            most = limits.stop_string_characters
            raise invalid(f"stop_strings[{i}]", f"has {len(one)} characters; give 1 to {most}")
    return tuple(strings)


def read_rate(
    request: detector_pb2.ScoreRequest
    | detector_pb2.ScoreBatchRequest
    | detector_pb2.GenerateRequest
    | detector_pb2.AttentionHeader,
) -> float:
    """The operating point asked for.

    Raises:
        Refusal: it is not between 0 and 1.
    """
    if not request.HasField("false_positive_rate"):
        return DEFAULT_FALSE_POSITIVE_RATE
    rate = request.false_positive_rate
    if not (math.isfinite(rate) and 0.0 < rate < 1.0):
        raise invalid("false_positive_rate", f"is {rate}; give a share between 0 and 1, such as 0.05")
    return rate


def one_of(path: str, given: list[str], known: str) -> None:
    """Refuses what is set not at all or twice."""
    if not given:
        raise invalid(path, f"is empty; give one of {known}")
    if len(given) > 1:
        raise invalid(path, f"has {' and '.join(given)}; give exactly one of {known}")


def fits(size: int, most: int, unit: str, path: str) -> None:
    """Refuses what can't fit into the model, by its size alone."""
    if size > most:
        raise invalid(path, f"has {size} {unit}, the server takes {most} for this model; shorten it", "TOO_LONG")


def not_empty(text: str, path: str) -> str:
    """The text; refuses an empty one."""
    if not text:
        raise invalid(path, "is empty; there is nothing to score")
    return text


def fingerprint(content: Prompt | Response) -> str:
    """All that a log says of a prompt or response: how long it is, and a short hash to find it again."""
    data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    return f"{len(content)}:{hashlib.sha256(data).hexdigest()[:8]}"
