"""Asks an OpenAI-compatible endpoint for chat completions through the package `openai`. Knows no items and no verdicts.

The package retries what passes by itself (connections, time-outs, 408, 409, 429, 5xx) with a growing pause, or with the
one that `Retry-After` asks for.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lapwing_training.errors import InvalidOption, TrainingError
from lapwing_training.labels.judge import SCHEMA, Answer

if TYPE_CHECKING:
    from openai import APIConnectionError, APIStatusError, OpenAI

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"

OPENAI_URL = "https://api.openai.com/v1"
"""What the package asks when no address is named."""

PARAMETERS: dict[str, Any] = {
    "temperature": 0,
    "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}},
}
"""What is asked for beside the prompt."""

FORMS: tuple[dict[str, Any], ...] = (
    PARAMETERS,
    {"temperature": 0},
    {"response_format": PARAMETERS["response_format"]},
    {},
)
"""Tried in this order until the endpoint takes one: not all know JSON schemas, not all models a temperature."""

REJECTIONS = (400, 413, 422)
"""Statuses that speak of one request and not of the endpoint."""


class JudgeFailed(TrainingError):
    """The judge can't be asked: no package, no connection, no permission, or no answer after all retries."""


class Rejected(Exception):
    """One request that the endpoint does not take in any form: too long, as a rule."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"the endpoint rejected the request ({' '.join(filter(None, (str(status), code)))})")
        self.code = code


@dataclass(frozen=True)
class EndpointOptions:
    """Which model judges, where, and how patiently it is waited for."""

    model: str
    base_url: str = ""
    """Such as http://localhost:8000/v1; without one, the environment's OPENAI_BASE_URL or OpenAI's own."""

    timeout: float = 60.0
    """Seconds to wait for an answer."""

    retries: int = 8

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidOption("the judge has no name; expected a model that the endpoint knows, such as gpt-4.1-mini")
        if self.base_url and urlsplit(self.base_url).scheme not in ("http", "https"):
            raise InvalidOption(f"base-url is `{self.base_url}`; expected one such as http://localhost:8000/v1")
        if not 0.0 < self.timeout < float("inf") or self.retries < 0:
            raise InvalidOption(
                f"timeout is {self.timeout} and retries {self.retries}; expected seconds above 0 and a number from 0"
            )


class Endpoint:
    """One model behind one address; may be asked from several threads once it has answered for the first time."""

    def __init__(self, options: EndpointOptions) -> None:
        self.options = options
        self._forms = FORMS

    @property
    def address(self) -> str:
        """Where it is asked, known before it is; without credentials and query."""
        return _public(self._base_url or OPENAI_URL).rstrip("/")

    def ask(self, prompt: str) -> Answer:
        """One reply to one prompt. A content filter's refusal is an answer.

        Raises:
            InvalidOption: there is no key where one is needed.
            JudgeFailed: no answer after all retries, or none to be hoped for.
            Rejected: the endpoint takes no such request.
        """
        for form in self._forms:
            try:
                answer = self._complete(prompt, form)
            except Rejected as error:
                if error.code == "content_filter":
                    return Answer("", refusal="content filter")
                rejected = error
                continue
            self._forms = (form,)
            return answer
        raise rejected

    def _complete(self, prompt: str, form: dict[str, Any]) -> Answer:
        text = ""
        for attempt in range(self.options.retries + 1):
            text = self._send(prompt, form)
            try:
                return read_completion(text)
            except ValueError:  # the page of a proxy, as a rule, which passes by itself too
                time.sleep(0.0 if attempt == self.options.retries else min(0.5 * 2**attempt, 8.0))
        raise JudgeFailed(f"{self._place} answers with no chat completion, but `{self._told(text)}`; check --base-url")

    def _send(self, prompt: str, form: dict[str, Any]) -> str:
        """The body of a response that the endpoint calls well."""
        client = self._client
        from openai import APIConnectionError, APIStatusError

        try:
            response = client.chat.completions.with_raw_response.create(
                model=self.options.model, messages=[{"role": "user", "content": prompt}], **form
            )
        except APIStatusError as error:
            if error.status_code in REJECTIONS:
                raise Rejected(error.status_code, str(error.code or "")) from None
            raise self._failed(error) from None
        except APIConnectionError as error:
            raise self._unreached(error) from None
        return str(response.http_response.text)

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            if error.name != "openai":
                raise
            raise JudgeFailed(
                "a judge needs the package openai, which is not here; pip install 'lapwing[judge]'"
            ) from None
        base_url = self._base_url
        if not self._key and not base_url:
            raise InvalidOption(f"{KEY} is not set; set it, or name an endpoint that needs none with --base-url")
        if not (self._key.isascii() and self._key.isprintable()):
            raise InvalidOption(f"{KEY} holds signs that no key has; copy it again")
        return OpenAI(
            api_key=self._key or "none",
            base_url=base_url or None,
            timeout=self.options.timeout,
            max_retries=self.options.retries,
        )

    @property
    def _base_url(self) -> str:
        return self.options.base_url or os.environ.get(BASE_URL, "").strip()

    @property
    def _key(self) -> str:
        return os.environ.get(KEY, "").strip()

    @property
    def _place(self) -> str:
        """The address without a password that may stand in it."""
        return _public(str(self._client.base_url))

    def _failed(self, error: APIStatusError) -> JudgeFailed:
        status, model = error.status_code, self.options.model
        if status in (401, 403):  # what such an answer says may repeat the key
            return JudgeFailed(f"{self._place} lets nobody in with this key ({status}); check {KEY}")
        if status == 404:
            return JudgeFailed(
                f"{self._place} knows no model `{model}`, or no chat completions (404); check --base-url"
            )
        return JudgeFailed(
            f"{self._place} answers {status} with --retries {self.options.retries}: {self._told(error.message)}"
        )

    def _unreached(self, error: APIConnectionError) -> JudgeFailed:
        said = " ".join(filter(None, (error.message, str(error.__cause__ or ""))))
        return JudgeFailed(f"{self._place} gave no answer in {self._tries} ({self._told(said)}); is it running?")

    @property
    def _tries(self) -> str:
        return f"{self.options.retries + 1} tries of {self.options.timeout:g} s"

    def _told(self, text: str) -> str:
        """What a server said, on one short line and never with the key."""
        plain = text.replace(self._key, "***") if self._key else text
        return " ".join(plain.split())[:160]


def _public(address: str) -> str:
    url = urlsplit(address)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()


def read_completion(text: str) -> Answer:
    """The answer in the body of a chat completion.

    Raises:
        ValueError: it is none.
    """
    try:
        record = json.loads(text)
        choice = record["choices"][0]
        message, usage = choice["message"], record.get("usage") or {}
        answer = Answer(
            content=message.get("content") or "",
            refusal=message.get("refusal") or "",
            finish_reason=choice.get("finish_reason") or "",
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
        )
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no chat completion") from error
    return require_answer(answer)


def require_answer(answer: Answer) -> Answer:
    """The answer, if its fields are what they should be.

    Raises:
        ValueError: they are not.
    """
    texts = (answer.content, answer.refusal, answer.finish_reason)
    counts = (answer.prompt_tokens, answer.completion_tokens)
    if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
        raise ValueError("no chat completion")
    return answer
