"""How much the server takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Upper bounds of what one request may ask for."""

    request_bytes: int = 8 * 2**20
    """Bytes of one message. A finite bound also bounds what a compressed message may unpack to."""

    batch_items: int = 64
    new_tokens: int = 1024
    generate_streams: int = 4
    """At the same time. They share one model, token by token, and each holds a cache of keys and values."""

    stream_seconds: float = 600.0
    """Wall clock of one stream."""

    heatmap_pixels: int = 4_000_000

    page_size: int = 100

    messages: int = 1000
    """Turns of one prompt."""

    characters_per_token: int = 64
    """What has more characters for each token that the model takes is refused before it is tokenised."""

    def room(self, tokens: int) -> Room:
        """The sizes that may fit into a model that takes so many tokens."""
        return Room(tokens, tokens * self.characters_per_token, self.messages)


@dataclass(frozen=True)
class Room:
    """What a prompt or response may hold, so that a hopeless one never takes the worker's time."""

    tokens: int
    characters: int
    messages: int
