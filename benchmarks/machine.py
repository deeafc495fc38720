"""The machine that a benchmark ran on, in words and numbers, and what else it had to do meanwhile."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

BUSY = 0.2
"""Cores kept busy by other work, above which the table is not to be believed: 2 threads that wait for a third lose far
more than its share, and the way with more parallel sections loses more (at 512 tokens 1.2 became 2.3 on 2 busy
cores)."""

SAMPLE_SECONDS = 0.5


def describe(threads: int) -> dict[str, Any]:
    """JSON-ready; warns where other work runs beside. `finish` adds how it was at the end."""
    import torch

    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "caches": _caches(),
        "cores": cores(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "busy_at_start": _watch("at the start"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def finish(described: dict[str, Any]) -> None:
    """Add the work of others when all is measured; warns as `describe` does."""
    described["busy_at_end"] = _watch("at the end")


def busy_cores() -> float | None:
    """How many of this process's cores others keep busy, seen while it sleeps; None where the system does not tell.

    The load average would not do: it holds what this process itself did in the last minutes.
    """
    before = _ticks()
    time.sleep(SAMPLE_SECONDS)
    after = _ticks()
    spent = [(later[0] - one[0], later[1] - one[1]) for one, later in zip(before, after, strict=True)]
    if not spent or any(total <= 0 for _, total in spent):
        return None
    return round(sum(1 - idle / total for idle, total in spent), 2)


def _watch(when: str) -> float | None:
    busy = busy_cores()
    if busy is not None and busy > BUSY:
        print(
            f"{when} other work keeps {busy} cores busy (at most {BUSY} should be), which bends the ratios as well; "
            "stop it and measure again",
            file=sys.stderr,
        )
    return busy


def _ticks() -> list[tuple[int, int]]:
    """Idle and total time of each core that this process may use, since the system started."""
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return []
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in stat.read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal; the two for guests are part of user and nice.
    counts = [[int(count) for count in line[1:9]] for line in lines if line and line[0] in mine]
    return [(sum(count[3:5]), sum(count)) for count in counts]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def file_stem(threads: int) -> str:
    """Name of the results of this machine, such as `amd-epyc-avx512-2-threads`.

    Several kinds of a CPU may call themselves the same, with vectors of other widths.
    """
    import torch

    words = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", "", cpu_name(), flags=re.IGNORECASE)
    return f"{stem(f'{words} {torch.backends.cpu.get_cpu_capability()}')}-{threads}-threads"


def stem(words: str) -> str:
    """As the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _caches() -> dict[str, str]:
    """Sizes of the caches of data of the first core, such as `{"L2": "1024K"}`."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            found[f"L{(cache / 'level').read_text().strip()}"] = (cache / "size").read_text().strip()
    return found
