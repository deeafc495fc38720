"""What the benchmarks say of numbers that were measured. Nothing is measured here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts that import one another, no package

import capture as script
import machine
import memory
from cases import FULL, HEADS, LAYERS, QUICK, MemoryCase, TimeCase, extra_mb_at_most
from results import Limit, MemoryResult, Results, TimeResult, middle_half, ratio_of_medians
from table import table

MACHINE = {
    **{"cpu": "a", "capability": "b", "threads": 2, "cores": 2, "memory_gb": 8.0, "torch": "c"},
    **{"transformers": "d", "date": "e", "busy_at_start": 0.0, "busy_at_end": 0.75},
}
PREFILL = TimeCase("prefill", 2048, at_most=1.03)


def timed(ratios: list[float], case: TimeCase = PREFILL) -> TimeResult:
    first, second = case.ways
    return TimeResult(case, {first: ratios, second: [1.0] * len(ratios)})


def peaks(way: Any, mb: float, tokens: int = 4096, **options: Any) -> MemoryResult:
    return MemoryResult(MemoryCase(way, tokens, **options), [mb])


def results(*found: TimeResult | MemoryResult) -> Results:
    times = [one for one in found if isinstance(one, TimeResult)]
    return Results(MACHINE, False, times, [one for one in found if isinstance(one, MemoryResult)])


@pytest.mark.parametrize(
    ("measured", "middle", "at_most", "at_least"),
    [
        (1.02, None, "yes", "NO"),
        (1.04, None, "NO", "yes"),
        (1.03, None, "yes", "yes"),  # the limit itself is met
        (1.02, (1.00, 1.025), "yes", "NO"),
        (1.02, (1.00, 1.05), "yes?", "NO?"),
        (1.04, (1.00, 1.05), "NO?", "yes?"),
        (1.04, (1.035, 1.05), "NO", "yes"),
        (1.02, (1.00, 1.03), "yes", "NO"),  # at the edge is not within
    ],
)
def test_a_verdict_is_uncertain_only_where_the_middle_half_holds_the_limit(
    measured: float, middle: tuple[float, float] | None, at_most: str, at_least: str
) -> None:
    assert Limit(1.03, at_most=True).verdict(measured, middle) == at_most
    assert Limit(1.03, at_most=False).verdict(measured, middle) == at_least


def test_the_ratio_is_of_the_medians_and_the_middle_half_of_each_turn() -> None:
    first, second = [1.0, 2.0, 3.0, 4.0, 100.0], [1.0, 1.0, 2.0, 2.0, 2.0]
    assert ratio_of_medians(first, second) == 1.5
    assert middle_half(first, second) == (1.5, 2.0)  # of 1, 1.5, 2, 2, 50
    assert timed(first).ratio == 3.0
    with pytest.raises(ValueError, match="zip"):  # a turn that lacks its other half
        middle_half(first, second[:-1])


def met(found: Results) -> list[bool | None]:
    return [None if one.limit is None else one.limit.met_by(one.value) for one in found.comparisons()]


def test_extra_memory_is_two_float32_for_each_layer_head_and_token_and_64_mb() -> None:
    assert extra_mb_at_most(4096) == LAYERS * HEADS * 4096 * 2 * 4 / 1e6 + 64
    most = extra_mb_at_most(4096)
    assert met(results(peaks("sdpa", 200), peaks("ours", 200 + most - 0.1))) == [True]
    assert met(results(peaks("sdpa", 200), peaks("ours", 200 + most + 0.1))) == [False]


def test_the_eager_peak_is_held_against_ours_at_the_length_of_the_claim_alone() -> None:
    assert met(results(peaks("eager", 2000), peaks("ours", 100))) == [True]
    assert met(results(peaks("eager", 1999), peaks("ours", 100))) == [False]
    assert met(results(peaks("eager", 1999, 2048), peaks("ours", 100, 2048))) == [None]


def test_only_the_same_forward_is_compared() -> None:
    ours = peaks("ours", 100)
    for other in ({"tokens": 2048}, {"dtype": "bfloat16"}, {"heap": "glibc"}):
        assert results(ours, peaks("sdpa", 90, **other)).comparisons() == []
    for same in ({}, {"dtype": "bfloat16"}, {"heap": "glibc"}):
        [one] = results(peaks("ours", 100, **same), peaks("sdpa", 90, **same)).comparisons()
        assert one.value == 10
        assert (one.limit is None) == (same == {"heap": "glibc"})  # whose peak is another one from run to run


def test_the_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    eager = timed([5.0, 5.5], TimeCase("prefill", 2048, ("eager", "ours"), dtype="bfloat16", at_least=4.5))
    written = results(timed([1.0, 1.5]), eager, peaks("ours", 100, dtype="bfloat16"), peaks("sdpa", 90, heap="glibc"))
    written.left_out = {"memory 4096 eager": "it needs more"}
    written.write(tmp_path / "deep" / "one.json")
    read = Results.read(tmp_path / "deep" / "one.json")
    assert read == written
    assert table(read) == table(written)
    assert replace(read, quick=True) != written


def test_the_table_says_what_is_met_and_what_other_work_there_was() -> None:
    lines = table(results(timed([1.0] * 3), timed([1.2] * 3), timed([1.0, 1.02, 1.2]))).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("time prefill")] == ["yes", "NO", "yes?"]
    assert "other work: 0.0 at the start, 0.75 at the end" in lines[0]


def test_a_case_that_has_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: True)
    monkeypatch.setattr(memory, "free_mb", lambda: 17_000.0)
    maps, none = MemoryCase("eager", 4096), MemoryCase("ours", 4096)  # 12.9 GB of maps, and room to compute
    assert "17 are free" in script._impossible(maps)
    assert script._impossible(TimeCase("prefill", 4096, ("eager", "ours")))
    assert not script._impossible(none)
    monkeypatch.setattr(memory, "free_mb", lambda: 18_000.0)
    assert not script._impossible(maps)
    monkeypatch.setattr(memory, "available", lambda: False)  # another system: times alone
    assert script._impossible(none)
    assert not script._impossible(PREFILL)


def test_names_are_those_of_one_case() -> None:
    for cases in (FULL, QUICK):
        assert len({case.name for case in cases}) == len(cases)
    assert [case.name for case in script.chosen(FULL, ["bfloat16 memory"])] == [
        "memory 2048 sdpa bfloat16",
        "memory 2048 ours bfloat16",
    ]
    with pytest.raises(SystemExit, match="no case"):
        script.chosen(FULL, ["prefill 7"])


def test_what_is_claimed_is_measured_in_both_dtypes_and_often_enough() -> None:
    limited = [case for case in FULL + QUICK if isinstance(case, TimeCase) and (case.at_most or case.at_least)]
    assert all(case.repetitions >= 7 for case in limited)
    claims = {case for case in limited if case in FULL and case.ways == ("ours", "sdpa")}
    assert {replace(case, dtype="bfloat16") for case in claims if case.dtype == "float32"} == {
        case for case in claims if case.dtype == "bfloat16"
    }
    assert len(claims) == 18


@pytest.mark.parametrize(("others", "busy"), [(0, 0.0), (25, 1.0), (50, 2.0)])
def test_other_work_is_what_two_cores_did_while_this_process_slept(
    monkeypatch: pytest.MonkeyPatch, others: int, busy: float
) -> None:
    # Idle and total ticks of each core.
    ticks = iter([[(1000, 5000), (2000, 5000)], [(1050 - others, 5050), (2050 - others, 5050)]])
    monkeypatch.setattr(machine, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(machine, "SAMPLE_SECONDS", 0.0)
    assert machine.busy_cores() == busy


def test_busy_cores_are_told_of_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for busy in (None, machine.BUSY, machine.BUSY + 0.01):  # unknown, at the limit, above it
        monkeypatch.setattr(machine, "busy_cores", lambda busy=busy: busy)
        described: dict[str, Any] = {}
        machine.finish(described)
        assert described == {"busy_at_end": busy}
        said.append("other work" in capsys.readouterr().err)
    assert said == [False, False, True]
