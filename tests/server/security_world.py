"""A server behind a door: authorities, certificates, tokens, and calls of any method of the descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from certificates import Authority, Pair, replace
from door_fakes import entry
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from service_fakes import WAIT, told

from lapwing.v1 import detector_pb2, probes_pb2

CANARY = "canary-4f1d"
EVERYWHERE = "0.0.0.0"  # noqa: S104
OK = grpc.StatusCode.OK
DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
UNREACHED = grpc.StatusCode.UNAVAILABLE

EXPECTED_SERVICES = {"lapwing.v1.Detector", "lapwing.v1.Probes", "grpc.health.v1.Health"}
PUBLIC_PACKAGES = ("grpc.health.", "grpc.reflection.")
ADMIN, READ = {"ActivateProbe", "ReloadProbes"}, {"GetServerInfo", "ListProbes", "GetProbe", "GetHeatmap"}


def needed(method: Any) -> str:
    """The policy, said once more."""
    if method.full_name.startswith(PUBLIC_PACKAGES):
        return "public"
    return "admin" if method.name in ADMIN else "read" if method.name in READ else "score"


def path_of(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def methods_of(channel: grpc.Channel, metadata: Any = ()) -> list[Any]:
    """Descriptor of every method of every service that the server itself names."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    [reply] = stub.ServerReflectionInfo(asked, timeout=WAIT, metadata=metadata)
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(one.name) for one in reply.list_services_response.service]
    return [method for service in services for method in service.methods]


def call(channel: grpc.Channel, method: Any, token: str | None = None) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call with an empty message, or with none where messages are streamed."""
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    answer_class = message_factory.GetMessageClass(method.output_type)
    rpc = getattr(channel, kind)(path_of(method), lambda message: message.SerializeToString(), answer_class.FromString)
    request = message_factory.GetMessageClass(method.input_type)()
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    try:
        answer = rpc(iter([]) if method.client_streaming else request, timeout=WAIT, metadata=metadata)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return outcome(error)
    return OK, ""


def outcome(error: Any) -> tuple[grpc.StatusCode, str]:
    """Code and reason; no token may be in anything that is told."""
    assert CANARY not in f"{error} {error.trailing_metadata()}"
    return error.code(), "" if error.code() is UNREACHED else told(error).reason


@dataclass(frozen=True)
class World:
    """Two authorities, certificates of both, and the files that a server reads."""

    folder: Path
    authority: Authority
    stranger: Authority
    server: Pair
    client: Pair
    foreign: Pair

    def settings(self, connection: str) -> dict[str, Any]:
        tls = {"tls_cert": self.folder / "cert.pem", "tls_key": self.folder / "key.pem"}
        if connection == "plain":
            return {}
        return tls if connection == "tls" else {**tls, "tls_client_ca": self.folder / "ca.pem"}

    def channel(self, port: int, connection: str, roots: bytes | None = None, pair: Pair | None = None) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if connection == "plain" or connection.endswith("-unencrypted"):
            return grpc.insecure_channel(f"127.0.0.1:{port}", options)
        shown = {"mtls": self.client, "mtls-foreign": self.foreign}.get(connection) or pair
        keys = (shown.key, shown.cert) if shown else (None, None)
        credentials = grpc.ssl_channel_credentials(roots or self.authority.pem, *keys)
        return grpc.secure_channel(f"localhost:{port}", credentials, options)


LOST = ["mtls-without", "mtls-foreign", "tls-unencrypted", "mtls-unencrypted"]
"""Connections over which nothing is answered."""

CONNECTIONS = ["plain", "tls", "mtls", *LOST]
TOKENS_FILE = "tokens.toml"
GRANTS = {
    "reader": ["read"],
    "scorer": ["score"],
    "user": ["read", "score"],
    "admin": ["admin"],
    "expired": ["admin"],
}
EXPIRY = "expires = 2020-01-01T00:00:00Z\n"
RIGHT = {"read": "reader", "score": "scorer", "admin": "admin", "public": "reader"}
OTHER = {"read": "scorer", "score": "reader", "admin": "user", "public": "reader"}


def token_of(name: str) -> str:
    return f"{CANARY}-{name}"


def tokens_text(*names: str) -> str:
    texts = (entry(name, token_of(name), *GRANTS[name]) + (EXPIRY if name == "expired" else "") for name in names)
    return "".join(texts)


def a_world(tmp_path: Path) -> World:
    authority, stranger = Authority("ours"), Authority("another")
    made = World(
        tmp_path,
        authority,
        stranger,
        authority.issue("server.example.org"),
        authority.issue("client.example.org", ("alternative.example.org",)),
        stranger.issue("client.example.org"),
    )
    made.server.write(tmp_path / "cert.pem", tmp_path / "key.pem")
    replace(tmp_path / "ca.pem", authority.pem)
    replace(tmp_path / TOKENS_FILE, tokens_text(*GRANTS).encode())
    return made


def code_of(channel: grpc.Channel, name: str, token: str | None = None) -> grpc.StatusCode:
    methods = [*detector_pb2.DESCRIPTOR.services_by_name["Detector"].methods]
    methods += probes_pb2.DESCRIPTOR.services_by_name["Probes"].methods
    methods += health_pb2.DESCRIPTOR.services_by_name["Health"].methods
    return call(channel, next(method for method in methods if method.name == name), token)[0]
