"""From arguments to the messages that carry them; what can't even be sent is refused here, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from lapwing.v1 import detection_pb2, detector_pb2, probes_pb2
from lapwing_client.errors import InvalidRequest

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]
"""Text, chat messages such as {"role": "user", "content": "..."}, or token ids."""

Response = str | Sequence[int]
"""Text or token ids."""

PROMPT_FORMS = "text, a list of messages, or a list of token ids"
RESPONSE_FORMS = "text or a list of token ids"


def prompt_message(prompt: Prompt, field: str = "prompt") -> detection_pb2.Prompt:
    """A prompt in the form in which it is given.

    Raises:
        InvalidRequest: it is none of them.
    """
    if isinstance(prompt, str):
        return detection_pb2.Prompt(text=text(prompt, field))
    items = listed(prompt, field, PROMPT_FORMS)
    if items and all(isinstance(item, Mapping) for item in items):
        turns = [chat_message(item, f"{field}.messages[{i}]") for i, item in enumerate(items)]
        return detection_pb2.Prompt(messages=turns)
    return detection_pb2.Prompt(token_ids=token_ids(items, field, PROMPT_FORMS))


def response_message(response: Response, field: str = "response") -> detection_pb2.Response:
    """A response in the form in which it is given; raises like `prompt_message`."""
    if isinstance(response, str):
        return detection_pb2.Response(text=text(response, field))
    items = listed(response, field, RESPONSE_FORMS)
    return detection_pb2.Response(token_ids=token_ids(items, field, RESPONSE_FORMS))


def chat_message(turn: Mapping[str, Any], field: str) -> detection_pb2.ChatMessage:
    """One turn of a conversation."""
    if set(turn) != {"role", "content"} or not all(isinstance(value, str) for value in turn.values()):
        raise unusable(field, f"has the keys {sorted(map(str, turn))}; give role and content, both text")
    role, content = text(turn["role"], f"{field}.role"), text(turn["content"], f"{field}.content")
    return detection_pb2.ChatMessage(role=role, content=content)


def text(value: Any, field: str) -> str:
    """The text; refuses what is none and what UTF-8 can't hold."""
    if not isinstance(value, str):
        raise unusable(field, f"is {value!r:.40}; give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise unusable(
            field, f"has half of a surrogate pair at character {error.start}; give whole characters"
        ) from None
    return value


def token_ids(items: Sequence[Any], field: str, forms: str) -> list[int]:
    """The ids as whole numbers of 32 bits; numpy's and torch's whole numbers count."""
    ids = []
    for i, item in enumerate(items):
        try:
            number = item.__index__() if is_whole(item) else None
        except TypeError:  # a row of an array, which has more than one number
            number = None
        if number is None:
            raise unusable(f"{field}.token_ids[{i}]", f"is {item!r:.40}; give {forms}")
        if not -(2**31) <= number < 2**31:
            raise unusable(f"{field}.token_ids[{i}]", f"is {number}; no vocabulary is that large")
        ids.append(number)
    return ids


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of any library; a truth value is none."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def listed(value: Any, field: str, forms: str) -> list[Any]:
    """The items of anything that has an order."""
    if isinstance(value, bytes | Mapping | Set) or not hasattr(value, "__iter__"):
        raise unusable(field, f"is a {type(value).__name__}; give {forms}")
    return list(value)


def unusable(field: str, message: str) -> InvalidRequest:
    """An argument that can't even be sent."""
    return InvalidRequest(f"{field}: {message}", reason="INVALID_INPUT", code="INVALID_ARGUMENT", field=field)


def score_request(
    prompt: Prompt, response: Response, *, false_positive_rate: float | None = None, probe: str = ""
) -> detector_pb2.ScoreRequest:
    """One response to be scored."""
    return detector_pb2.ScoreRequest(
        prompt=prompt_message(prompt),
        response=response_message(response),
        false_positive_rate=real(false_positive_rate, "false_positive_rate"),
        probe=text(probe, "probe"),
    )


def score_batch_request(
    items: Sequence[tuple[Prompt, Response]], *, false_positive_rate: float | None = None, probe: str = ""
) -> detector_pb2.ScoreBatchRequest:
    """Several responses to be scored."""
    given = listed(items, "items", "a list of pairs of prompt and response")
    pairs = [pair(item, f"items[{i}]") for i, item in enumerate(given)]
    return detector_pb2.ScoreBatchRequest(
        items=[
            detector_pb2.ScoreItem(
                prompt=prompt_message(prompt, f"items[{i}].prompt"),
                response=response_message(response, f"items[{i}].response"),
            )
            for i, (prompt, response) in enumerate(pairs)
        ],
        false_positive_rate=real(false_positive_rate, "false_positive_rate"),
        probe=text(probe, "probe"),
    )


def pair(item: Any, field: str) -> tuple[Prompt, Response]:
    """Prompt and response of one item."""
    if not isinstance(item, Sequence) or isinstance(item, str | bytes) or len(item) != 2:
        raise unusable(field, f"is a {type(item).__name__}; give a pair of prompt and response")
    return item[0], item[1]


def generate_request(
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_strings: str | Sequence[str] = (),
    stop_when_probability_above: float | None = None,
    minimum_tokens: int | None = None,
    score_every: int | None = None,
    contributions: bool = False,
    false_positive_rate: float | None = None,
    probe: str = "",
) -> detector_pb2.GenerateRequest:
    """A prompt for the server's own model."""
    stops = [stop_strings] if isinstance(stop_strings, str) else listed(stop_strings, "stop_strings", "a list of texts")
    if not isinstance(contributions, bool):
        raise unusable("contributions", f"is {contributions!r:.40}; give True or False")
    return detector_pb2.GenerateRequest(
        prompt=prompt_message(prompt),
        max_new_tokens=fitting(max_new_tokens, 32, "max_new_tokens"),
        temperature=real(temperature, "temperature"),
        top_p=real(top_p, "top_p"),
        seed=fitting(seed, 64, "seed"),
        stop_strings=[text(stop, f"stop_strings[{i}]") for i, stop in enumerate(stops)],
        stop_when_probability_above=real(stop_when_probability_above, "stop_when_probability_above"),
        minimum_tokens=fitting(minimum_tokens, 32, "minimum_tokens"),
        score_every=fitting(score_every, 32, "score_every"),
        contributions=contributions,
        false_positive_rate=real(false_positive_rate, "false_positive_rate"),
        probe=text(probe, "probe"),
    )


def heatmap_request(statistic: str, probe: str, feature: str, image: str | None) -> probes_pb2.GetHeatmapRequest:
    """One number of every layer and head of a probe."""
    return probes_pb2.GetHeatmapRequest(
        probe=text(probe, "probe"),
        feature=text(feature, "feature"),
        statistic=value_of(probes_pb2.Statistic, "STATISTIC", statistic, "statistic"),
        image_format=value_of(probes_pb2.ImageFormat, "IMAGE_FORMAT", image or "UNSPECIFIED", "image"),
    )


def fitting(number: Any, bits: int, field: str) -> int | None:
    """The whole number; refuses what is none and what has more bits."""
    if number is None:
        return None
    if not (is_whole(number) and -(2 ** (bits - 1)) <= number < 2 ** (bits - 1)):
        raise unusable(field, f"is {number!r:.40}; give a whole number of at most {bits} bits")
    return int(number)


def real(number: Any, field: str) -> float | None:
    """The number, of any library; refuses text and truth values. The server knows the ranges."""
    if number is None:
        return None
    if isinstance(number, bool | str | bytes) or not hasattr(number, "__float__"):
        raise unusable(field, f"is {number!r:.40}; give a number")
    try:
        return float(number)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several numbers, or too large a one
        raise unusable(field, f"is {number!r:.40}; give a number") from None


def value_of(enum: Any, prefix: str, name: str, field: str) -> str:
    """The full name of an enum's value.

    Raises:
        InvalidRequest: there is no value of this name.
    """
    known = [key.removeprefix(f"{prefix}_") for key, _ in enum.items()]
    if text(name, field).upper() not in known:
        raise unusable(field, f"is {name!r}; known are {', '.join(known[1:])}")
    return f"{prefix}_{name.upper()}"
