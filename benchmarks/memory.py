"""Peak memory of one forward above the loaded model: MemoryCases as JSON on standard input, a line of JSON for each.

Each is measured in a process of its own, in which nothing ran before. Linux only: the peak is read from /proc, where it
can be reset.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback

from cases import MemoryCase

# An allocation of at least this size gets pages of its own, which go back to the system when it is freed. Without
# the setting glibc raises the threshold up to 32 MB as the program frees larger ones; from then on tensors below it
# share a heap with holes, and the peak says where the holes happened to be. Seen of one forward of 2,048 tokens on
# 2 cores, in fresh processes: SDPA 167 to 209 MB and captured 176 to 315 MB so, 139 and 142 MB with the setting, each
# time within 1 MB. So every way is measured with it, which tells what the way needs; the median of three processes
# without it is shown beside, which tells what a process may grow to.
HEAPS: dict[str, dict[str, str]] = {"fixed": {"MALLOC_MMAP_THRESHOLD_": "131072"}, "glibc": {}}


def available() -> bool:
    """Whether this system lets the peak be read and reset."""
    return sys.platform == "linux"


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


def main() -> None:
    import workload  # noqa: F401  takes most of the time, and is no part of a forward: once, before the processes part

    for fields in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps({"peak_mb": _peak_of(MemoryCase(**fields), int(sys.argv[1]))}), flush=True)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        if ended:
            sys.exit(f"{MemoryCase(**fields).name} ended with {os.waitstatus_to_exitcode(ended)}")


def _peak_of(case: MemoryCase, threads: int) -> float:
    import torch
    from workload import make_inputs, make_model, run

    torch.set_num_threads(threads)
    model, inputs = make_model().to(getattr(torch, case.dtype)), make_inputs("prefill", case.tokens)
    # Code is loaded when it is first run: no part of the forward.
    run(model, case.way, "prefill", make_inputs("prefill", 32))
    forget_peak()
    before = resident_mb()
    run(model, case.way, "prefill", inputs)
    return peak_mb() - before


if __name__ == "__main__":
    main()
