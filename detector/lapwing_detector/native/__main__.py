"""`python -m lapwing_detector.native` builds the libraries, where the installation found no compiler."""

from __future__ import annotations

import platform
import sys

from lapwing_detector.native.build import KINDS, CannotBuild, build, here, library_path


def main() -> int:
    """Builds all of them and says which; exit status 1 if one can't be built."""
    if not here():
        print(f"nothing to build: for Linux on x86_64 only, not {platform.system()} on {platform.machine()}")
        return 1
    failed = False
    for kind, options in KINDS.items():
        try:
            print(build(options, library_path(kind)))
        except CannotBuild as error:
            print(f"{kind}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
