"""A run that was cut off goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import copy
import errno
from dataclasses import replace
from pathlib import Path

import pytest
from generate_fakes import ALL, GREEDY, contents, power_cut, questions

from lapwing_detector.language_model import LanguageModel
from lapwing_training.answers.generate import GenerateOptions, generate_answers
from lapwing_training.store.shards import WHOLE, shard_paths


def sampled(temperature: float) -> GenerateOptions:
    return replace(GREEDY, temperature=temperature, seed=3)


@pytest.fixture(scope="module")
def whole(loaded: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[float, bytes]:
    """By temperature, what a run that is not cut off writes."""
    folder = tmp_path_factory.mktemp("whole")
    for temperature in (0.0, 1.5):
        generate_answers(questions(), folder / str(temperature), loaded, sampled(temperature))
    return {temperature: (folder / str(temperature)).read_bytes() for temperature in (0.0, 1.5)}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_run_that_failed_goes_on_and_ends_with_the_same_bytes(
    loaded: LanguageModel, tmp_path: Path, whole: dict[float, bytes], temperature: float
) -> None:
    options = sampled(temperature)
    with power_cut(at=3):
        generate_answers(questions(), tmp_path / "cut.jsonl", loaded, options)
    assert not (tmp_path / "cut.jsonl").exists()
    [partial] = tmp_path.glob("cut.jsonl.*.partial")
    # Killed while it was writing: a line of the last batch is whole, the next is half.
    lines = whole[temperature].split(b"\n")
    partial.write_bytes(partial.read_bytes() + lines[6] + b"\n" + lines[7][:20])
    told = generate_answers(questions(), tmp_path / "cut.jsonl", loaded, options)
    assert told["resumed"] == 6
    assert (tmp_path / "cut.jsonl").read_bytes() == whole[temperature]
    assert not list(tmp_path.glob("*.partial"))


def test_another_dtype_does_not_go_on_with_a_run_that_failed(loaded: LanguageModel, tmp_path: Path) -> None:
    model = copy.deepcopy(loaded.model).bfloat16()
    model.save_pretrained(tmp_path / "coarse")
    loaded.tokenizer.save_pretrained(tmp_path / "coarse")
    coarse, fine = (LanguageModel.load(str(tmp_path / "coarse"), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert coarse.identity.digest == fine.identity.digest  # both hold the same numbers
    with power_cut(at=2):
        generate_answers(questions(), tmp_path / "out", coarse, GREEDY)
    assert generate_answers(questions(), tmp_path / "out", fine, GREEDY)["resumed"] == 0
    assert generate_answers(questions(), tmp_path / "out", coarse, GREEDY)["resumed"] == 3  # control


@pytest.mark.parametrize("rubbish", [b"\0" * 40, b"\0" * 40 + b"\n", b"[1]\n", b'{"id": "q3"}\n', b"\xff\n"])
def test_what_a_crash_left_in_the_partial_file_is_cut_off(
    loaded: LanguageModel, tmp_path: Path, whole: dict[float, bytes], rubbish: bytes
) -> None:
    with power_cut(at=2):
        generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)
    [partial] = tmp_path.glob("cut.*.partial")
    partial.write_bytes(partial.read_bytes() + rubbish)
    assert generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)["resumed"] == 3
    assert (tmp_path / "cut").read_bytes() == whole[0.0]


def with_store(loaded: LanguageModel, here: Path, temperature: float) -> dict[str, object]:
    return generate_answers(questions(11), here / "out", loaded, sampled(temperature), here / "s", ALL, 3)


@pytest.fixture(scope="module")
def whole_stores(loaded: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, bytes]]:
    """By temperature, the files of answers and store that a run leaves which is not cut off."""
    folder = tmp_path_factory.mktemp("whole")
    for temperature in (0.0, 1.5):
        with_store(loaded, folder / str(temperature), temperature)
    return {temperature: contents(folder / str(temperature)) for temperature in (0.0, 1.5)}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("fault", ["answers", "answers lost", "shard lost", "shard damaged", "half a line"])
def test_answers_and_store_go_on_together_and_end_with_the_same_bytes(
    loaded: LanguageModel, tmp_path: Path, whole_stores: dict[float, dict[str, bytes]], temperature: float, fault: str
) -> None:
    with power_cut(at=3):
        with_store(loaded, tmp_path / "cut", temperature)
    [partial] = (tmp_path / "cut").glob("out.*.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    first, second = shard_paths(tmp_path / "cut" / "s", WHOLE)
    if fault == "answers lost":  # killed after the shard was written, before the answers were
        partial.write_bytes(b"".join(lines[:3]))
    elif fault == "half a line":
        partial.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    elif fault == "shard lost":
        second.unlink()
    elif fault == "shard damaged":
        second.write_bytes(first.read_bytes())
    (tmp_path / "cut" / ".out.x7.tmp").write_bytes(b"half")  # killed at the very end, in an earlier run
    assert with_store(loaded, tmp_path / "cut", temperature)["resumed"] == (6 if fault == "answers" else 3)
    assert contents(tmp_path / "cut") == whole_stores[temperature]


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on(
    loaded: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[float, bytes]
) -> None:
    with monkeypatch.context() as patched:
        plain, calls = Path.open, []

        def full(path: Path, *arguments: object, **options: object) -> object:
            calls.append(path)
            if path.suffix == ".partial" and sum(one.suffix == ".partial" for one in calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(path, *arguments, **options)

        patched.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"No space left on device; .*make room.*\.partial"):
            generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)
    assert not (tmp_path / "cut").exists()
    assert generate_answers(questions(), tmp_path / "cut", loaded, GREEDY)["resumed"] == 3
    assert (tmp_path / "cut").read_bytes() == whole[0.0]
