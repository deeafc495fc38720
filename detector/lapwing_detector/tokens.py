"""Builds the token ids that are scored, from text, chat messages or ids. Knows a tokenizer, no model."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lapwing_detector.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""One turn of a chat: `role` and `content`, both text."""

Prompt = str | Sequence[Message] | Sequence[int]
Response = str | Sequence[int]


@dataclass(frozen=True)
class TokenIds:
    """Ids of a prompt and a response, tokenised apart and concatenated."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Prompt, then response."""
        return self.prompt_ids + self.response_ids

    def followed_by(self, response_ids: Sequence[int]) -> TokenIds:
        """The same prompt with more of a response."""
        return TokenIds(self.prompt_ids, (*self.response_ids, *response_ids))


def build_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: Response | None = None,
    *,
    opening: Sequence[int] | None = None,
) -> TokenIds:
    """The ids of prompt and response, with exactly one BOS token in front if the tokenizer adds one.

    Args:
        tokenizer: its chat template is used for messages, and the prompt of the assistant's turn added.
        prompt: text, chat messages, or ids; ids are left as they are. A special token that is spelt out is one.
        response: text or ids; None where it is still to be written. A special token that is spelt out is text.
        opening: what `opening_of` this tokenizer is, for whoever has many texts.

    Raises:
        InvalidInput: names the field, such as `prompt`, `prompt[1].content` or `response_ids[3]`.
    """
    prompt, response = _as_list(prompt), _as_list(response)
    if _is_empty(prompt) and response is None:
        raise InvalidInput("prompt", "is empty; give the model something to answer")
    if _is_empty(prompt) and _is_empty(response):
        raise InvalidInput("prompt", "is empty, and so is the response; give at least one of them")
    return TokenIds(_prompt_ids(tokenizer, prompt, opening), _response_ids(tokenizer, response))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, opening: Sequence[int] | None) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        _require_list("prompt", prompt, "text, chat messages or token ids")
        if not (prompt and isinstance(prompt[0], Mapping)):
            return _checked_ids(tokenizer, "prompt_ids", prompt)
        prompt = _chat_text(tokenizer, prompt)
    return _opened(tokenizer, _encode(tokenizer, prompt, "prompt"), opening)


def _response_ids(tokenizer: PreTrainedTokenizerBase, response: Any) -> tuple[int, ...]:
    if response is None:
        return ()
    if isinstance(response, str):
        # A special token that is spelt out in an answer is text there.
        return tuple(_encode(tokenizer, response, "response", split_special_tokens=True))
    _require_list("response", response, "text or token ids")
    return _checked_ids(tokenizer, "response_ids", response)


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, field: str, *, special: bool = False, **options: Any
) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            field,
            f"holds half of a surrogate pair at position {error.start}, which is no character; give valid Unicode",
        ) from error
    return cast(list[int], tokenizer(text, add_special_tokens=special, verbose=False, **options)["input_ids"])


def _opened(tokenizer: PreTrainedTokenizerBase, ids: list[int], opening: Sequence[int] | None) -> tuple[int, ...]:
    """With what the tokenizer puts in front of a text, once, whether or not the text or its template wrote it, too.

    A second BOS would split the attention sink and move every statistic.
    """
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    front = [*(opening_of(tokenizer) if opening is None else opening)]
    return (*ids,) if ids[: len(front)] == front else (*front, *ids)


def opening_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text.

    What it puts behind one, such as an end-of-sequence token, does not belong to a prompt.
    """
    wrapped, bare = (_encode(tokenizer, "a", "prompt", special=special) for special in (True, False))
    starts = (start for start in range(len(wrapped)) if wrapped[start : start + len(bare)] == bare)
    return tuple(wrapped[: next(starts, 0)])


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any]) -> str:
    for index, message in enumerate(messages):
        _check_message(f"prompt[{index}]", message)
    if tokenizer.chat_template is None:
        raise InvalidInput(
            "prompt",
            "is chat messages, but the tokenizer has no chat template; give text, or set tokenizer.chat_template",
        )
    from jinja2 import TemplateError  # with transformers' own use of it, and only for messages

    turns = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError) as error:
        raise InvalidInput("prompt", f"is refused by the tokenizer's chat template: {error}") from error


def _check_message(field: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise InvalidInput(field, f"is a {type(message).__name__}; a message has `role` and `content`")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = f"is a {type(message[key]).__name__}" if key in message else "is missing"
            raise InvalidInput(f"{field}.{key}", f"{found}; it must be text")
    if not message["role"]:
        raise InvalidInput(f"{field}.role", "is empty; it must be one that the chat template knows, such as user")
    for key in message:
        if key not in ("role", "content"):
            raise InvalidInput(f"{field}.{key}", "is not known; a message has `role` and `content` only")


def _checked_ids(tokenizer: PreTrainedTokenizerBase, field: str, ids: Sequence[Any]) -> tuple[int, ...]:
    size = max(len(tokenizer), 1 + max(getattr(tokenizer, "added_tokens_decoder", {}), default=-1))
    return tuple(_checked_id(f"{field}[{index}]", token, size) for index, token in enumerate(ids))


def _checked_id(field: str, token: Any, size: int) -> int:
    try:
        value = operator.index(token)
    except TypeError:
        value = None
    if value is None or isinstance(token, bool):
        raise InvalidInput(field, f"is {token!r}, a {type(token).__name__}; a token id is a whole number")
    if not 0 <= value < size:
        raise InvalidInput(field, f"is {value}; the tokenizer has {size} tokens, so it must lie in [0, {size})")
    return value


def _require_list(field: str, value: Any, expected: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise InvalidInput(field, f"is a {type(value).__name__}; it must be {expected}")


def _as_list(value: Any) -> Any:
    """Arrays and tensors as lists, everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_empty(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 0
