"""How the benchmark of capture comes by its numbers: its processes, and runs that are resumed. No model runs here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts that import one another, no package

import capture as script
import machine
import memory
import workload
from cases import QUICK, Case, MemoryCase, TimeCase
from results import MemoryResult, Results, TimeResult

TIMED = sum(isinstance(case, TimeCase) for case in QUICK)
BEFORE, NOW = 2.0, 1.0


def measured(case: Case, value: float) -> Any:
    """What a process sends for the case if all that it measures is this value."""
    return {way: [value, value] for way in case.ways} if isinstance(case, TimeCase) else value


class Processes:
    """Stands in for those that measure, and keeps what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[Case] = []

    def __call__(self, work: Any, cases: list[Case], threads: int, fresh: bool = False) -> Iterator[Any]:
        self.asked += cases
        return iter([measured(case, NOW) for case in cases])


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    found = Processes()
    monkeypatch.setattr(script, "_child", found)
    monkeypatch.setattr(workload, "prepare", lambda: None)
    monkeypatch.setattr(machine, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(memory, "available", lambda: True)
    monkeypatch.setattr(memory, "free_mb", lambda: 1e6)
    return found


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["capture.py", *map(str, arguments)])
        script.main()


def stopped_after(done: int) -> Results:
    """Results of a quick run so far."""
    timed = [case for case in QUICK[:done] if isinstance(case, TimeCase)]
    forwards = [case for case in QUICK[:done] if isinstance(case, MemoryCase)]
    return Results(
        machine.describe(2),
        quick=True,
        times=[TimeResult(case, measured(case, BEFORE)) for case in timed],
        memory=[MemoryResult(case, [measured(case, BEFORE)]) for case in forwards],
    )


@pytest.mark.parametrize("done", [0, 1, TIMED, TIMED + 1])
def test_a_resumed_run_measures_what_the_stopped_one_has_not(tmp_path: Path, processes: Processes, done: int) -> None:
    out, so_far = tmp_path / "one.json", tmp_path / "one.so-far.json"
    stopped_after(done).write(so_far)
    run("--quick", "--resume", "--threads", 2, "--out", out)
    assert processes.asked == list(QUICK[done:])
    found = Results.read(out)
    assert [one.case for one in (*found.times, *found.memory)] == list(QUICK)
    values = [one.median("ours") for one in found.times] + [one.median_mb for one in found.memory]
    assert values == [BEFORE] * done + [NOW] * (len(QUICK) - done)
    assert "resumed" in found.machine
    assert not so_far.exists()


def test_a_run_that_is_not_resumed_measures_everything(tmp_path: Path, processes: Processes) -> None:
    stopped_after(TIMED).write(tmp_path / "one.so-far.json")
    run("--quick", "--threads", 2, "--out", tmp_path / "one.json")
    assert processes.asked == list(QUICK)
    assert "resumed" not in Results.read(tmp_path / "one.json").machine


def test_there_must_be_a_run_to_resume(tmp_path: Path, processes: Processes) -> None:
    with pytest.raises(SystemExit, match=r"nothing to resume: there is no .*one\.so-far\.json"):
        run("--quick", "--resume", "--out", tmp_path / "one.json")
    with pytest.raises(SystemExit, match=r"nothing to resume: .* give --out as before"):
        run("--only", "512", "--resume")
    assert processes.asked == []


@pytest.mark.parametrize("differs", script.SAME_MACHINE)
def test_a_run_of_another_machine_is_not_resumed(tmp_path: Path, processes: Processes, differs: str) -> None:
    so_far = tmp_path / "one.so-far.json"
    other = stopped_after(1)
    other.machine[differs] = "another"
    other.write(so_far)
    before = so_far.read_bytes()
    with pytest.raises(SystemExit, match=f"is of {differs} another, here it is"):
        run("--quick", "--resume", "--threads", 2, "--out", tmp_path / "one.json")
    assert so_far.read_bytes() == before
    assert processes.asked == []


def send_each(receiver: Connection, cases: list[Case], threads: int) -> None:
    for case in cases:
        receiver.send((case, threads, os.getpid()))


def send_one_and_die(receiver: Connection, cases: list[Case], threads: int) -> None:
    receiver.send(cases[0])
    os._exit(3)


def test_a_process_of_its_own_sends_for_each_case() -> None:
    [(first, threads, process), second] = script._child(send_each, QUICK[:2], 1)
    assert (first, threads) == (QUICK[0], 1)
    assert second == (QUICK[1], 1, process)
    assert process != os.getpid()


def test_the_end_of_a_process_before_its_last_case_ends_the_run() -> None:
    answers = script._child(send_one_and_die, QUICK[:2], 1)
    assert next(answers) == QUICK[0]
    with pytest.raises(SystemExit, match="ended with 3"):
        next(answers)


def take(megabytes: int) -> list[bytearray]:
    """So much, in parts of a size below glibc's threshold once that has grown, and written to."""
    return [bytearray(b"1" * 1_000_000) for _ in range(megabytes)]


def send_peak_of(receiver: Connection, megabytes: list[int], threads: int) -> None:
    take(2)  # and give it back: the threshold is their size now
    left_free = take(40)
    above = take(2)
    del left_free  # stays with the process, for there is something above
    if threads:
        memory.fix_heap()
    memory.forget_peak()
    before = memory.resident_mb()
    take(megabytes[0])
    receiver.send(memory.peak_mb() - before)
    del above


@pytest.mark.skipif(not memory.available(), reason="the peak is read on Linux only")
@pytest.mark.parametrize("megabytes", [20, 80])
def test_the_peak_of_a_fixed_heap_holds_all_that_was_taken(megabytes: int) -> None:
    [fixed] = script._child(send_peak_of, [megabytes], True)
    assert fixed == pytest.approx(megabytes, abs=3)
    [grown] = script._child(send_peak_of, [megabytes], False)
    assert grown < megabytes - 10  # what was left free is taken again unseen
