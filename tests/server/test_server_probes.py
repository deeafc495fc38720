"""ListProbes, GetProbe, GetHeatmap, and the shelf that they show."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from service_fakes import (
    ATTENTION_SCORE,
    LAPLACIAN,
    WAIT,
    FakeEngine,
    Gate,
    Running,
    a_probe,
    a_shelf,
    refused,
    wait_until,
)

from lapwing.v1 import detector_pb2, detector_pb2_grpc, probes_pb2, probes_pb2_grpc
from lapwing_client.replies import probe_of
from lapwing_detector.calibration import Calibration
from lapwing_detector.errors import ProbeCorrupt
from lapwing_server import answers, probes_service
from lapwing_server.answers import probe_message
from lapwing_server.engine import loader
from lapwing_server.limits import Limits
from lapwing_server.metrics import SHED
from lapwing_server.probes_service import PICTURES, ProbesService
from lapwing_server.refusal import Refusal
from lapwing_server.shelf import Shelf, Shelved
from lapwing_server.shelving import shelve

NAMES = [f"probe-{i:03d}" for i in range(7)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    shelf = a_shelf(*NAMES, rejected=("a-broken-one",))
    assert shelf.active is not None
    with Running(shelf=shelf) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: Running) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield probes_pb2_grpc.ProbesStub(channel)


def test_a_probe_says_all_about_itself(stub: Any) -> None:
    shown, probe = stub.GetProbe(probes_pb2.GetProbeRequest(name="probe-002")).probe, a_probe("probe-002")
    assert (shown.name, shown.revision) == (probe.name, probe.revision)
    assert shown.state == probes_pb2.PROBE_STATE_LOADED
    assert (list(shown.features), shown.k, shown.width, shown.needed_tokens) == ([LAPLACIAN], 3, 3, 3)
    assert (list(shown.layers), shown.heads) == ([1, 2], 3)
    assert [(head.layer, head.head) for head in shown.selected_heads] == [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert (shown.calibration.slope, shown.calibration.intercept) == (1.5, 0.1)
    assert [point.false_positive_rate for point in shown.thresholds] == [0.01, 0.05, 0.1]
    assert not shown.thresholds[0].HasField("realised_rate")
    assert shown.thresholds[1].realised_rate == 0.04
    assert shown.model.name == "fake-model"


def test_the_knots_of_an_isotonic_calibration_come_through() -> None:
    knots = ((-1.0, 0.25), (0.5, 0.75))
    probe = a_probe("probe-000", calibration=Calibration(1.0, 0.0, knots))
    message = probe_message(Shelved(probe.name, probe, ""), probe)
    assert [(knot.logit, knot.probability) for knot in message.calibration.knots] == list(knots)
    assert probe_of(message).knots == knots


def test_a_probe_that_reads_more_than_attention_says_so(stub: Any) -> None:
    weights = {"mean_log_probability.v1": -0.5, "minimum_log_odds.v1": 0.25}
    probe = a_probe("probe-000", statistic_weights=weights)
    assert probe_of(probe_message(Shelved(probe.name, probe, ""), probe)).statistic_weights == weights
    shown = stub.GetProbe(probes_pb2.GetProbeRequest(name="probe-002")).probe
    assert not shown.statistic_weights, "control: this one reads attention alone"


def test_metrics_come_through_and_what_json_has_no_word_for_is_text(stub: Any) -> None:
    shown = stub.GetProbe(probes_pb2.GetProbeRequest()).probe
    assert json_format.MessageToDict(shown.metrics) == {"auroc": 0.75, "interval": [0.7, 0.8], "spread": "nan"}


@pytest.mark.parametrize("call", ["ListProbes", "GetProbe", "ActivateProbe", "ReloadProbes"])
def test_what_probes_say_of_themselves_is_put_together_beside_the_event_loop(
    stub: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Of fifty probes of a large model it takes a second."""
    threads = set[str]()

    def watched(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return probe_message(*arguments)

    monkeypatch.setattr(answers, "probe_message", watched)
    request = getattr(probes_pb2, f"{call}Request")(**({"name": NAMES[0]} if call == "ActivateProbe" else {}))
    assert getattr(stub, call)(request, timeout=WAIT).ByteSize()
    assert threads
    assert "test-event-loop" not in threads


def test_control_the_event_loop_is_known_by_its_name(server: Running) -> None:
    async def name() -> str:
        return threading.current_thread().name

    assert server.call(name()) == "test-event-loop"


def test_without_a_name_the_active_probe_answers(stub: Any) -> None:
    shown = stub.GetProbe(probes_pb2.GetProbeRequest()).probe
    assert (shown.name, shown.state) == ("probe-000", probes_pb2.PROBE_STATE_ACTIVE)


def test_a_rejected_probe_says_why(stub: Any) -> None:
    shown = stub.GetProbe(probes_pb2.GetProbeRequest(name="a-broken-one")).probe
    assert shown.state == probes_pb2.PROBE_STATE_REJECTED
    assert shown.state_message == "its sha256 differs"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 0])
def test_the_pages_are_the_whole_list(stub: Any, size: int) -> None:
    names: list[str] = []
    token, pages = "", 0
    while True:
        page = stub.ListProbes(probes_pb2.ListProbesRequest(page_size=size, page_token=token))
        assert page.total_size == 8
        assert len(page.probes) <= (size or 50)
        names += [probe.name for probe in page.probes]
        pages, token = pages + 1, page.next_page_token
        if not token:
            break
    assert names == ["a-broken-one", *NAMES]
    assert pages == -(-8 // size) if size else pages == 1


def test_wrong_pages_name_their_field(stub: Any) -> None:
    for field, message in (
        ("page_size", probes_pb2.ListProbesRequest(page_size=-1)),
        ("page_token", probes_pb2.ListProbesRequest(page_token="2")),
    ):
        error = refused(stub.ListProbes, message)
        assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT", field)


@pytest.mark.parametrize("call", ["GetProbe", "GetHeatmap"])
def test_an_unknown_probe_is_not_found_and_the_known_are_listed(stub: Any, call: str) -> None:
    field = "name" if call == "GetProbe" else "probe"
    error = refused(getattr(stub, call), getattr(probes_pb2, f"{call}Request")(**{field: "nope"}))
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_PROBE", field)
    assert "nope" not in error.message
    assert "probe-003" in error.message


@pytest.mark.parametrize("feature", [LAPLACIAN, ATTENTION_SCORE])
@pytest.mark.parametrize("statistic", ["P_VALUE", "Q_VALUE", "AUROC", "HEAD_PROBE", "WEIGHT", "SELECTED"])
def test_a_heatmap_is_the_matrix_of_the_probe(stub: Any, feature: str, statistic: str) -> None:
    message = probes_pb2.GetHeatmapRequest(feature=feature, statistic=f"STATISTIC_{statistic}")
    shown = stub.GetHeatmap(message)
    values = np.frombuffer(shown.values.data, "<f4").reshape(tuple(shown.values.shape))
    np.testing.assert_array_equal(values, a_probe("probe-000").head_map(feature, statistic).values)
    assert (shown.probe_name, shown.feature) == ("probe-000", feature)
    assert list(shown.layers) == [1, 2]
    assert (shown.column_label, shown.row_label) == ("head index", "layer index")
    assert shown.image == b""
    if statistic == "P_VALUE":
        assert shown.value_label == "p-value"


def test_every_heatmap_that_a_probe_lists_can_be_had(stub: Any) -> None:
    listed = stub.GetProbe(probes_pb2.GetProbeRequest()).probe.heatmaps
    assert len(listed) == 12
    for name in listed:
        stub.GetHeatmap(probes_pb2.GetHeatmapRequest(feature=name.feature, statistic=name.statistic))


def test_pictures(stub: Any) -> None:
    message = probes_pb2.GetHeatmapRequest(statistic="STATISTIC_P_VALUE", image_format="IMAGE_FORMAT_PNG")
    shown = stub.GetHeatmap(message)
    assert shown.image.startswith(b"\x89PNG\r\n\x1a\n")
    assert shown.values.data, "the numbers come, too"
    message.image_format = probes_pb2.IMAGE_FORMAT_SVG
    assert ElementTree.fromstring(stub.GetHeatmap(message).image).tag.endswith("svg")


def test_pictures_are_drawn_by_a_thread_of_their_own(server: Running, stub: Any) -> None:
    gate = Gate()
    held = server.server.worker.post(gate)
    message = probes_pb2.GetHeatmapRequest(statistic="STATISTIC_P_VALUE", image_format="IMAGE_FORMAT_PNG")
    assert stub.GetHeatmap(message).image, "while the model's worker is busy"
    assert not held.done()
    gate.open()
    held.result(WAIT)


PICTURE = probes_pb2.GetHeatmapRequest(statistic="STATISTIC_P_VALUE", image_format="IMAGE_FORMAT_PNG")


def test_only_so_many_pictures_wait_to_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_service, "picture", lambda *_: b"drawn")
    gate = Gate()
    with Running() as server, grpc.insecure_channel(server.target) as channel:
        stub = probes_pb2_grpc.ProbesStub(channel)
        busy = server.server._artist.post(gate)
        assert gate.reached.wait(WAIT)
        calls = [stub.GetHeatmap.future(PICTURE, timeout=WAIT) for _ in range(PICTURES)]
        wait_until(lambda: server.server._artist.waiting == PICTURES)
        error = refused(stub.GetHeatmap, PICTURE)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_PICTURES")
        assert stub.GetHeatmap(probes_pb2.GetHeatmapRequest(statistic=1), timeout=WAIT).values.data, (
            "numbers can be had"
        )
        calls.pop().cancel()
        wait_until(lambda: server.server.guard.in_flight == PICTURES - 1)
        calls.append(stub.GetHeatmap.future(PICTURE, timeout=WAIT))
        wait_until(lambda: server.server._artist.waiting == PICTURES + 1)  # the one that was left, too
        gate.open()
        assert all(call.result(WAIT).image for call in calls), "a place that is free again is given"
        busy.result(WAIT)


def test_a_picture_that_is_refused_is_counted_and_says_when_to_come_again() -> None:
    shed: list[str] = []
    service = ProbesService(Mock(), Mock(), Mock(), shed.append)
    service._pictures = PICTURES
    with pytest.raises(Refusal, match="16 pictures are being drawn") as caught:
        asyncio.run(service._picture(a_probe(), LAPLACIAN, "P_VALUE", "png"))
    assert shed == ["TOO_MANY_PICTURES"]
    assert caught.value.retry_after
    assert shed[0] in SHED
    assert service._pictures == PICTURES


def test_a_picture_of_a_large_model_has_fewer_pixels_than_the_limit() -> None:
    large = a_probe(layers=160, heads=128)
    shelf = Shelf((Shelved(large.name, large, ""),), large)
    with Running(shelf=shelf) as server, grpc.insecure_channel(server.target) as channel:
        shown = probes_pb2_grpc.ProbesStub(channel).GetHeatmap(PICTURE)
    width, height = struct.unpack(">II", shown.image[16:24])
    assert 500_000 < width * height < Limits().heatmap_pixels
    assert list(shown.values.shape) == [160, 128]


@pytest.mark.parametrize(
    ("fields", "reason", "field", "words"),
    [
        ({"feature": "nope.v1", "statistic": 1}, "UNKNOWN_FEATURE", "feature", (LAPLACIAN, ATTENTION_SCORE)),
        ({}, "UNKNOWN_STATISTIC", "statistic", ("P_VALUE", "SELECTED")),
        ({"statistic": -1}, "UNKNOWN_STATISTIC", "statistic", ("number -1",)),
        ({"statistic": 99}, "UNKNOWN_STATISTIC", "statistic", ("number 99",)),
        ({"statistic": 4}, "UNKNOWN_STATISTIC", "statistic", ("EFFECT_SIZE",)),
        ({"statistic": 1, "image_format": 9}, "INVALID_INPUT", "image_format", ("PNG, SVG",)),
    ],
)
def test_wrong_heatmaps_name_their_field_and_what_is_known(
    stub: Any, fields: dict[str, Any], reason: str, field: str, words: tuple[str, ...]
) -> None:
    error = refused(stub.GetHeatmap, probes_pb2.GetHeatmapRequest(**fields))
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
    assert all(word in error.message for word in words)


def test_a_rejected_probe_has_no_heatmap(stub: Any) -> None:
    error = refused(stub.GetHeatmap, probes_pb2.GetHeatmapRequest(probe="a-broken-one", statistic=1))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_REJECTED")
    assert "its sha256 differs" in error.message


def test_a_picture_larger_than_the_limit_is_refused_and_its_numbers_are_not(stub: Any) -> None:
    width, height = struct.unpack(">II", stub.GetHeatmap(PICTURE).image[16:24])
    for pixels in (width * height - 1, width * height):
        limits = Limits(heatmap_pixels=pixels)
        with Running(limits=limits) as server, grpc.insecure_channel(server.target) as channel:
            bounded = probes_pb2_grpc.ProbesStub(channel)
            if pixels == width * height:
                assert bounded.GetHeatmap(PICTURE).image, "control"
                continue
            error = refused(bounded.GetHeatmap, PICTURE)
            assert (error.reason, error.field) == ("TOO_LARGE", "image_format")
            assert f"{width} x {height} pixels" in error.message
            assert bounded.GetHeatmap(probes_pb2.GetHeatmapRequest(statistic=1)).values.data


# The shelf.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two sound probes."""
    root = tmp_path_factory.mktemp("probes")
    for name in ("alpha", "beta"):
        a_probe(name, metrics={}, statistics={}).save_pretrained(root / name)
    return root


def test_a_directory_of_probes(saved: Path) -> None:
    shelf = shelve(saved)
    assert shelf.names == ["alpha", "beta"]
    assert shelf.active.name == "alpha"
    assert shelve(saved, "beta").active.name == "beta"


def test_one_probe_directory(saved: Path) -> None:
    shelf = shelve(saved / "beta")
    assert shelf.names == ["beta"]
    assert shelf.active.revision == a_probe("beta").revision


def test_a_corrupt_probe_is_skipped_with_its_reason(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "probes"
    shutil.copytree(saved, root)
    tensors = root / "alpha" / "probe.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    shelf = shelve(root)
    broken = shelf.find("alpha")
    assert broken is not None
    assert broken.probe is None
    assert "sha256 differs" in broken.reason
    assert shelf.active.name == "beta"


def test_a_shelf_without_a_sound_probe_says_what_it_found(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ProbeCorrupt, match=r"holds no sound probe, only .*lapwing train"):
        shelve(tmp_path)
    with pytest.raises(ProbeCorrupt, match=r"no sound probe named 'gamma', only \['alpha', 'beta'\]"):
        shelve(saved, "gamma")
    (tmp_path / "half").mkdir()
    with pytest.raises(ProbeCorrupt, match=r"half: .*manifest"):
        shelve(tmp_path)


def test_two_probes_of_one_name_are_not_mixed_up(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "probes"
    shutil.copytree(saved, root)
    shutil.copytree(saved / "alpha", root / "copy")
    shelf = shelve(root)
    assert shelf.names == ["alpha", "beta", "copy"]
    copy = shelf.find("copy")
    assert copy is not None
    assert "a probe of the name alpha was loaded before" in copy.reason


def test_links_that_lead_out_and_hidden_folders_are_left_alone(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "probes"
    root.mkdir()
    shutil.copytree(saved / "alpha", root / "alpha")
    shutil.copytree(saved / "beta", root / ".beta-half-written")
    os.symlink(saved / "beta", root / "beta")
    assert shelve(root).names == ["alpha"]


ODD_NAMES = (b"b\xff", b"d\ne", b"Upper", b"c" * 64, b"with space")


def test_folders_that_are_not_named_like_probes_are_left_alone(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "probes"
    shutil.copytree(saved, root)
    for name in ODD_NAMES:
        os.mkdir(os.path.join(os.fsencode(root), name))
    (root / "named-like-one").mkdir()
    assert shelve(root).names == ["alpha", "beta", "named-like-one"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_probe_that_is_named_itself_may_lie_in_any_folder(saved: Path, tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    shutil.copytree(saved / "alpha", path)
    assert shelve(path).names == ["alpha"]


def test_a_failure_in_a_folder_of_any_name_can_be_told(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"p\xff")))
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    load = loader("m", path, None, lambda model, probe: FakeEngine())
    with Running(load=load) as server, grpc.insecure_channel(server.target) as channel:
        info = detector_pb2_grpc.DetectorStub(channel).GetServerInfo(detector_pb2.GetServerInfoRequest())
    assert info.state == detector_pb2.SERVER_STATE_FAILED
    assert "p\\udcff" in info.message


def test_control_such_a_name_does_not_fit_on_the_wire() -> None:
    with pytest.raises(UnicodeEncodeError):
        probes_pb2.Probe(name="p\udcff").SerializeToString()
