"""`python -m lapwing_detector.native` builds the libraries, where the installation found no compiler."""

from __future__ import annotations

import platform
import sys

from lapwing_detector.native.build import BUILDS, CannotBuild, build, here


def main() -> int:
    """Builds all of them and says which; exit status 1 if one can't be built."""
    if not here():
        print(f"nothing to build: for Linux on x86_64 only, not {platform.system()} on {platform.machine()}")
        return 1
    try:
        for kind in BUILDS:
            print(build(kind))
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    return 0


sys.exit(main())
