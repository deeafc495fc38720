"""Makes the stubs of the wire from its .proto files: `python proto/generate.py`, or `--check` that they are fresh.

The version of grpcio-tools is pinned, because a stub refuses every protobuf older than the one that it was made for.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

TOOLS_VERSION = "1.76.0"
HERE = Path(__file__).resolve().parent
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(target: Path) -> None:
    """Writes the stubs of every .proto file under `target`."""
    from google.rpc import status_pb2
    from grpc_tools import protoc

    sources = sorted(path.relative_to(HERE).as_posix() for path in HERE.glob("lapwing/**/*.proto"))
    # google/protobuf comes with the tools, google/rpc with googleapis-common-protos.
    includes = [HERE, files("grpc_tools") / "_proto", Path(status_pb2.__file__).parents[2]]
    arguments = [f"-I{folder}" for folder in includes]
    arguments += [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *arguments, *sources]) != 0:
        raise SystemExit(1)


def stubs_in(folder: Path) -> dict[str, bytes]:
    """Path below `folder` and content of every stub; stubs that hold nothing but a header are stubs, too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in STUBS
        for path in sorted(folder.glob(f"lapwing/**/{pattern}"))
    }


def stale(folder: Path) -> list[str]:
    """Names of the stubs in `folder` that are missing, outdated or left over, compared with freshly made ones."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        expected, found = stubs_in(Path(fresh)), stubs_in(folder)
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def main(arguments: list[str]) -> int:
    """0 well, 1 stale, 2 misused."""
    if version("grpcio-tools") != TOOLS_VERSION:
        print(
            f"grpcio-tools is {version('grpcio-tools')}, the stubs are made with {TOOLS_VERSION}; "
            f"pip install grpcio-tools=={TOOLS_VERSION}",
            file=sys.stderr,
        )
        return 2
    if arguments == ["--check"]:
        names = stale(HERE)
        for name in names:
            print(f"stale: proto/{name}; run: make proto", file=sys.stderr)
        return 1 if names else 0
    if arguments:
        print(f"unknown arguments {arguments}; usage: python proto/generate.py [--check]", file=sys.stderr)
        return 2
    generate(HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
