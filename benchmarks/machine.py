"""The machine that a benchmark ran on, in words and numbers."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def describe(threads: int) -> dict[str, object]:
    """JSON-ready. `load` is the work of other processes when the benchmark began: above 0 it disturbs."""
    import torch

    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "caches": _caches(),
        "cores": cores(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def file_stem(threads: int) -> str:
    """Name of the results of this machine, such as `amd-epyc-2-threads`."""
    words = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", "", cpu_name(), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f"-{threads}-threads"


def _caches() -> dict[str, str]:
    """Sizes of the caches of data of the first core, such as `{"L2": "1024K"}`."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            found[f"L{(cache / 'level').read_text().strip()}"] = (cache / "size").read_text().strip()
    return found
