"""What holds for every test: no network, no clock, and few threads, since several processes share the cores."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test says how long anything takes, on a busy machine least of all.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
