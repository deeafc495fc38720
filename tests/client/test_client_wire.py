"""Messages to results, also those of a newer server."""

from __future__ import annotations

import dataclasses
import inspect
import struct
from typing import Any

import numpy as np
import pytest

from lapwing.v1 import detection_pb2, detector_pb2, probes_pb2, tensor_pb2
from lapwing_client import Client, InvalidRequest, LapwingError, replies, requests, results


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
    limits = [field.name for field in detector_pb2.Limits.DESCRIPTOR.fields]
    assert limits == [field.name for field in dataclasses.fields(results.Limits)]


def test_every_field_of_an_event_is_read() -> None:
    for kind, result in (("token", results.GeneratedToken), ("generation", results.Generation)):
        message = detector_pb2.GenerateResponse(**{kind: {}})
        names = {field.name for field in getattr(message, kind).DESCRIPTOR.fields}
        assert names == set(replies.event_of(message).to_dict()) == {field.name for field in dataclasses.fields(result)}


def test_contributions_of_a_token_are_read() -> None:
    data = struct.pack("<2f", 0.5, -0.25)
    tensor = {"dtype": "DATA_TYPE_FLOAT32", "shape": [2], "data": data}
    token = replies.event_of(detector_pb2.GenerateResponse(token={"token_contributions": tensor}))
    assert isinstance(token, results.GeneratedToken)
    assert token.token_contributions == (0.5, -0.25)


def test_revisions_of_a_probe_are_read() -> None:
    rejected = [{"revision": "b", "message": "torn"}]
    message = probes_pb2.Probe(revisions=["c", "b"], rejected_revisions=rejected, statistic_weights={"mean": 0.5})
    message.state = probes_pb2.PROBE_STATE_SHADOW
    probe = replies.probe_of(message)
    assert (probe.state, probe.revisions) == ("SHADOW", ("c", "b"))
    assert probe.rejected_revisions == (results.RejectedRevision("b", "torn"),)
    assert probe.statistic_weights == {"mean": 0.5}


def test_every_option_of_a_generation_is_sent() -> None:
    options = {
        **{"max_new_tokens": 1, "temperature": 2.0, "top_p": 0.5, "seed": 4, "stop_when_probability_above": 0.75},
        **{"minimum_tokens": 6, "score_every": 7, "contributions": True, "false_positive_rate": 0.25, "probe": "p"},
    }
    message = requests.generate_request("a", stop_strings=["x", "y"], **options)
    assert {name: getattr(message, name) for name in options} == options
    assert list(message.stop_strings) == ["x", "y"]
    names = {field.name for field in message.DESCRIPTOR.fields}
    assert names == {"prompt", "stop_strings", *options}
    asked = set(inspect.signature(Client.generate).parameters)
    assert asked == {"self", "timeout", *names}


def test_an_option_that_is_not_given_is_not_sent() -> None:
    message = requests.generate_request("a")
    assert [field.name for field, _ in message.ListFields()] == ["prompt"]


def test_one_stop_string_is_a_list_of_one() -> None:
    assert list(requests.generate_request("a", stop_strings="\n\n").stop_strings) == ["\n\n"]


def test_the_probe_is_sent_with_every_kind_of_score() -> None:
    assert requests.score_request("a", "b", probe="p").probe == "p"
    assert requests.score_batch_request([("a", "b")], probe="p").probe == "p"
    for request in (requests.score_request, requests.generate_request):
        with pytest.raises(InvalidRequest, match="probe: is 3; give text"):
            request("a", *(["b"] if request is requests.score_request else []), probe=3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop_strings": 3}, "stop_strings"),
        ({"stop_strings": b"x"}, "stop_strings"),
        ({"stop_strings": ["x", 3]}, "stop_strings[1]"),
        ({"stop_strings": ["\ud800"]}, "stop_strings[0]"),
        ({"stop_when_probability_above": "high"}, "stop_when_probability_above"),
        ({"minimum_tokens": 1.5}, "minimum_tokens"),
        ({"score_every": True}, "score_every"),
        ({"contributions": 1}, "contributions"),
    ],
)
def test_what_can_not_be_sent_names_its_field(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        requests.generate_request("a", **options)
    assert caught.value.field == field


@pytest.mark.parametrize("items", [["ab"], [("a",)], [("a", "b", "c")], [None], [{"prompt": "a", "response": "b"}]])
def test_an_item_of_a_batch_is_a_pair(items: Any) -> None:
    with pytest.raises(InvalidRequest, match="give a pair of prompt and response") as caught:
        requests.score_batch_request([("a", "b"), *items])
    assert caught.value.field == "items[1]"


@pytest.mark.parametrize("items", [None, 5, {"a": "b"}, {("a", "b")}])
def test_a_batch_is_a_list(items: Any) -> None:
    with pytest.raises(InvalidRequest, match="give a list of pairs") as caught:
        requests.score_batch_request(items)
    assert caught.value.field == "items"


def test_what_has_no_order_is_no_list_of_token_ids() -> None:
    with pytest.raises(InvalidRequest, match="response: is a set"):
        requests.response_message({3, 1, 2})  # type: ignore[arg-type]
    assert list(requests.response_message(dict.fromkeys([3, 1]).keys().__iter__()).token_ids) == [3, 1]  # type: ignore[arg-type]


def test_a_prompt_is_sent_in_the_form_in_which_it_is_given() -> None:
    assert requests.prompt_message("a").HasField("text")
    assert requests.prompt_message("").HasField("text"), "the server says that it is empty"
    assert list(requests.prompt_message([1, 2]).token_ids) == [1, 2]
    turns = requests.prompt_message([{"role": "user", "content": "a"}]).messages
    assert [(turn.role, turn.content) for turn in turns] == [("user", "a")]


def test_a_batch_of_token_ids_is_no_sequence_of_them() -> None:
    """As a tokenizer returns them that is asked for tensors: one row for each text."""
    for ids in (np.array([[1, 2]]), np.array([[1, 2], [3, 4]])):
        with pytest.raises(InvalidRequest, match="give text, a list of messages, or a list of token ids") as caught:
            requests.prompt_message(ids)
        assert caught.value.field == "prompt.token_ids[0]"
        assert list(requests.prompt_message(ids[0]).token_ids) == [1, 2], "control"


@pytest.mark.parametrize("number", [np.array([0.1, 0.2]), 10**400], ids=["several", "too large"])
def test_what_does_not_become_one_number_names_its_field(number: Any) -> None:
    with pytest.raises(InvalidRequest, match="give a number") as caught:
        requests.score_request("a", "b", false_positive_rate=number)
    assert caught.value.field == "false_positive_rate"
    assert requests.score_request("a", "b", false_positive_rate=np.float32(0.5)).false_positive_rate == 0.5, "control"
