"""The wire as it is written: fresh stubs, a comment on everything, regular names, floors that match the stubs."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2

from lapwing.v1 import detection_pb2, detector_pb2, model_pb2, probes_pb2, tensor_pb2

ROOT = Path(__file__).resolve().parents[2]
FILES = [module.DESCRIPTOR for module in (detection_pb2, detector_pb2, model_pb2, probes_pb2, tensor_pb2)]
SERVICES = [detector_pb2.DESCRIPTOR.services_by_name["Detector"], probes_pb2.DESCRIPTOR.services_by_name["Probes"]]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("generate_stubs", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_stubs_are_fresh(generate: ModuleType) -> None:
    assert generate.stale(ROOT / "proto") == []


def test_a_changed_a_missing_and_a_left_over_stub_are_named(generate: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto" / "lapwing", tmp_path / "lapwing")
    folder = tmp_path / "lapwing" / "v1"
    (folder / "tensor_pb2.py").write_text("# changed\n")
    (folder / "model_pb2.pyi").unlink()
    (folder / "gone_pb2_grpc.py").write_text("")
    assert generate.stale(tmp_path) == [
        "lapwing/v1/gone_pb2_grpc.py",
        "lapwing/v1/model_pb2.pyi",
        "lapwing/v1/tensor_pb2.py",
    ]


def test_check_says_what_is_stale_and_how_to_mend_it(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "proto" / "lapwing", tmp_path / "lapwing")
    monkeypatch.setattr(generate, "HERE", tmp_path)
    assert generate.main(["--check"]) == 0
    (tmp_path / "lapwing" / "v1" / "tensor_pb2.py").write_text("")
    assert generate.main(["--check"]) == 1
    assert "stale: proto/lapwing/v1/tensor_pb2.py; run: make proto" in capsys.readouterr().err
    assert generate.main([]) == 0, "generating mends it"
    assert generate.main(["--check"]) == 0


def test_another_version_of_the_tools_is_refused(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "version", lambda _: "1.85.0")
    assert generate.main(["--check"]) == 2
    assert "pip install grpcio-tools==1.76.0" in capsys.readouterr().err


def test_misuse_ends_with_2() -> None:
    command = [sys.executable, str(ROOT / "proto" / "generate.py"), "--chekc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_everything_has_a_comment(generate: ModuleType, tmp_path: Path) -> None:
    from grpc_tools import protoc

    sources = [path.relative_to(ROOT / "proto").as_posix() for path in (ROOT / "proto").glob("lapwing/**/*.proto")]
    includes = [ROOT / "proto", Path(protoc.__file__).parent / "_proto", Path(status_pb2.__file__).parents[2]]
    out = tmp_path / "set"
    arguments = [f"-I{folder}" for folder in includes]
    assert protoc.main(["protoc", *arguments, "--include_source_info", f"--descriptor_set_out={out}", *sources]) == 0
    bare = []
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        for location in file.source_code_info.location:
            # A path of even length names an element: message, field, enum, value, service, rpc, oneof.
            names_an_element = len(location.path) >= 2 and len(location.path) % 2 == 0 and location.path[0] in (4, 5, 6)
            if names_an_element and not location.leading_comments.strip():
                bare.append(f"{file.name}:{location.span[0] + 1}")
    assert bare == []


def test_enums_begin_with_unspecified_and_carry_their_name() -> None:
    enums = [enum for file in FILES for enum in file.enum_types_by_name.values()]
    assert len(enums) >= 7
    for enum in enums:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert enum.values_by_number[0].name == f"{prefix}UNSPECIFIED"
        assert all(value.name.startswith(prefix) for value in enum.values)


def test_every_rpc_has_messages_of_its_own() -> None:
    methods = [method for service in SERVICES for method in service.methods]
    assert {method.name for method in methods} == {
        *("Score", "ScoreBatch", "Generate", "ScoreAttention", "GetServerInfo"),
        *("ListProbes", "GetProbe", "GetHeatmap", "ActivateProbe", "ReloadProbes"),
    }
    for method in methods:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"


def test_only_two_rpcs_stream() -> None:
    streams = {
        method.name: (method.client_streaming, method.server_streaming)
        for service in SERVICES
        for method in service.methods
        if method.client_streaming or method.server_streaming
    }
    assert streams == {"Generate": (False, True), "ScoreAttention": (True, True)}


def test_the_attention_of_a_large_model_fits_into_slices() -> None:
    """80 layers of 64 heads that read 8,192 tokens."""
    layers, heads, tokens, most = 80, 64, 8192, 8 * 2**20
    whole = layers * heads * tokens * 4
    assert whole > most, "control: not in one message"

    def tensor(*shape: int) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=shape, data=bytes(4 * math.prod(shape)))

    one_layer = tensor(1, heads, tokens)
    summary = detector_pb2.AttentionSummarySlice(first_layer=79, diagonal=one_layer, received=one_layer)
    rows = detector_pb2.AttentionRowsSlice(first_layer=79, first_token=8189, weights=tensor(1, heads, 3, tokens))
    for part in ({"summary": summary}, {"rows": rows}):
        assert detector_pb2.ScoreAttentionRequest(**part).ByteSize() <= most


def test_the_floors_of_the_dependencies_are_those_of_the_stubs() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in dependencies)  # type: ignore[union-attr]
    folder = ROOT / "proto" / "lapwing" / "v1"
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (folder / "detector_pb2.py").read_text())
    grpcio = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (folder / "detector_pb2_grpc.py").read_text())
    assert protobuf is not None
    assert grpcio is not None
    assert floors["protobuf"] == protobuf[1]
    assert grpcio[1].startswith(floors["grpcio"])


def test_both_forms_of_a_prompt_survive_the_wire_so_that_the_server_can_refuse_them() -> None:
    both = detection_pb2.Prompt(text="a", token_ids=[1])
    read = detection_pb2.Prompt.FromString(both.SerializeToString())
    assert read.HasField("text")
    assert list(read.token_ids) == [1]
