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

BUILDS = {
    "avx2": ("-mavx2", "-mfma", "-DLANES=8", "-DROWS=6"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DLANES=16", "-DROWS=12"),
}
"""By kind of CPU: its instructions, the floats of its registers, and of how many rows the sums fit into them."""


class CannotBuild(Exception):
    """The text says why."""


def library_path(kind: str) -> Path:
    """Where the library for a kind of CPU lies once it is built."""
    return FOLDER / f"attention_{kind}.so"


def here() -> bool:
    """Whether the libraries are for this system."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def digest() -> str:
    """Of the source: every library holds the one that it was built from."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def build(kind: str, path: Path | None = None, flags: tuple[str, ...] | None = None) -> Path:
    """Builds the library for a kind of CPU; it takes the place of an older one only when it is whole.

    Raises:
        CannotBuild: there is no compiler, or it refuses.
    """
    path = path or library_path(kind)
    compiler = shlex.split(os.environ.get("CC", "")) or [_compiler()]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        built = Path(folder, path.name)
        options = (*FLAGS, *(BUILDS[kind] if flags is None else flags), f'-DBUILT_FROM="{digest()}"')
        try:
            subprocess.run(
                [*compiler, *options, str(SOURCE), "-o", str(built), "-lm"], check=True, capture_output=True, text=True
            )
        except OSError as error:
            raise CannotBuild(f"{compiler[0]} does not start: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            raise CannotBuild(f"{compiler[0]} refuses {SOURCE.name}: {error.stderr.strip()}") from None
        built.replace(path)
    return path


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise CannotBuild("there is no C compiler (install gcc, or set CC)")
