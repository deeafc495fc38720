"""Text is given out as soon as it can't be part of a stop string, and never a letter of one."""

from __future__ import annotations

import random

import pytest

from lapwing_detector.answer_text import StopStrings


def cut(pieces: list[str], stops: list[str]) -> tuple[str, int | None]:
    """The oracle: the text in front of the first stop string, as soon as one is whole, and in which piece that was."""
    text = ""
    for place, piece in enumerate(pieces):
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], place
    return text, None


def test_against_looking_at_the_whole_text() -> None:
    chance, ended = random.Random(0), 0
    for _ in range(3000):
        stops = ["".join(chance.choices("abc", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3))]
        pieces = ["".join(chance.choices("abc", k=chance.randint(0, 3))) for _ in range(chance.randint(1, 8))]
        expected, at = cut(pieces, stops)
        ended += at is not None
        searched, given = StopStrings(stops), ""
        for place, piece in enumerate(pieces):
            given += searched.push(piece, last=place == len(pieces) - 1)
            assert searched.found == (at == place)
            if searched.found:
                break
            if place < len(pieces) - 1:
                so_far = "".join(pieces[: place + 1])
                assert so_far == given + searched.held
                # Nothing is held back that can't become a stop string any more.
                begins = any(stop.startswith(searched.held) and stop != searched.held for stop in stops)
                assert searched.held == "" or begins
        assert given == expected
    assert 500 < ended < 2500


@pytest.mark.parametrize(("stops", "given"), [([], "ab"), (["bc"], "a"), (["abd"], ""), (["c"], "ab")])
def test_what_is_held_back(stops: list[str], given: str) -> None:
    assert StopStrings(stops).push("ab") == given
    assert StopStrings(stops).push("ab", last=True) == "ab"
