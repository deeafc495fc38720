"""Peak memory of one forward above the loaded model. Linux only: the peak is read from /proc, where it can be reset."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from cases import MemoryCase

# An allocation of at least this size gets pages of its own, which go back to the system when it is freed. Without
# the setting glibc raises the threshold up to 32 MB as the program frees larger ones; from then on tensors below it
# share a heap with holes, and the peak says where the holes happened to be. Seen of one forward of 2,048 tokens on
# 2 cores, in fresh processes: SDPA 167 to 209 MB and captured 176 to 315 MB so, 139 and 142 MB with the setting, each
# time within 1 MB. So every way is measured with it, which tells what the way needs; the median of three processes
# without it, which load all code themselves, is shown beside and tells what a process may grow to.
MMAP_THRESHOLD = 131072

# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def available() -> bool:
    """Whether this system lets the peak be read and reset, and the heap be fixed."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def free_mb() -> float:
    """Memory that a new process could take, in MB."""
    with open("/proc/meminfo") as meminfo:
        kilobytes = next(line.split()[1] for line in meminfo if line.startswith("MemAvailable"))
    return int(kilobytes) * 1024 / 1e6


def resident_mb() -> float:
    """Resident size of this process now, in MB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e6


def forget_peak() -> None:
    """Let the peak start from now: that of loading the model may be higher than that of the forward."""
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


def peak_mb() -> float:
    """Largest resident size of this process since `forget_peak`, in MB."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6


def fix_heap() -> None:
    """Give up the threshold that has grown."""
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if libc.mallopt(parameter, MMAP_THRESHOLD) != 1:
            raise OSError(f"mallopt refused {MMAP_THRESHOLD} for parameter {parameter}; peaks need glibc's")


def give_back() -> None:
    """To the system what was left free within the heap, which a forward could take unseen."""
    ctypes.CDLL(None).malloc_trim(0)


def send_peak(sender: Connection, cases: Sequence[MemoryCase], threads: int) -> None:
    """Send the peak of the only case. For a process of its own, in which no forward ran before."""
    [case] = cases
    if case.heap == "fixed":
        fix_heap()
    sender.send(_peak(case, threads))


def _peak(case: MemoryCase, threads: int) -> float:
    import torch
    import workload

    torch.set_num_threads(threads)
    model, inputs = workload.make_model().to(getattr(torch, case.dtype)), workload.make_inputs("prefill", case.tokens)
    # Code is loaded when it is first run: no part of the forward.
    workload.run(model, case.way, "prefill", workload.make_inputs("prefill", 32))
    if case.heap == "fixed":
        give_back()
    forget_peak()
    before = resident_mb()
    workload.run(model, case.way, "prefill", inputs)
    return peak_mb() - before
