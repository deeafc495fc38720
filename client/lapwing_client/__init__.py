"""How to talk to a Lapwing server. Knows no models and no arrays: importing it loads neither torch nor numpy."""

from lapwing_client.async_client import AsyncClient
from lapwing_client.attention_stream import AsyncAttentionStream, AttentionStream
from lapwing_client.client import Client
from lapwing_client.deadline import Deadline
from lapwing_client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LapwingError,
    NotFound,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    ServerError,
    TLSError,
    TooLarge,
    Unavailable,
    Unimplemented,
)
from lapwing_client.generation_stream import AsyncGenerationStream, GenerationStream
from lapwing_client.results import (
    Activation,
    Detection,
    GeneratedToken,
    Generation,
    HeadContribution,
    Heatmap,
    Limits,
    ModelIdentity,
    Probe,
    RejectedRevision,
    ServerInfo,
    Threshold,
)
from lapwing_client.tls import TLS
from lapwing_client.values import Matrix

__all__ = [
    "TLS",
    "Activation",
    "AsyncAttentionStream",
    "AsyncClient",
    "AsyncGenerationStream",
    "AttentionStream",
    "Cancelled",
    "Client",
    "Deadline",
    "DeadlineExceeded",
    "Detection",
    "GeneratedToken",
    "Generation",
    "GenerationStream",
    "HeadContribution",
    "Heatmap",
    "InvalidRequest",
    "LapwingError",
    "Limits",
    "Matrix",
    "ModelIdentity",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "PreconditionFailed",
    "Probe",
    "RejectedRevision",
    "ServerError",
    "ServerInfo",
    "TLSError",
    "Threshold",
    "TooLarge",
    "Unavailable",
    "Unimplemented",
]
