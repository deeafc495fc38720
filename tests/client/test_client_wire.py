"""Messages to results, also those of a newer server."""

from __future__ import annotations

import struct

import pytest

from lapwing.v1 import detection_pb2, detector_pb2, probes_pb2, tensor_pb2
from lapwing_client import LapwingError, replies, requests


def test_floats_are_little_endian_float32() -> None:
    data = struct.pack("<3f", 1.0, -2.5, 1e-3)
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3], data=data)
    assert replies.floats(tensor) == struct.unpack("<3f", data)
    assert replies.floats(tensor_pb2.Tensor()) == ()


def test_another_type_is_refused_not_misread() -> None:
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT16, shape=[2], data=b"\0" * 4)
    with pytest.raises(LapwingError, match="update"):
        replies.floats(tensor)


def test_a_big_endian_machine_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies.sys, "byteorder", "big")
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1], data=struct.pack(">f", 2.0))
    assert replies.floats(tensor) == (2.0,), "on this machine the bytes are turned once more than needed"


def test_a_state_that_only_a_newer_server_knows_is_not_scored() -> None:
    message = detection_pb2.Detection()
    message.MergeFromString(b"\x08\x63")  # state = 99
    detection = replies.detection_of(message)
    assert detection.state == "99"
    assert detection.probability is None


def test_an_absent_score_is_none_and_zero_is_zero() -> None:
    empty = detection_pb2.Detection(state=detection_pb2.DETECTION_STATE_UNSCORED)
    zero = detection_pb2.Detection(state="DETECTION_STATE_SCORED", probability=0.0, logit=0.0, flagged=False)
    read = replies.detection_of(empty)
    assert (read.probability, read.logit, read.flagged) == (None, None, None)
    assert [getattr(replies.detection_of(zero), name) for name in ("probability", "logit", "flagged")] == [
        0.0,
        0.0,
        False,
    ]


def test_every_field_of_a_detection_is_read() -> None:
    names = {field.name for field in detection_pb2.Detection.DESCRIPTOR.fields}
    result = set(replies.detection_of(detection_pb2.Detection()).to_dict())
    assert names - result == {"stage_seconds"}
    assert result - names == {"seconds"}


def test_every_field_of_a_probe_is_read() -> None:
    names = {field.name for field in probes_pb2.Probe.DESCRIPTOR.fields}
    result = set(replies.probe_of(probes_pb2.Probe()).to_dict())
    assert names - result == {"calibration"}
    assert result - names == {"slope", "intercept", "knots"}


def test_every_field_of_the_server_info_is_read() -> None:
    names = {field.name for field in detector_pb2.GetServerInfoResponse.DESCRIPTOR.fields}
    assert set(replies.server_info_of(detector_pb2.GetServerInfoResponse()).to_dict()) - names == {"max_tokens"}


def test_a_prompt_is_sent_in_the_form_in_which_it_is_given() -> None:
    assert requests.prompt_message("a").HasField("text")
    assert requests.prompt_message("").HasField("text"), "the server says that it is empty"
    assert list(requests.prompt_message([1, 2]).token_ids) == [1, 2]
    turns = requests.prompt_message([{"role": "user", "content": "a"}]).messages
    assert [(turn.role, turn.content) for turn in turns] == [("user", "a")]
