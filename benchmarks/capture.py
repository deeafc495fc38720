"""Time and memory of plain SDPA, of the same with attention captured, and of the eager route, side by side.

    python benchmarks/capture.py                        # everything; an hour on 2 cores, two where bfloat16 is slow
    python benchmarks/capture.py --quick                # about a minute
    python benchmarks/capture.py --only 'prefill 4096'  # the cases whose names hold these words; --list shows them
    python benchmarks/capture.py --draw RESULTS.json    # table and picture of an earlier run

Prints one table. The full and the quick run also write their numbers, with a description of the machine, as JSON, the
full one a picture of time and memory over the length as well. Each machine and number of threads has one file, which
the next run replaces; --out keeps another. While it runs, what was measured is in a file beside it (`.so-far.json`).
Compare ratios, not seconds, between machines, and leave the machine alone meanwhile: the table says how much other work
it had at the start and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import memory
import picture
from cases import FULL, QUICK, Case, MemoryCase, TimeCase, maps_mb
from results import MemoryResult, Results, TimeResult
from table import table
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def main() -> None:
    arguments = _arguments()
    cases = chosen(QUICK if arguments.quick else FULL, arguments.only)
    if arguments.list:
        print(*(case.name for case in cases), sep="\n")
        return
    if arguments.draw:
        results = Results.read(arguments.draw)
    else:
        results = measure(cases, arguments.threads, arguments.quick, _so_far(_out(arguments)))
    print(table(results))
    _keep(results, arguments)


def chosen(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """The cases that hold all words of one of the texts in `only`; all of them if it is empty.

    Raises:
        SystemExit: there are none.
    """
    found = [case for case in cases if not only or any(set(text.split()) <= set(case.name.split()) for text in only)]
    if not found:
        sys.exit(f"no case is called {' or '.join(map(repr, only))}; --list shows the names")
    return found


def measure(cases: Sequence[Case], threads: int, quick: bool, so_far: Path | None) -> Results:
    """Run the cases in processes of their own, the times first: those in one process, model and all.

    What was measured `so_far` is in that file, if there is to be one, should the rest never come.
    """
    results = Results(machine.describe(threads), quick)
    results.left_out = {case.name: reason for case in cases if (reason := _impossible(case))}
    cases = [case for case in cases if case.name not in results.left_out]
    # float32 first: the model is rounded to bfloat16 in place.
    timed = sorted((case for case in cases if isinstance(case, TimeCase)), key=lambda case: case.dtype != "float32")
    with tqdm(total=len(cases), unit="case", file=sys.stderr, leave=False) as progress:
        answers = _child("timing.py", timed, threads) if timed else iter(())
        for case in timed:
            progress.set_description(case.name)
            results.times.append(TimeResult(case, next(answers)["seconds"]))
            _write(results, so_far)
            progress.update()
        assert next(answers, None) is None  # and its process has ended, which would count as other work below
        forwards = [case for case in cases if isinstance(case, MemoryCase)]
        forwards.sort(key=lambda case: case.heap != "fixed")
        answers = _peaks(forwards, threads)
        for forward in forwards:
            progress.set_description(forward.name)
            peaks = [next(answers)["peak_mb"] for _ in range(forward.processes)]
            results.memory.append(MemoryResult(forward, peaks))
            _write(results, so_far)
            progress.update()
        assert next(answers, None) is None
    machine.finish(results.machine)
    return results


def _peaks(forwards: Sequence[MemoryCase], threads: int) -> Iterator[dict[str, Any]]:
    """Of every process, those with the fixed heap first: these part from one that has loaded all code.

    With glibc's own threshold the peak depends on where things lie, which such processes would have in common.
    """
    alike = [case for case in forwards if case.heap == "fixed"]
    if alike:
        yield from _child("memory.py", alike, threads)
    for case in forwards:
        for _ in range(case.processes if case.heap == "glibc" else 0):
            yield from _child("memory.py", [case], threads)


def _impossible(case: Case) -> str:
    """Why this machine can't run the case; empty if it can."""
    if not memory.available():
        return f"the peak can't be read on {sys.platform}" if isinstance(case, MemoryCase) else ""
    ways = case.ways if isinstance(case, TimeCase) else (case.way,)
    needed = 1.2 * maps_mb(case.tokens) + 2000  # the model, and what one layer adds while it computes
    if "eager" in ways and needed > memory.free_mb():
        return f"it needs about {needed / 1e3:.0f} GB of memory, {memory.free_mb() / 1e3:.0f} are free"
    return ""


def _child(script: str, cases: Sequence[Case], threads: int) -> Iterator[dict[str, Any]]:
    """What the script answers to each case, in a process of its own."""
    heap = cases[0].heap if isinstance(cases[0], MemoryCase) else "glibc"
    environment = os.environ | memory.HEAPS[heap] | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE / script), str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        json.dump([asdict(case) for case in cases], process.stdin)
        process.stdin.close()
        yield from map(json.loads, process.stdout)
    if process.returncode != 0:
        sys.exit(f"{script} failed with {process.returncode}; what it said is above")


def _out(arguments: argparse.Namespace) -> Path | None:
    """The file of this run's numbers, if they are to be kept."""
    if arguments.out or arguments.only or arguments.draw:
        out: Path | None = arguments.out
        return out
    suffix = "-quick" if arguments.quick else ""
    return RESULTS / f"{machine.file_stem(arguments.threads)}{suffix}.json"


def _so_far(out: Path | None) -> Path | None:
    return out and out.with_suffix(".so-far.json")


def _write(results: Results, path: Path | None) -> None:
    if path:
        results.write(path)


def _keep(results: Results, arguments: argparse.Namespace) -> None:
    whole = not arguments.only and not arguments.draw
    out = _out(arguments)
    # A quick run has too few lengths for a picture, unless one is asked for.
    drawn = arguments.picture or ((whole or arguments.draw) and not results.quick and RESULTS / "capture.png")
    _write(results, out)
    if not arguments.draw and (so_far := _so_far(out)):
        so_far.unlink(missing_ok=True)
    if drawn and not (results.times and results.memory):
        sys.exit("no picture: it shows times and memory, and these results lack one of them")
    if drawn:
        picture.save(results, drawn)
    for path in (out, drawn):
        if path:
            print(f"wrote {path}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer lengths and repetitions, no bfloat16; about a minute on 2 cores"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="only cases whose names hold all of these words, such as time, memory, 'decode float32'; may be "
        "repeated; writes no files unless --out or --picture is given",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and measure nothing")
    parser.add_argument("--threads", type=int, default=min(2, machine.cores()), help="of torch (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="numbers (default: benchmarks/results/<cpu>-<threads>-threads.json, which the next run replaces)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="default: benchmarks/results/capture.png")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="measure nothing; show what was measured before")
    return parser.parse_args()


if __name__ == "__main__":
    main()
