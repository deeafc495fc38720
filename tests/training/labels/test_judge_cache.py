"""What a judge said is kept, and found again for the very same question only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from judge_fakes import generations, judge_of
from judge_server import JudgeServer, judge_server

from lapwing_training.data.generations import write_generations
from lapwing_training.errors import InvalidOption
from lapwing_training.labels.judge import Answer
from lapwing_training.labels.judge_cache import JudgeCache, answer_key
from lapwing_training.labels.judge_endpoint import Endpoint, EndpointOptions

pytestmark = pytest.mark.usefixtures("judge_surroundings")


def test_what_was_added_is_found_again_by_another_process_to_be(tmp_path: Path) -> None:
    answer = Answer("Pa\u2028ris \ud800", "", "stop", 3, 4)
    JudgeCache(tmp_path / "new" / "c").add("k", "m", answer)
    assert JudgeCache(tmp_path / "new" / "c")["k"] == answer


@pytest.mark.parametrize("cut", [1, 10, 60, -1])
def test_a_line_that_was_cut_off_is_asked_again_and_spoils_none_after_it(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "c"
    JudgeCache(path).add("k1", "m", Answer("one"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b"k1", b"k2")[:cut])
    cache = JudgeCache(path)
    assert ("k1" in cache, "k2" in cache) == (True, cut == -1)
    cache.add("k3", "m", Answer("three"))
    again = JudgeCache(path)
    assert ("k1" in again, "k3" in again) == (True, True)


def test_a_write_that_fails_half_way_spoils_none_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = JudgeCache(tmp_path / "c")
    plain = Path.open

    def full(path: Path, *how: str) -> Any:
        with plain(path, "ab") as file:
            file.write(b'{"key": "k1", ')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space"):
            cache.add("k1", "m", Answer("one"))
    cache.add("k2", "m", Answer("two"))
    again = JudgeCache(tmp_path / "c")
    assert ("k1" in again, "k2" in again) == (False, True)


def test_another_file_is_never_taken_for_a_cache(tmp_path: Path) -> None:
    write_generations(tmp_path / "items.jsonl", generations(2))
    with pytest.raises(InvalidOption, match=r"items.jsonl, line 1: no answer of a judge; give another file"):
        JudgeCache(tmp_path / "items.jsonl")


def test_model_prompt_and_parameters_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(base_url: str = "") -> str:
        return Endpoint(EndpointOptions("m", base_url)).address

    public, own = address(), address("http://me:secret@localhost:8000/v1/?key=secret")
    assert (public, own) == ("https://api.openai.com/v1", "http://localhost:8000/v1")
    counted = [("m", "p", {}), ("n", "p", {}), ("m", "q", {}), ("m", "p", {"t": 1})]
    keys = [answer_key(*of, place) for of in counted for place in (public, own)]
    assert len(set(keys)) == 8
    assert answer_key("m", "p", {}, public) == keys[0]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert (address(), address("http://other/v1")) == (own, "http://other/v1")


def test_the_default_address_is_that_of_the_package() -> None:
    from openai import OpenAI

    assert str(OpenAI(api_key="k").base_url).rstrip("/") == Endpoint(EndpointOptions("m")).address


def test_the_same_name_behind_another_address_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    with judge_server() as other:
        for asked in (server, other, server):
            judge = judge_of(asked, tmp_path / "c")
            judge(generations(3))
        assert judge.usage.requests == 0  # the first again
        judge = judge_of(other, tmp_path / "d")
        judge(generations(3))
    assert judge.usage.requests == 3
