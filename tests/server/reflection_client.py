"""A client that shares no code with ours: all that it knows of the service the server told it, by reflection.

Run as `python reflection_client.py HOST:PORT`; prints what it found as one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PROMPT = "Question: which country is the city of Lyon in? Answer:"


class Reflected:
    """A channel on which every method is found by its name when it is called."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self.database)

    def methods(self) -> list[MethodDescriptor]:
        """Every method of every service that the server names."""
        names = [name for name in self.database.get_services() if not name.startswith("grpc.reflection")]
        return [method for name in names for method in self.pool.FindServiceByName(name).methods]

    def call(self, service: str, method: str, *requests: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Sends JSON, yields JSON."""
        found: MethodDescriptor = self.pool.FindServiceByName(service).FindMethodByName(method)
        request, response = GetMessageClass(found.input_type), GetMessageClass(found.output_type)
        sends, answers = found.client_streaming, found.server_streaming
        kind = f"{'stream' if sends else 'unary'}_{'stream' if answers else 'unary'}"
        call = getattr(self.channel, kind)(
            f"/{service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        messages = [json_format.ParseDict(one, request(), descriptor_pool=self.pool) for one in requests]
        reply = call(iter(messages) if sends else messages[0], timeout=30)
        for message in reply if answers else [reply]:
            yield json_format.MessageToDict(message, descriptor_pool=self.pool, preserving_proto_field_name=True)


def drive(target: str) -> dict[str, Any]:
    """Looks around, scores, lets the model write and asks for a heatmap."""
    with grpc.insecure_channel(target) as channel:
        server = Reflected(channel)
        detector, probes = "lapwing.v1.Detector", "lapwing.v1.Probes"
        [scored] = server.call(
            detector, "Score", {"prompt": {"text": PROMPT}, "response": {"text": " Lyon is a city of France."}}
        )
        events = list(server.call(detector, "Generate", {"prompt": {"text": PROMPT}, "max_new_tokens": 6}))
        [heatmap] = server.call(
            probes, "GetHeatmap", {"statistic": "STATISTIC_WEIGHT", "image_format": "IMAGE_FORMAT_PNG"}
        )
        [listed] = server.call(probes, "ListProbes", {})
        [health] = server.call("grpc.health.v1.Health", "Check", {"service": detector})
        try:
            list(server.call(detector, "Score", {"prompt": {"text": PROMPT}}))
            refused = "nothing"
        except grpc.RpcError as error:
            refused = f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
        return {
            "methods": sorted(method.full_name for method in server.methods()),
            "detection": scored["detection"],
            "events": events,
            "heatmap": {"shape": heatmap["values"]["shape"], "image": heatmap["image"][:8]},
            "probes": [probe["name"] for probe in listed["probes"]],
            "health": health["status"],
            "refused": refused,
            "ours": sorted(name for name in sys.modules if name.split(".")[0].startswith("lapwing")),
        }


if __name__ == "__main__":
    print(json.dumps(drive(sys.argv[1])))
