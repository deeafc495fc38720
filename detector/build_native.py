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
        for kind, options in native["KINDS"].items() if native["here"]() else ():
            try:
                built = native["build"](options, native["library_path"](kind))
            except native["CannotBuild"] as error:
                print(f"lapwing is installed without attention in C for {kind}: {error}", file=sys.stderr)
                continue
            build_data["artifacts"].append(f"/{built.relative_to(self.root).as_posix()}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"
