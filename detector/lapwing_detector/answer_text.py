"""The text of an answer while its tokens come: nothing that changes later, and nothing of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST, SHORTEST = 32, 16
"""Tokens of a stretch that is decoded: from the one on it is shortened to the other."""

CONTEXT = 4
"""Least certain characters of it. It may begin within a character, of which at most 3 bytes follow."""

LOST = "\N{REPLACEMENT CHARACTER}"
"""Stands for bytes that are no character, or not yet."""

UNCLEAN = re.compile(r" [ n'vr]*\Z")
"""Where the places in which transformers leaves out a space may begin: in front of . ? ! , n't 'm 's 've 're and a
single quotation mark."""

AMID = re.compile(r"[^ n'vr]")
"""None of them is this far along at such a character, wherever it began."""


class TextStream:
    """Text of a growing list of tokens, piece by piece: together the pieces are what the tokenizer makes of them all.

    Held back is what tokens to come may still change: a character of which bytes are missing; all bytes that were
    written one by one, as some tokenizers read such a run as a whole; and where the tokenizer takes spaces away behind
    its own decoding, what may be the beginning of such a place. A stretch at the end is decoded, not the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._pieces: list[str] = []
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._start = 0
        """First token of the stretch that is decoded."""

        self._longest = LONGEST
        """Tokens from which on a shorter stretch is looked for."""

        self._given = 0
        """Characters of the stretch's text that were given out."""

        self._open = False
        """Whether the last token with a text was a single byte."""

    def push(self, token_id: int, last: bool = False) -> str:
        """The text that the token makes certain; with the last one all of it."""
        self.ids.append(token_id)
        self._open = _is_byte(self.tokenizer, token_id) or (self._open and not self._decode([token_id]))
        piece = self._rest() if last else "" if self._open else self._more()
        self._pieces.append(piece)
        return piece

    def _more(self) -> str:
        certain = self._certain(self.ids[self._start :])
        piece, self._given = certain[self._given :], max(self._given, len(certain))
        if len(self.ids) - self._start >= self._longest:
            self._shorten(certain)
        return piece

    def _rest(self) -> str:
        given, whole = "".join(self._pieces), self._decode(self.ids)
        if whole.startswith(given):
            return whole[len(given) :]
        return self._decode(self.ids[self._start :])[self._given :]  # a tokenizer that changes what it has said

    def _shorten(self, certain: str) -> None:
        """Decode the last tokens only from now on, if their text goes on as that of the whole stretch does.

        It begins otherwise: without a space, or with parts of a character. As it has certain text behind that, it stays
        longer or shorter by the same number of characters.
        """
        start = len(self.ids) - SHORTEST
        shorter = self._certain(self.ids[start:])
        given = self._given - len(certain) + len(shorter)
        first = self._decode(self.ids[start : start + 1])  # which may look otherwise than behind others
        decided = not self._cleans or AMID.search(shorter, len(first)) is not None
        if not decided or given < CONTEXT or certain[self._given - 1 :] != shorter[given - 1 :]:
            self._longest *= 2
        else:
            self._start, self._given, self._longest = start, given, LONGEST

    def _certain(self, ids: list[int]) -> str:
        """The text of tokens without what may change."""
        text = self._decode(ids)
        if self._cleans:
            plain = self._decode(ids, clean_up_tokenization_spaces=False)
            certain = UNCLEAN.sub("", plain)
            text = certain if plain == text else self.tokenizer.clean_up_tokenization(certain)
        return text.removesuffix(LOST)  # of several only the last can stand for bytes that wait for more

    def _decode(self, ids: list[int], **options: bool) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, **options))


def _is_byte(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether it is a byte as SentencePiece writes it, such as <0x0A>."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return isinstance(token, str) and len(token) == 6 and token.startswith("<0x") and token.endswith(">")


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
