"""Has hatchling build what is in C when the package is installed; without a compiler it is installed without."""

from __future__ import annotations

import platform
import runpy
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("detector", "lapwing_detector", "native", "build.py")


class NativeBuild(BuildHookInterface[Any]):
    """Puts the libraries beside their source, from where an editable installation loads them, too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files of the package."""
        native = runpy.run_path(str(Path(self.root) / BUILD))  # the package itself can't be imported yet
        if not native["here"]():
            return
        try:
            built = [native["build"](kind) for kind in native["BUILDS"]]
        except native["CannotBuild"] as error:
            print(f"lapwing is installed without attention in C, which is faster: {error}", file=sys.stderr)
            return
        build_data["artifacts"] += [f"/{path.relative_to(self.root).as_posix()}" for path in built]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
