"""Which scope each method needs.

What is not in the table may be called by nobody, and a server that has it does not start.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from lapwing_server.metrics import OTHER


class Scope(StrEnum):
    """What somebody may do."""

    PUBLIC = "public"
    """Everybody may, without a word of who they are; never granted."""

    READ = "read"
    SCORE = "score"
    ADMIN = "admin"
    """Implies all others."""


SCOPES: Final = {
    "/lapwing.v1.Detector/Score": Scope.SCORE,
    "/lapwing.v1.Detector/ScoreBatch": Scope.SCORE,
    "/lapwing.v1.Detector/Generate": Scope.SCORE,
    "/lapwing.v1.Detector/ScoreAttention": Scope.SCORE,
    "/lapwing.v1.Detector/GetServerInfo": Scope.READ,
    "/lapwing.v1.Probes/ListProbes": Scope.READ,
    "/lapwing.v1.Probes/GetProbe": Scope.READ,
    "/lapwing.v1.Probes/GetHeatmap": Scope.READ,
    "/lapwing.v1.Probes/ActivateProbe": Scope.ADMIN,
    "/lapwing.v1.Probes/ReloadProbes": Scope.ADMIN,
    "/grpc.health.v1.Health/Check": Scope.PUBLIC,
    "/grpc.health.v1.Health/List": Scope.PUBLIC,  # not in all versions of grpcio-health-checking
    "/grpc.health.v1.Health/Watch": Scope.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.PUBLIC,
    OTHER: Scope.PUBLIC,  # a method that is not there, whose only answer is UNIMPLEMENTED
}
"""By full name of the method. Written by hand: a new method is closed until somebody decides who may call it."""

PUBLIC_STREAMS: Final = frozenset(
    {"/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}
)
"""What stays open for as long as anybody likes."""

USERS: Final = frozenset({Scope.READ, Scope.SCORE})
EVERYTHING: Final = frozenset({Scope.READ, Scope.SCORE, Scope.ADMIN})


class UnlistedMethod(RuntimeError):
    """A server has a method of which the table does not say who may call it."""


def granted(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """The scopes with those that they imply."""
    scopes = frozenset(scopes)
    return EVERYTHING if Scope.ADMIN in scopes else scopes


def require_listed(methods: Iterable[str]) -> None:
    """Raises UnlistedMethod when one of the methods, by full name, is not in the table."""
    missing = sorted(set(methods) - SCOPES.keys())
    if missing:
        raise UnlistedMethod(
            f"nobody has decided who may call {', '.join(missing)}; add a line to SCOPES in {__file__}"
        )
