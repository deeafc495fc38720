"""What GetServerInfo answers. It is asked for all the time and seldom changes, so it is made only when it does."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

from lapwing.v1 import detector_pb2
from lapwing_server import answers
from lapwing_server.readiness import Readiness


class Information:
    """The answer, as it stands."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._made_of: tuple[str, ...] = ()
        self._message = detector_pb2.GetServerInfoResponse()

    def message(self) -> detector_pb2.GetServerInfoResponse:
        """What runs here, or why it does not; not to be changed."""
        readiness, loaded = self._readiness, self._readiness.loaded_or_none
        # The model stays what it is once it is loaded; of the shelf only the active probe is told.
        probe = (loaded.shelf.active.name, loaded.shelf.active.revision) if loaded else ()
        made_of = (readiness.phase.value, readiness.message, *probe)
        if made_of != self._made_of:
            self._made_of, self._message = made_of, make(readiness)
        return self._message


def make(readiness: Readiness) -> detector_pb2.GetServerInfoResponse:
    """The answer anew."""
    info = detector_pb2.GetServerInfoResponse(
        version=version_of("lapwing"),
        state=f"SERVER_STATE_{readiness.phase.value}",
        message=readiness.message,
        limits=answers.limits_message(readiness.limits),
        library_versions={"python": platform.python_version()}
        | {name: version_of(name) for name in ("grpcio", "torch", "transformers")},
    )
    if (loaded := readiness.loaded_or_none) is not None:
        identity = answers.identity_message(loaded.engine.identity)
        info.model.CopyFrom(detector_pb2.ModelInfo(identity=identity, max_tokens=loaded.engine.max_tokens))
        info.probe_name, info.probe_revision = loaded.shelf.active.name, loaded.shelf.active.revision
    return info


@cache
def version_of(distribution: str) -> str:
    """Its version, without importing it; empty when it is not installed. Finding it takes milliseconds."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
