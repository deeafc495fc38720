"""The pieces of an answer's text are together what its tokenizer makes of all the tokens, whatever these are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lapwing_detector import answer_text
from lapwing_detector.answer_text import LONGEST, SHORTEST, TextStream

EXAMPLES = 2000 if os.environ.get("LAPWING_SOAK") else 100
MOST = 3 * LONGEST
"""Tokens of a text: so many that the stretch that is decoded begins anew."""

SPECIAL = ("<unk>", "<s>", "</s>")
BIRD = "\N{BIRD}".encode()


def fast(inner: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **options)


def numbered(words: Sequence[str]) -> dict[str, int]:
    return {word: place for place, word in enumerate((*SPECIAL, *words))}


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's: every byte is a letter, and a token any number of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("b", "c"), ("ð", "Ł"), ("ðŁ", "Ĳ"), ("ðŁĲ", "¦"), ("¦", "Ġa")]  # with parts of a bird
    inner = Tokenizer(models.BPE(numbered([*letters, *("".join(pair) for pair in merges)]), merges))
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(" added "), "\N{BIRD}!"])
    return fast(inner)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space is part of the word behind it and dropped at the beginning, what has no word is bytes."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581hello", "\u2581", "a", "\u2581\u2581", "ü", "!", "."]
    inner = Tokenizer(models.BPE(numbered(words), [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return fast(inner)


def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT's: spaces between words, and then none in front of some marks."""
    words = [
        "do",
        "it",
        "x",
        *".,?!'ntsmvre",
        "n't",
        *(f"##{end}" for end in ("'", "n", "t", "'s", "ve", " ' ", " ", "ing")),
    ]
    inner = Tokenizer(models.WordPiece(numbered(words), unk_token="<unk>"))
    inner.decoder = decoders.WordPiece(cleanup=False)
    return fast(inner, clean_up_tokenization_spaces=True)


def meta_space() -> PreTrainedTokenizerFast:
    """Like T5's: a space is part of the word behind it, and dropped at the beginning."""
    words = ["\u2581hello", "\u2581", "a", "\u2581\u2581", "!", "\u2581world"]
    inner = Tokenizer(models.Unigram([(word, -1.0) for word in (*SPECIAL, *words)], unk_id=0))
    inner.decoder = decoders.Metaspace()
    return fast(inner)


KINDS = {make.__name__: make() for make in (byte_level, byte_fallback, word_piece, meta_space)}


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token, place == len(ids) - 1) for place, token in enumerate(ids)]


def whole(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def each_alone(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The control: what everybody writes first."""
    return [whole(tokenizer, [token]) for token in ids]


def tokens_of(kind: str) -> some.SearchStrategy[list[int]]:
    """Any tokens, and long runs of few kinds: of bytes that are no character, of spaces, of what adds no text."""
    every = some.integers(0, len(KINDS[kind]) - 1)
    runs = some.lists(every, min_size=1, max_size=3).flatmap(
        lambda few: some.lists(some.sampled_from(few), max_size=MOST)
    )
    return some.lists(some.lists(every, max_size=12) | runs, min_size=1, max_size=4).map(lambda lists: [*chain(*lists)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_whole(kind: str) -> None:
    tokenizer = KINDS[kind]

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=not os.environ.get("LAPWING_SOAK"), database=None)
    @given(tokens_of(kind))
    def holds(ids: list[int]) -> None:
        assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)

    holds()


def ids_of(kind: str, *words: str) -> list[int]:
    return [KINDS[kind].convert_tokens_to_ids(word) for word in words]


def letters(text: bytes) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text]


CHANGES = {
    "byte_level": ids_of("byte_level", "a", "ðŁĲ", "¦Ġa", "ðŁ", "a"),
    "byte_fallback": ids_of("byte_fallback", "a", *letters(b"A" + BIRD[:1]), "a"),
    "word_piece": ids_of("word_piece", "do", "n", "##'", "##t", "it", "'", "x", "."),
    "meta_space": ids_of("meta_space", "\u2581hello", "\u2581world"),
}
"""Of each kind tokens whose text those behind them change."""


@pytest.mark.parametrize("kind", KINDS)
def test_control_each_token_alone(kind: str) -> None:
    tokenizer, ids = KINDS[kind], CHANGES[kind]
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids) != "".join(each_alone(tokenizer, ids))


@pytest.mark.parametrize(
    ("kind", "name", "nothing"),
    [
        ("byte_level", "LOST", "never"),
        ("byte_fallback", "_is_byte", lambda *_: False),
        ("word_piece", "UNCLEAN", re.compile("never")),
    ],
)
def test_control_nothing_is_held_back(kind: str, name: str, nothing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_text, name, nothing)
    tokenizer, ids = KINDS[kind], CHANGES[kind]
    assert "".join(pieces_of(tokenizer, ids)) != whole(tokenizer, ids)


def test_nothing_is_held_back_without_need() -> None:
    for kind, words, pieces in (
        ("byte_level", ("bc", "ð", "Ł", "Ĳ", "¦", "ð", "Ł", "a"), ["bc", "", "", "", "\N{BIRD}", "", "", "\ufffda"]),
        # The second byte can't be of a character, so that the first is none; the last may still be.
        ("byte_level", ("¦", "¦", "¦", "a"), ["", "\ufffd", "\ufffd", "\ufffda"]),
        ("byte_fallback", ("\u2581hello", *letters(BIRD), "a"), ["hello", "", "", "", "", "\N{BIRD}a"]),
        ("byte_fallback", (*letters(BIRD[:2]), "</s>", *letters(BIRD[2:]), "a"), ["", "", "", "", "", "\N{BIRD}a"]),
        ("word_piece", ("it", "n", "##ing", "x", "'", "s", "."), ["it", "", " ning", " x", "", "'s", "."]),
        ("meta_space", ("\u2581hello", "\u2581", "\u2581world"), ["hello", " ", " world"]),
    ):
        ids = ids_of(kind, *words)
        stream = TextStream(KINDS[kind])
        assert [stream.push(token) for token in ids] == pieces


class Counted:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.tokens = tokenizer, 0

    def decode(self, ids: list[int], **options: bool) -> str:
        self.tokens += len(ids)
        return str(self.tokenizer.decode(ids, **options))

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)


def decoded(kind: str, ids: list[int]) -> int:
    counted = Counted(KINDS[kind])
    assert "".join(pieces_of(counted, ids)) == whole(KINDS[kind], ids)
    return counted.tokens


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("byte_level", ("a", "Ġa", "bc")),
        ("byte_level", ("¦",)),
        ("byte_level", ("ð", "Ł")),
        ("byte_fallback", ("\u2581hello", *letters(BIRD))),
        ("byte_fallback", ("<0xFF>",)),
        ("word_piece", ("it", "##ing", "'", "s")),
        ("meta_space", ("\u2581",)),
    ],
)
def test_each_token_costs_the_same_however_many_there_are(kind: str, words: tuple[str, ...]) -> None:
    few, many = (decoded(kind, ids_of(kind, *words) * (tokens // len(words))) for tokens in (400, 1600))
    assert many < 4.2 * few
    # The control: to decode all that is there whenever a token comes.
    assert many < 1600 * 1600 / 8


def test_control_a_stretch_that_begins_within_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, skipped = KINDS["byte_level"], ["</s>"] * (SHORTEST - 2)
    ids = ids_of("byte_level", *["¦"] * (LONGEST - SHORTEST - 1), "ð", *skipped, "Ł", "Ĳ", "¦", "a")
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)
    monkeypatch.setattr(answer_text, "CONTEXT", 1)
    assert "".join(pieces_of(tokenizer, ids)) != whole(tokenizer, ids)


def test_control_a_stretch_that_begins_within_a_run_of_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["##'" if letter == "'" else letter for letter in "x'''rrrrr'rr'r'r''''''rrr'rrr''rrxx"]
    tokenizer, ids = KINDS["word_piece"], ids_of("word_piece", *words)
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)
    monkeypatch.setattr(answer_text, "AMID", re.compile(""))
    assert "".join(pieces_of(tokenizer, ids)) != whole(tokenizer, ids)
