"""Time and memory of plain SDPA, of the same with attention captured, and of the eager route, side by side.

    python benchmarks/capture.py                        # everything; an hour on 2 cores, two where bfloat16 is slow
    python benchmarks/capture.py --quick                # under a minute
    python benchmarks/capture.py --only 'prefill 4096'  # the cases whose names hold these words; --list shows them
    python benchmarks/capture.py --resume               # go on where the last run was stopped
    python benchmarks/capture.py --draw RESULTS.json    # table and picture of an earlier run

Prints one table. The full and the quick run also write their numbers, with a description of the machine, as JSON, the
full one a picture of time and memory over the length as well. Each machine and number of threads has one file, which
the next run replaces; --out keeps another. While it runs, what was measured is in a file beside it (`.so-far.json`).
Compare ratios, not seconds, between machines, and leave the machine alone meanwhile: the table says how much other work
it had at the start and at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine
import memory
import picture
from cases import FULL, QUICK, Case, MemoryCase, TimeCase, maps_mb
from results import MemoryResult, Results, TimeResult
from table import table
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
FORKS = sys.platform == "linux"
PICTURES = (".png", ".svg", ".pdf")
SAME_MACHINE = ("cpu", "capability", "threads", "torch", "transformers")
"""What must not differ between the parts of a run that was stopped and resumed."""


def main() -> None:
    arguments = _arguments()
    cases = chosen(QUICK if arguments.quick else FULL, arguments.only)
    if arguments.list:
        print(*(case.name for case in cases), sep="\n")
        return
    if arguments.draw:
        results = _read(arguments.draw)
    else:
        so_far = _so_far(_out(arguments))
        results = _begun(arguments, cases, so_far)
        measure(cases, results, so_far)
        results.sort(cases)
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


def measure(cases: Sequence[Case], results: Results, so_far: Path | None) -> None:
    """Run the cases that the results lack in processes of their own, the times first: those in one process.

    What was measured `so_far` is in that file, if there is to be one, should the rest never come.
    """
    done = {one.case for one in (*results.times, *results.memory)}
    cases = [case for case in cases if case not in done]
    results.left_out = {case.name: reason for case in cases if (reason := _impossible(case))}
    cases = [case for case in cases if case.name not in results.left_out]
    # float32 first: the model is rounded to bfloat16 in place.
    timed = sorted((case for case in cases if isinstance(case, TimeCase)), key=lambda case: case.dtype != "float32")
    threads = results.machine["threads"]
    tqdm.monitor_interval = 0  # it would start a thread, and processes part from this one
    with tqdm(total=len(cases), unit="case", file=sys.stderr, leave=False, desc="code and model") as progress:
        import timing
        import workload

        if FORKS and any(not _fresh(case) for case in cases):
            workload.prepare()
        answers = _child(timing.send_seconds, timed, threads) if timed else iter(())
        for case in timed:
            progress.set_description(case.name)
            results.times.append(TimeResult(case, next(answers)))
            _write(results, so_far)
            progress.update()
        assert next(answers, None) is None  # and its process has ended, which would count as other work below
        for forward in cases:
            if isinstance(forward, MemoryCase):
                progress.set_description(forward.name)
                results.memory.append(MemoryResult(forward, _peaks(forward, threads)))
                _write(results, so_far)
                progress.update()
    machine.finish(results.machine)


def _peaks(case: MemoryCase, threads: int) -> list[float]:
    """Of every process."""
    return [peak for _ in range(case.processes) for peak in _child(memory.send_peak, [case], threads, _fresh(case))]


def _fresh(case: Case) -> bool:
    """Whether it needs a process that loads all code itself.

    With glibc's own threshold the peak depends on where things lie, which those that part from this one would share.
    """
    return isinstance(case, MemoryCase) and case.heap == "glibc"


def _impossible(case: Case) -> str:
    """Why this machine can't run the case; empty if it can."""
    if not memory.available():
        return f"the peak can't be read on {sys.platform}" if isinstance(case, MemoryCase) else ""
    ways = case.ways if isinstance(case, TimeCase) else (case.way,)
    needed = 1.2 * maps_mb(case.tokens) + 2000  # the model, and what one layer adds while it computes
    if "eager" in ways and needed > memory.free_mb():
        return f"it needs about {needed / 1e3:.0f} GB of memory, {memory.free_mb() / 1e3:.0f} are free"
    return ""


def _child(
    work: Callable[[Connection, Sequence[Any], int], None], cases: Sequence[Case], threads: int, fresh: bool = False
) -> Iterator[Any]:
    """What the work sends for each case, from a process of its own.

    Unless that is to be `fresh`, it parts from this one where the system lets it, with the code and the model it has.
    """
    context = multiprocessing.get_context("fork" if FORKS and not fresh else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, receiver, sender, cases, threads), daemon=True)
    process.start()
    sender.close()
    sent = 0
    try:
        while sent < len(cases):
            yield receiver.recv()
            sent += 1
    except EOFError:
        pass
    process.join()
    if process.exitcode:
        case = cases[min(sent, len(cases) - 1)]
        sys.exit(
            f"{case.name}: its process ended with {process.exitcode} (what it said is above; -9 may be for want of "
            "memory); when that is mended, --resume goes on with a full or a quick run"
        )


def _work(
    work: Callable[[Connection, Sequence[Any], int], None],
    receiver: Connection,
    sender: Connection,
    cases: Sequence[Case],
    threads: int,
) -> None:
    """In a process of its own, which ends when the one that waits for it is gone."""
    receiver.close()  # or what is sent would have a reader for ever, this one
    work(sender, cases, threads)


def _begun(arguments: argparse.Namespace, cases: Sequence[Case], so_far: Path | None) -> Results:
    """Results without numbers, or those of the run that is resumed."""
    described = machine.describe(arguments.threads)
    if not arguments.resume:
        return Results(described, arguments.quick)
    if so_far is None or not so_far.exists():
        sys.exit(f"nothing to resume: there is no {so_far}")
    results = _read(so_far)
    if foreign := [one.case.name for one in (*results.times, *results.memory) if one.case not in cases]:
        sys.exit(f"{so_far} is of another kind of run, with {foreign[0]}; give --quick as before, or measure anew")
    for name in SAME_MACHINE:
        if results.machine[name] != described[name]:
            sys.exit(f"{so_far} is of {name} {results.machine[name]}, here it is {described[name]}; measure anew")
    resumed = {name: described[name] for name in ("date", "busy_at_start")}
    results.machine.setdefault("resumed", []).append(resumed)
    return results


def _read(path: Path) -> Results:
    try:
        return Results.read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"{path} can't be read as numbers of this benchmark: {type(error).__name__}: {error}")


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
        "--quick", action="store_true", help="fewer lengths and repetitions, no bfloat16; under a minute on 2 cores"
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="measure what a stopped run with the same --quick, --threads and --out has not, and keep what it has; "
        "not with --only",
    )
    parser.add_argument("--threads", type=int, default=min(2, machine.cores()), help="of torch (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="numbers (default: benchmarks/results/<cpu>-<threads>-threads.json, which the next run replaces)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="default: benchmarks/results/capture.png")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="measure nothing; show what was measured before")
    arguments = parser.parse_args()
    if arguments.resume and (arguments.only or arguments.draw):
        parser.error("--resume goes on with a full or a quick run; leave --only and --draw out")
    if arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}; it must be 1 or more")
    if arguments.picture and arguments.picture.suffix not in PICTURES:
        parser.error(f"--picture is {arguments.picture}; its name must end in {', '.join(PICTURES)}")
    return arguments


if __name__ == "__main__":
    main()
