"""How to serve: every setting with its default.

Knows nothing of flags, variables and files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lapwing_server.addresses import bracketed
from lapwing_server.contradictions import Contradictions, contradictions
from lapwing_server.limits import Count, Limits, no_truth


def existing(path: Path) -> Path:
    """The path, at which there is something."""
    if not os.path.exists(path):
        raise ValueError("there is no such file or directory")
    return path


def readable(path: Path) -> Path:
    """The path of a file."""
    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    return path


Port = Annotated[int, BeforeValidator(no_truth), Field(ge=0, le=65535)]
Rate = Annotated[float, BeforeValidator(no_truth), Field(gt=0, le=1e6, allow_inf_nan=False)]
Keepalive = Annotated[float, BeforeValidator(no_truth), Field(ge=0.001, le=2_147_483, allow_inf_nan=False)]
"""Seconds that gRPC counts in milliseconds, in 32 bits."""

ExistingPath = Annotated[Path, AfterValidator(existing)]
File = Annotated[Path, AfterValidator(readable)]

PATHS_OF_SECRETS = ("tls_cert", "tls_key", "tls_client_ca", "tokens_file")
"""Somebody may paste the secret itself in place of its path, so what is no path of a file is never shown."""


class Settings(BaseSettings):
    """How to serve. Made directly, it looks at nothing but its arguments; `setting_sources.read` looks further.

    Raises:
        pydantic.ValidationError: a name is unknown, a value has the wrong type, or two exclude each other.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix="LAPWING_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""

    port: Port = 50051
    """Port to listen on; 0 takes a free one."""

    insecure: bool = False
    """Listen on an address that others can reach, without encryption."""

    reflection: bool = False
    """Tell any client which services and messages there are."""

    grace: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 30.0
    """Seconds that calls in flight have to finish at the end."""

    keepalive: Keepalive = 30.0
    """Seconds of silence after which a client is asked whether it is still there."""

    keepalive_timeout: Keepalive = 10.0
    """Seconds that it has to answer."""

    model: Annotated[str, Field(min_length=1)] | None = None
    """Hub id or path of a causal language model; the embedded one without it."""

    device: Annotated[str, Field(min_length=1)] | None = None
    """Where the model runs, such as cuda or cuda:1; the CPU without it."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the model's weights; without it as stored, but float32 for float16 on a CPU."""

    probes: ExistingPath | None = None
    """A registry, a probe directory, or a directory of them; the embedded probe without it."""

    probe: Annotated[str, Field(min_length=1)] | None = None
    """Name of the probe that scores; the registry's choice, else the first one, without it."""

    tls_cert: File | None = None
    """The server's certificate and those between it and its authority, PEM. Files are read anew when they change."""

    tls_key: File | None = None
    """Private key of the certificate, PEM, not encrypted."""

    tls_client_ca: File | None = None
    """Certificates of authorities, PEM: only clients with a certificate by one of them are let in."""

    tokens_file: File | None = None
    """TOML file of who may do what: see lapwing token --help. Read anew when it changes. Without it whoever reaches the
    server may score and read, and nobody may change its probes."""

    open_admin: bool = False
    """Let whoever reaches the server change its probes, too: for a machine of one's own. Only on loopback, and not
    behind a proxy, whose clients all come from there."""

    requests_per_second: Rate | None = None
    """Calls of one client (of one token or certificate, else of one address) in a second, in the long run."""

    burst: Count | None = None
    """Calls that it may make at once; as many as in one second, and at least one, without it."""

    metrics_port: Port | None = None
    """Port of the Prometheus metrics, over plain HTTP; 0 takes a free one; none without it."""

    metrics_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address of the metrics."""

    metrics_insecure: bool = False
    """Let others reach the metrics, which are not encrypted and ask for no token; --insecure implies it."""

    log_format: Literal["auto", "json", "text"] = "auto"
    """One JSON object a line, text for people, or text on a terminal and else JSON."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged; at debug, texts of errors may quote prompts."""

    limits: Limits = Limits()
    """How much clients may ask for."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The arguments alone: a server in a test or a notebook does not depend on who started the process."""
        return (init_settings,)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if found := tuple(contradictions(self)):
            raise Contradictions(found)
        return self

    @property
    def address(self) -> str:
        """The host as it stands before a port."""
        return bracketed(self.host)

    @property
    def encrypted(self) -> bool:
        """Whether clients are spoken to over TLS."""
        return self.tls_cert is not None

    @property
    def told_apart(self) -> bool:
        """Whether clients say who they are; else they are known by their address, which many may share."""
        return self.tokens_file is not None or self.tls_client_ca is not None

    @property
    def limits_in_force(self) -> Limits:
        """The limits, with those of one client."""
        return self.limits.for_many() if self.told_apart else self.limits

    @property
    def options(self) -> list[tuple[str, int]]:
        """What gRPC is told: (name of a channel argument, value)."""
        return [
            ("grpc.so_reuseport", 0),  # a second server on a port must fail, not take half of the calls
            # Far above what is taken: what gRPC itself refuses is told no reason, and our clients would try it again.
            ("grpc.max_receive_message_length", min(4 * self.limits.request_bytes + 2**20, 2**31 - 1)),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", self.limits.calls_per_connection),
            ("grpc.http.overload_protection", 0),  # near that bound it answers UNAVAILABLE to those that would wait
            ("grpc.keepalive_time_ms", int(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout * 1000)),  # of a ping in flight; else a minute
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]
