"""Builds `attention.c` beside itself, once for each kind of CPU.

Knows the standard library only, since nothing else is there while the package is being installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "attention.c"

FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fPIC", "-shared")

KINDS = {
    "avx2": ("-mavx2", "-mfma", "-DLANES=8", "-DROWS=6"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DLANES=16", "-DROWS=12"),
}
"""Of CPUs: their instructions, the floats of their registers, and of how many rows the sums fit into these."""


class CannotBuild(Exception):
    """The text says why."""


def here() -> bool:
    """Whether the libraries are for this system."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def library_path(kind: str) -> Path:
    """Where the library for a kind of CPU lies once it is built."""
    return FOLDER / f"attention_{kind}.so"


def digest(options: tuple[str, ...]) -> str:
    """Of the source and of how it is built: every library holds its own."""
    return hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS + options).encode()).hexdigest()


def build(options: tuple[str, ...], path: Path) -> Path:
    """Builds a library; it takes the place of an older one only when it is whole.

    Args:
        options: for the compiler, such as one of `KINDS`.
        path: of the library.

    Raises:
        CannotBuild: there is no compiler, or it refuses, or the folder can't be written.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [_compiler()]
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
            built = Path(folder, path.name)
            defined = f'-DBUILT_FROM="{digest(options)}"'
            command = [*compiler, *FLAGS, *options, defined, str(SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            built.replace(path)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{compiler[0]} refuses {SOURCE.name}: {error.stderr.strip()}") from None
    except OSError as error:
        raise CannotBuild(str(error)) from None
    return path


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise CannotBuild("there is no C compiler (install gcc, 9 or newer, or set CC)")
