"""Time and peak memory of training on a feature store of a large model, each step in a process of its own.

    python benchmarks/training.py           # 10,000 items x 32 layers x 32 heads, k = 50; some minutes on 2 cores
    python benchmarks/training.py --quick   # 1,000 items x 8 x 8 heads, k = 10; under a minute
    python benchmarks/training.py --only paper

The store is random but for a shift in a few heads, so that there is something to find. Prints a table, and writes it
with a description of the machine as JSON. The limits are of all steps together on 2 cores, and of the largest peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
from results import Limit
from table import columns, limit_cells, other_work
from tqdm import tqdm
from training_work import STEPS, Size, make_store

HERE = Path(__file__).parent
RESULTS = HERE / "results"

FULL, QUICK = Size(10_000, 32, 32, 50), Size(1_000, 8, 8, 10)
SECONDS, PEAK_MB = Limit(480.0, at_most=True), Limit(6000.0, at_most=True)

KEY = """\
Wall seconds of each step, reading the store included, and the largest resident size of its process, the mapped part of
the store counted as far as it was read. significance: Mann-Whitney, Benjamini-Hochberg, AUROC with DeLong errors of
every head; head probes: each head's own logistic regression, five folds; lapwing, paper: the whole recipe on all
rows, whatever it chooses chosen inside."""


@dataclass(frozen=True)
class Row:
    """What one step took."""

    step: str
    seconds: float
    peak_mb: float


def main() -> None:
    arguments = _arguments()
    size = QUICK if arguments.quick else FULL
    described = machine.describe(machine.cores())
    with tempfile.TemporaryDirectory(prefix="lapwing-training-") as folder:
        store = arguments.store or Path(folder) / "store"
        if not store.exists():
            make_store(store, size)
        rows = [_measured(step, store) for step in tqdm(arguments.only or list(STEPS), unit="step", leave=False)]
    machine.finish(described)
    print(table(rows, described, size))
    if not arguments.only:
        suffix = "-quick" if arguments.quick else ""
        out = arguments.out or RESULTS / f"{machine.file_stem(machine.cores())}-training{suffix}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": described, "size": asdict(size), "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {out}", file=sys.stderr)


def _measured(step: str, store: Path) -> Row:
    command = [sys.executable, str(HERE / "training_work.py"), step, str(store)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{step} failed with {done.returncode}; what it said is above")
    return Row(step, **json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[Row], described: dict[str, Any], size: Size) -> str:
    shown = [(row.step, f"{row.seconds:.1f}", f"{row.peak_mb:,.0f}", "", "") for row in rows]
    if len(rows) == len(STEPS):
        total, peak = sum(row.seconds for row in rows), max(row.peak_mb for row in rows)
        shown.append(("all, seconds", f"{total:.1f}", "", *limit_cells(SECONDS, total, "{:.0f}")))
        shown.append(("all, MB", "", f"{peak:,.0f}", *limit_cells(PEAK_MB, peak, "{:,.0f}")))
    about = f"{size.items:,} items x {size.layers} layers x {size.heads} heads, k = {size.k}"
    head = f"{described['cpu']}, {described['cores']} cores, {described['memory_gb']} GB, {described['date']}; "
    lines = columns([("step", "seconds", "peak, MB", "limit", "met"), *shown])
    return "\n".join([head + other_work(described), about, "", *lines, "", KEY])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small store; under a minute")
    parser.add_argument(
        "--only", action="append", choices=list(STEPS), help="this step; may be repeated; writes nothing"
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="where the store is made, or lies from an earlier run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/<cpu>-<cores>-threads-training.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
