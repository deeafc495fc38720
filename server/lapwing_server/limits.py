"""How much the server takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def no_truth(value: Any) -> Any:
    """The value; true and false, which Python counts as 1 and 0, are no numbers here."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


Count = Annotated[int, BeforeValidator(no_truth), Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, BeforeValidator(no_truth), Field(ge=1, le=2**62)]
Seconds = Annotated[float, BeforeValidator(no_truth), Field(gt=0, le=1e9, allow_inf_nan=False)]


class Limits(BaseModel):
    """Upper bounds of what clients may ask for, and of what the server computes at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    request_bytes: Count = 8 * 2**20
    """Bytes of one message. A finite bound also bounds what a compressed message may unpack to."""

    calls_per_connection: Count = 1000
    """Calls of one connection at the same time; further ones wait at the client."""

    batch_items: Count = 64
    """Items of one ScoreBatch."""

    new_tokens: Count = 1024
    """Tokens written by one Generate."""

    generate_streams: Count = 8
    """Generate streams at the same time. They share one model, and each holds a cache of keys and values."""

    streams_per_client: Count | None = None
    """Streams of one client (of one token or certificate, else of one address) at the same time. Without it, where
    clients say who they are (tokens_file, tls_client_ca), half as many as generate_streams, and at least one."""

    public_streams: Count = 1000
    """Streams at the same time that need no token: of the health, and of the reflection."""

    public_streams_per_client: Count = 100
    """Those of one address."""

    stream_seconds: Seconds = 600.0
    """Wall clock of one stream."""

    stuck_seconds: Seconds = 300.0
    """A forward with the step of the streams beside it that takes longer takes the server out of service until it
    ends and a try of the server's own works."""

    stop_strings: Count = 16
    """Stop strings of one Generate."""

    stop_string_characters: Count = 256
    """Characters of one stop string."""

    attention_streams: Count = 16
    """ScoreAttention streams at the same time."""

    attention_bytes: Size = 512 * 2**20
    """Bytes of sums that one ScoreAttention stream may make the server hold."""

    attention_total_bytes: Size = 2**30
    """Bytes of sums of all ScoreAttention streams together."""

    attention_bytes_per_client: Size | None = None
    """Those of one client. Without it, where clients say who they are, half of attention_total_bytes, and at least
    attention_bytes."""

    queue_items: Count = 512
    """Items that wait for their turn; one more is refused at once."""

    queue_items_per_client: Count | None = None
    """Those of one client, where clients say who they are. Without it, half of queue_items, and at least one."""

    batch_tokens: Count = 8192
    """Tokens of one shared forward, padding counted; a single longer item is taken alone."""

    batch_forward_items: Count = 64
    """Items of one shared forward."""

    heatmap_pixels: Count = 4_000_000
    """Pixels of one picture."""

    page_size: Count = 100
    """Probes on one page of a list."""

    messages: Count = 1000
    """Turns of one prompt."""

    characters_per_token: Count = 64
    """What has more characters for each token that the model takes is refused before it is tokenised."""

    def for_many(self) -> Limits:
        """The same for clients that are told apart: one alone does not get all there is, unless somebody says so.

        Of clients that need not say who they are, all that come through one proxy, and all on this machine, look like
        one: half would only take from them what nobody else asks for.
        """
        halves = {
            "streams_per_client": max(1, self.generate_streams // 2),
            "queue_items_per_client": max(1, self.queue_items // 2),
            "attention_bytes_per_client": max(self.attention_bytes, self.attention_total_bytes // 2),
        }
        return self.model_copy(update={name: half for name, half in halves.items() if getattr(self, name) is None})

    @property
    def streams_of_one(self) -> int:
        """Streams of one client."""
        return self.streams_per_client or self.generate_streams + self.attention_streams

    @property
    def items_of_one(self) -> int:
        """Items of one client that wait."""
        return self.queue_items_per_client or self.queue_items

    @property
    def attention_of_one(self) -> int:
        """Bytes of sums of one client."""
        return self.attention_bytes_per_client or self.attention_total_bytes

    def room(self, tokens: int) -> Room:
        """The sizes that may fit into a model that takes so many tokens."""
        return Room(tokens, tokens * self.characters_per_token, self.messages)


@dataclass(frozen=True)
class Room:
    """What a prompt or response may hold, so that a hopeless one never takes the worker's time."""

    tokens: int
    characters: int
    messages: int
