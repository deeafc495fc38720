"""The text of an answer while its tokens come: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Text of a growing list of tokens, piece by piece, whole characters only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0
        """First token of the stretch that is decoded: decoding from a boundary gives the spaces that merges need."""

        self.given = 0
        """Tokens whose text has been given out."""

    def push(self, token_id: int, last: bool = False) -> str:
        """The text that the token completes: none while a character of several tokens is open, all with the last."""
        self.ids.append(token_id)
        before = self._decode(self.ids[self.start : self.given])
        now = self._decode(self.ids[self.start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        text = now[len(before) :]
        if text:  # behind a token without any, some tokenizers drop a space as at the beginning of a text
            self.start = self.given
        self.given = len(self.ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class StopStrings:
    """Holds text back while it may be the beginning of a string at which the answer ends."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.found = False

    def push(self, text: str, last: bool = False) -> str:
        """What can be given out of the text so far; sets `found` once a stop string is in it, which is left out.

        Args:
            text: that came.
            last: nothing is held back.
        """
        text, self.held = self.held + text, ""
        ends = [at for at in map(text.find, self.stops) if at >= 0]
        if ends:
            self.found = True
            return text[: min(ends)]
        if not last:
            keep = max((self._overlap(text, stop) for stop in self.stops), default=0)
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of the text with which the stop string begins."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
