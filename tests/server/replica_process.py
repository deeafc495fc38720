"""A process of a replica: `lapwing serve`, in a fork of a process that has imported all that takes long.

Each is a process of its own, which loads the model anew; without this, most of its start were imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess

IMPORTED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "lapwing_detector.detector",
    "lapwing_detector.pictures",
    "lapwing_server.cli",
]


def started(port: int) -> ForkServerProcess:
    """A new process that serves the embedded model on the port."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=serve, args=(port,))
    process.start()
    return process


def serve(port: int) -> None:
    """Ends with the command's exit code."""
    import torch

    from lapwing_client.cli import main

    os.environ["OMP_NUM_THREADS"] = "1"  # else the server takes all cores, which replicas and clients share
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.exit(main(["serve", "--port", str(port)]))
