"""How the benchmark of capture comes by its numbers: its processes, and runs that are resumed. No model runs here."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts that import one another, no package

import capture as script
import machine
import memory
from cases import QUICK, Case, MemoryCase, TimeCase
from results import MemoryResult, Results, TimeResult

TIMED = sum(isinstance(case, TimeCase) for case in QUICK)
BEFORE, NOW = 2.0, 1.0


def measured(case: Case, value: float) -> Any:
    """What a process sends for the case if all that it measures is this value."""
    return {way: [value, value] for way in case.ways} if isinstance(case, TimeCase) else value


class Processes:
    """Stands in for those that measure, and keeps what each was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[Case], int, bool]] = []
        self.prepared: list[bool] = []

    def __call__(self, work: Any, cases: list[Case], threads: int, fresh: bool = False) -> Iterator[Any]:
        self.calls.append((work, cases, threads, fresh))
        return iter([measured(case, NOW) for case in cases])

    @property
    def asked(self) -> list[Case]:
        """Of all."""
        return [case for _, cases, _, _ in self.calls for case in cases]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    import workload  # not above: a fresh process imports this file, and this takes seconds

    found = Processes()
    monkeypatch.setattr(script, "_child", found)
    monkeypatch.setattr(workload, "prepare", lambda: found.prepared.append(True))
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


def test_each_case_is_measured_in_the_process_it_needs(processes: Processes) -> None:
    import timing

    half = TimeCase("prefill", 128, dtype="bfloat16")
    fixed, grown = MemoryCase("ours", 128), MemoryCase("ours", 128, heap="glibc", processes=3)
    found = Results(machine.describe(1), quick=True)
    script.measure([half, grown, QUICK[0], fixed], found, None)
    assert processes.calls == [
        (timing.send_seconds, [QUICK[0], half], 1, False),  # float32 before the model is rounded
        *[(memory.send_peak, [grown], 1, True)] * 3,
        (memory.send_peak, [fixed], 1, False),
    ]
    assert [one.case for one in found.times] == [QUICK[0], half]
    assert [len(one.peaks_mb) for one in found.memory] == [3, 1]
    assert processes.prepared == [True]
    script.measure([replace(grown, tokens=64)], found, None)
    assert processes.prepared == [True]  # a fresh process has nothing of it


@pytest.mark.parametrize("done", [0, 1, TIMED, TIMED + 1])
def test_a_resumed_run_measures_what_the_stopped_one_has_not(
    tmp_path: Path, processes: Processes, done: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, so_far = tmp_path / "one.json", tmp_path / "one.so-far.json"
    stopped_after(done).write(so_far)
    run("--quick", "--resume", "--threads", 2, "--out", out)
    assert processes.asked == list(QUICK[done:])
    found = Results.read(out)
    assert [one.case for one in (*found.times, *found.memory)] == list(QUICK)
    values = [one.median("ours") for one in found.times] + [one.median_mb for one in found.memory]
    assert values == [BEFORE] * done + [NOW] * (len(QUICK) - done)
    assert f"resumed {found.machine['resumed'][0]['date']} (" in capsys.readouterr().out
    assert not so_far.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_a_resumed_run_has_its_cases_in_their_order(tmp_path: Path, processes: Processes) -> None:
    stopped = stopped_after(len(QUICK))
    lost = [stopped.times.pop(0).case, stopped.memory.pop(1).case]
    stopped.write(tmp_path / "one.so-far.json")
    run("--quick", "--resume", "--threads", 2, "--out", tmp_path / "one.json")
    assert processes.asked == lost
    found = Results.read(tmp_path / "one.json")
    assert [one.case for one in (*found.times, *found.memory)] == list(QUICK)


def test_a_run_that_is_not_resumed_measures_everything(
    tmp_path: Path, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_after(TIMED).write(tmp_path / "one.so-far.json")
    run("--quick", "--threads", 2, "--out", tmp_path / "one.json")
    assert processes.asked == list(QUICK)
    assert "resumed" not in capsys.readouterr().out


def test_what_was_measured_is_not_left_out_when_the_room_for_it_is_gone(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stopped_after(len(QUICK))
    monkeypatch.setattr(memory, "free_mb", lambda: 0.0)
    later = MemoryCase("eager", 1024)
    script.measure([*QUICK, later], found, None)
    assert list(found.left_out) == [later.name]
    assert processes.asked == []


def test_there_must_be_a_run_to_resume(
    tmp_path: Path, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"nothing to resume: there is no .*one\.so-far\.json"):
        run("--quick", "--resume", "--out", tmp_path / "one.json")
    for other in ("--only", "--draw"):
        with pytest.raises(SystemExit, match="2"):
            run(other, "512", "--resume")
        assert "leave --only and --draw out" in capsys.readouterr().err
    assert processes.asked == []


def test_a_run_of_another_kind_is_not_resumed(tmp_path: Path, processes: Processes) -> None:
    so_far = tmp_path / "one.so-far.json"
    stopped_after(2).write(so_far)
    before = so_far.read_bytes()
    with pytest.raises(SystemExit, match=f"another kind of run, with {QUICK[0].name}; give --quick as before"):
        run("--resume", "--threads", 2, "--out", tmp_path / "one.json")  # the full one
    assert so_far.read_bytes() == before
    assert processes.asked == []


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--threads", "0", "--threads is 0; it must be 1 or more"),
        ("--picture", "one.xyz", "--picture is one.xyz; its name must end in .png, .svg, .pdf"),
    ],
)
def test_misuse_is_told_before_anything_is_measured(
    option: str, value: str, said: str, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--quick", option, value)
    assert said in capsys.readouterr().err
    assert processes.asked == []


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"times": 3}'])
def test_a_file_without_numbers_cannot_be_drawn(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"one\.json can't be read as numbers of this benchmark"):
        run("--draw", path)


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


def send_each(sender: Connection, cases: list[Case], threads: int) -> None:
    for case in cases:
        sender.send((case, threads, os.getpid(), "here" in GLOBALS))


def send_one_and_die(sender: Connection, cases: list[Case], threads: int) -> None:
    sender.send(cases[0])
    os._exit(3)


def send_and_die(sender: Connection, cases: list[Case], threads: int) -> None:
    for case in cases:
        sender.send(case)
    os._exit(3)


def send_for_ever(sender: Connection, cases: list[Case], threads: int) -> None:
    sender.send(os.getpid())
    while True:
        sender.send(cases[0])


GLOBALS: set[str] = set()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_process_of_its_own_sends_for_each_case(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "GLOBALS", {"here"})
    [(first, threads, process, shared), second] = script._child(send_each, QUICK[:2], 1, fresh)
    assert (first, threads) == (QUICK[0], 1)
    assert second == (QUICK[1], 1, process, shared)
    assert process != os.getpid()
    assert shared == (script.FORKS and not fresh)


@pytest.mark.parametrize(("work", "sent"), [(send_one_and_die, 1), (send_and_die, 2)])
def test_a_process_that_fails_ends_the_run(work: Any, sent: int) -> None:
    answers = script._child(work, QUICK[:2], 1)
    assert [next(answers) for _ in range(sent)] == list(QUICK[:sent])
    with pytest.raises(SystemExit, match=f"{QUICK[1].name}: its process ended with 3.* --resume goes on"):
        next(answers)


@pytest.mark.timeout(20)
@pytest.mark.skipif(not script.FORKS, reason="what a process inherits is seen where it parts from another")
def test_a_process_ends_when_nobody_waits_for_it() -> None:
    """As when the run is killed, which then can't end its processes."""
    answers = script._child(send_for_ever, QUICK[:1], 1)
    process = next(answers)
    del answers  # and the end that reads
    while any(child.pid == process for child in multiprocessing.active_children()):
        time.sleep(0.02)


def take(megabytes: int) -> list[bytearray]:
    return [bytearray(b"1" * 1_000_000) for _ in range(megabytes)]


def grow() -> tuple[list[bytearray], list[bytearray]]:
    """40 MB of a heap, and what lies above them, so that they stay with the process when they are free."""
    take(2)  # and give it back: from now on such a size lies in the heap
    return take(40), take(2)


def send_growth(mend: Callable[[], None], sender: Connection, cases: list[Case], threads: int) -> None:
    """How far 20 MB raise the peak after 40 MB were left free, in MB."""
    left_free, above = grow()
    del left_free
    mend()
    memory.forget_peak()
    before = memory.resident_mb()
    take(20)
    sender.send(memory.peak_mb() - before)
    del above


def send_rest(mend: Callable[[], None], sender: Connection, cases: list[Case], threads: int) -> None:
    """How much of 20 MB stays with the process when they are free again, in MB."""
    below = grow()
    mend()
    before = memory.resident_mb()
    taken, above = take(20), take(2)
    del taken
    sender.send(memory.resident_mb() - before)
    del below, above


def nothing() -> None:
    pass


@pytest.mark.skipif(not memory.available(), reason="the peak is read on Linux only")
@pytest.mark.parametrize(
    ("work", "mend", "megabytes"),
    [
        (send_growth, memory.give_back, 20),
        (send_growth, nothing, 0),
        (send_rest, memory.fix_heap, 2),
        (send_rest, nothing, 22),
    ],
)
def test_a_fixed_heap_shows_what_was_taken_and_keeps_none_of_it(
    work: Any, mend: Callable[[], None], megabytes: int
) -> None:
    [found] = script._child(partial(work, mend), QUICK[:1], 1, fresh=True)  # of this process's heap, nothing is known
    assert found == pytest.approx(megabytes, abs=3)  # a part more while it is made, and pages of Python's own
