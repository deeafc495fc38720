"""The client against a real server: what every method answers, and what it says of wrong input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from service_fakes import LAPLACIAN, WAIT, FakeEngine, Gate, Running, a_probe, a_shelf

from lapwing_client import (
    Client,
    Detection,
    GeneratedToken,
    Generation,
    InvalidRequest,
    Matrix,
    NotFound,
    Overloaded,
    PreconditionFailed,
    ServerError,
    TooLarge,
    Unavailable,
)
from lapwing_server.limits import Limits


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running(shelf=a_shelf("fake-probe", "other-probe", rejected=("broken-probe",))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


# Results.


def test_score(client: Client) -> None:
    detection = client.score("hello", "world")
    expected = FakeEngine().score("hello", "world", false_positive_rate=0.05)
    assert isinstance(detection, Detection)
    assert (detection.state, detection.reason) == ("SCORED", None)
    assert (detection.probability, detection.logit) == (expected.probability, expected.logit)
    assert detection.token_ids == expected.token_ids == tuple(b"helloworld")
    assert detection.token_contributions == tuple(expected.token_contributions.tolist())
    assert sum(detection.token_contributions) + detection.bias == pytest.approx(detection.logit, abs=1e-6)  # float32
    assert (detection.strongest_heads[0].layer, detection.strongest_heads[0].head) == (2, 1)
    assert "queue" in detection.seconds


def test_an_unscored_detection_never_looks_like_a_good_one(client: Client) -> None:
    detection = client.score("a", "b")
    assert (detection.state, detection.reason) == ("UNSCORED", "TOO_SHORT")
    assert detection.probability is None
    assert detection.logit is None
    assert detection.flagged is None
    assert detection.flagged_at == ()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", b"ab"),
        (list(b"ab"), b"ab"),
        (tuple(b"ab"), b"ab"),
        (range(97, 99), b"ab"),
        (np.array([97, 98]), b"ab"),
        ([{"role": "user", "content": "ab"}], b"<user>ab"),
    ],
)
def test_every_form_of_a_prompt(client: Client, prompt: Any, ids: bytes) -> None:
    assert client.score(prompt, "cd").token_ids == tuple(ids + b"cd")


def test_the_operating_point_can_be_chosen(client: Client) -> None:
    flags = [client.score("{{{{", "zzzzzzzzzzzzzzzz", false_positive_rate=rate).flagged for rate in (0.01, 0.1, 0.03)]
    assert flags == [False, True, None]


def test_a_batch_has_a_result_or_an_error_in_every_place(client: Client) -> None:
    results = client.score_batch([("hello", "world"), ("hello", [1, 999]), ("a", "b")])
    assert isinstance(results[0], Detection)
    assert dataclasses.replace(results[0], seconds={}) == dataclasses.replace(
        client.score("hello", "world"), seconds={}
    )
    assert isinstance(results[1], InvalidRequest)
    assert results[1].field == "items[1].response.token_ids[1]"
    assert isinstance(results[2], Detection)
    assert results[2].state == "UNSCORED"


def test_generate(client: Client) -> None:
    *tokens, last = client.generate("hello", max_new_tokens=4)
    assert [token.index for token in tokens if isinstance(token, GeneratedToken)] == [0, 1, 2, 3]
    assert isinstance(last, Generation)
    assert (last.text, last.finish_reason) == ("ABCD", "LENGTH")
    assert client.score(last.prompt_token_ids, last.token_ids).logit == last.detection.logit


def written(client: Client, **options: Any) -> tuple[list[GeneratedToken], Generation]:
    """The tokens of a generation, and its end."""
    *tokens, last = client.generate("hello", **{"max_new_tokens": 9} | options)
    assert all(isinstance(token, GeneratedToken) for token in tokens)
    assert isinstance(last, Generation)
    return tokens, last  # type: ignore[return-value]


@pytest.mark.parametrize("stops", ["CD", ["CD"], ("X", "CD", "E")])
def test_a_generation_ends_before_a_stop_string(client: Client, stops: Any) -> None:
    _, last = written(client, stop_strings=stops)
    assert (last.text, last.finish_reason) == ("AB", "STOP_STRING")


def test_a_generation_ends_when_it_is_probably_made_up(client: Client) -> None:
    for least in (1, 4):
        tokens, last = written(client, stop_when_probability_above=0.01, minimum_tokens=least)
        assert (last.finish_reason, len(tokens)) == ("FLAGGED", least)
    assert written(client, stop_when_probability_above=0.999)[1].finish_reason == "LENGTH"


def test_scores_may_be_seldom(client: Client) -> None:
    tokens, _ = written(client, score_every=4)
    assert [token.index for token in tokens if token.probability is not None] == [3, 7, 8]


def test_contributions_come_when_asked_for(client: Client) -> None:
    tokens, last = written(client, contributions=True)
    for token in tokens:
        assert len(token.token_contributions) == 5 + token.index + 1
        assert token.logit is not None
        assert sum(token.token_contributions) + last.detection.bias == pytest.approx(token.logit, abs=1e-6)  # float32
    assert {token.token_contributions for token in written(client)[0]} == {()}


def test_every_score_may_name_its_probe(client: Client) -> None:
    for name in ("fake-probe", "other-probe"):
        assert client.score("hello", "world", probe=name).probe_name == name
        [detection] = client.score_batch([("hello", "world")], probe=name)
        assert isinstance(detection, Detection)
        assert detection.probe_name == written(client, probe=name)[1].detection.probe_name == name
    with pytest.raises(NotFound, match="known are") as caught:
        client.score("hello", "world", probe="nope")
    assert caught.value.field == "probe"
    with pytest.raises(PreconditionFailed, match="broken-probe"):
        client.score("hello", "world", probe="broken-probe")


def test_another_probe_can_be_activated_and_the_one_before_again() -> None:
    with Running(shelf=a_shelf("fake-probe", "other-probe")) as server, Client(server.target) as client:
        before = client.probe()
        change = client.activate_probe("other-probe")
        assert (change.active.name, change.active.state) == ("other-probe", "ACTIVE")
        assert (change.previous_name, change.previous_revision) == (before.name, before.revision)
        assert client.score("hello", "world").probe_name == client.server_info().probe_name == "other-probe"
        client.activate_probe(change.previous_name, change.previous_revision)
        assert client.probe() == before
        with pytest.raises(NotFound):
            client.activate_probe("nope")
        with pytest.raises(InvalidRequest):
            client.activate_probe("")


def test_heatmap(client: Client) -> None:
    heatmap = client.heatmap("q_value", feature=LAPLACIAN)
    expected = a_probe().head_map(LAPLACIAN, "Q_VALUE").values
    assert heatmap.values.shape == (2, 3)
    np.testing.assert_array_equal(np.array(heatmap.values.rows, dtype=np.float32), expected)
    assert heatmap.values[1, 2] == expected[1, 2]
    assert heatmap.values.rows[0] == tuple(expected[0].tolist())
    assert (heatmap.statistic, heatmap.layers) == ("Q_VALUE", (1, 2))
    assert (heatmap.column_label, heatmap.row_label) == ("head index", "layer index")
    assert heatmap.image == b""


def test_heatmap_as_a_picture(client: Client) -> None:
    assert client.heatmap(image="png").image.startswith(b"\x89PNG")
    assert b"<svg" in client.heatmap(image="svg").image


def test_probes(client: Client) -> None:
    found = client.probes()
    assert [(probe.name, probe.state) for probe in found] == [
        ("broken-probe", "REJECTED"),
        ("fake-probe", "ACTIVE"),
        ("other-probe", "LOADED"),
    ]
    assert found[0].state_message == "its sha256 differs"
    assert found[0].model is None
    assert found[1] == client.probe() == client.probe("fake-probe")
    assert found[1].metrics["auroc"] == 0.75
    assert found[1].thresholds[0].realised_rate is None
    assert (LAPLACIAN, "P_VALUE") in found[1].heatmaps


def test_probes_asks_for_every_page() -> None:
    names = [f"probe-{i:03d}" for i in range(120)]
    with Running(shelf=a_shelf(*names)) as server, Client(server.target) as client:
        assert [probe.name for probe in client.probes()] == names


def test_server_info(client: Client) -> None:
    info = client.server_info()
    assert (info.state, info.message) == ("SERVING", "")
    assert info.model is not None
    assert (info.model.name, info.max_tokens) == ("fake-model", 400)
    assert info.limits.max_batch_items == 64
    assert info.probe_name == "fake-probe"


def test_results_are_frozen_and_become_json(client: Client) -> None:
    *_, generation = client.generate("hello", max_new_tokens=2)
    results = [
        client.score("hello", "world"),
        generation,
        client.heatmap(image="png"),
        client.probe(),
        client.server_info(),
    ]
    for result in results:
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.state = "SCORED"  # type: ignore[misc, union-attr]


def test_nan_becomes_null() -> None:
    assert Matrix((1, 2), (math.nan, 1.0)).to_dict() == {"shape": [1, 2], "rows": [[None, 1.0]]}


def test_a_matrix_has_edges() -> None:
    matrix = Matrix((2, 3), tuple(range(6)))
    assert matrix[1, 0] == 3
    for place in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(IndexError, match=r"outside of \(2, 3\)"):
            matrix[place]


# Errors.


@pytest.mark.parametrize(
    ("prompt", "response", "field"),
    [
        ("", "x", "prompt.text"),
        ("x", "", "response.text"),
        ([], "x", "prompt"),
        ("x", [], "response"),
        ("x", [1, 2, 3, 256], "response.token_ids[3]"),
        ("x", [1, -1], "response.token_ids[1]"),
        ("x", "y" * 400, "response"),
        # The following never leave the client.
        ("x", [1, 2**31], "response.token_ids[1]"),
        ("x", [1, 2.0], "response.token_ids[1]"),
        ("x", [True], "response.token_ids[0]"),
        (["a", "b"], "x", "prompt.token_ids[0]"),
        ([{"role": "user"}], "x", "prompt.messages[0]"),
        ([{"role": "user", "content": 3}], "x", "prompt.messages[0]"),
        ([{"role": "user", "content": "a", "name": "b"}], "x", "prompt.messages[0]"),
        ([{"role": "user", "content": "a"}, 3], "x", "prompt.token_ids[0]"),
        (None, "x", "prompt"),
        (b"ab", "x", "prompt"),
        ({"role": "user", "content": "a"}, "x", "prompt"),
        ("half \ud800", "x", "prompt"),
        ([{"role": "user", "content": "\ud800"}], "x", "prompt.messages[0].content"),
    ],
)
def test_wrong_input_names_its_field(client: Client, prompt: Any, response: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.score(prompt, response)
    assert caught.value.field == field
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.message.startswith(f"{field}: ")


def test_a_wrong_item_of_a_batch_names_its_place(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.score_batch([("a", "b"), ("a", [1.5])])
    assert caught.value.field == "items[1].response.token_ids[0]"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2**40}, "max_new_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        # The following never leave the client.
        ({"max_new_tokens": 3.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"seed": "1"}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": [1]}, "top_p"),
        ({"false_positive_rate": "x"}, "false_positive_rate"),
    ],
)
def test_wrong_sampling_names_its_field(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(client.generate("hello", **options))
    assert caught.value.field == field


def test_numbers_of_other_libraries_are_numbers(client: Client) -> None:
    events = client.generate("hello", max_new_tokens=np.int64(2), temperature=np.float32(0.5))
    assert len(list(events)) == 3
    assert client.score("hello", "world", false_positive_rate=np.float64(0.1)).false_positive_rate == 0.1


def test_the_mend_is_that_of_the_field(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"response: is a dict; give text or a list of token ids$"):
        client.score("x", {"role": "user"})
    with pytest.raises(InvalidRequest, match=r"response.token_ids\[0\]: is 'a'; give text or a list of token ids$"):
        client.score("x", ["a"])
    with pytest.raises(InvalidRequest, match="prompt: is a NoneType; give text, a list of messages, or a list of"):
        client.score(None, "x")  # type: ignore[arg-type]


def test_names_are_text(client: Client) -> None:
    for call in (lambda: client.probe(3), lambda: client.heatmap(3), lambda: client.heatmap(probe=b"x")):  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="give text"):
            call()


def test_what_is_not_known_is_told_apart(client: Client) -> None:
    with pytest.raises(NotFound, match="no such probe; known are broken-probe, fake-probe"):
        client.probe("nope")
    with pytest.raises(NotFound):
        client.heatmap(probe="nope")
    with pytest.raises(InvalidRequest, match="feature: is not in probe fake-probe; known are") as caught:
        client.heatmap(feature="nope")
    assert caught.value.field == "feature"
    with pytest.raises(InvalidRequest, match="statistic: is 'nope'; known are P_VALUE, Q_VALUE"):
        client.heatmap("nope")
    with pytest.raises(InvalidRequest, match="image: is 'gif'; known are PNG, SVG"):
        client.heatmap(image="gif")  # type: ignore[arg-type]


def test_nine_megabytes_are_too_large_and_the_caller_must_act(client: Client) -> None:
    with pytest.raises(TooLarge, match="the server takes 8388608 in one message") as caught:
        client.score("x" * 9_000_000, "y")
    assert isinstance(caught.value, InvalidRequest)
    assert "caller" in caught.value.who_acts


def test_an_error_of_the_server_has_an_id() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with Running(FakeEngine(before=fail)) as server, Client(server.target) as client:
        with pytest.raises(ServerError) as caught:
            client.score("hello", "world")
        with pytest.raises(ServerError):
            next(client.generate("hello"))
    assert len(caught.value.error_id) == 12
    assert caught.value.error_id in str(caught.value)


def test_nobody_there() -> None:
    with (
        Client("localhost:1", timeout=WAIT) as client,
        pytest.raises(Unavailable, match="no Lapwing server answers at"),
    ):
        client.score("hello", "world")


def test_too_many_streams_say_when_to_come_again() -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate), limits=Limits(generate_streams=1)) as server, Client(server.target) as client:
        first = client.generate("hello", max_new_tokens=2)
        assert gate.reached.wait(WAIT)
        with pytest.raises(Overloaded) as caught:
            next(client.generate("hello"))
        assert caught.value.retry_after == 1.0
        assert caught.value.reason == "TOO_MANY_STREAMS"
        gate.open()
        assert len(list(first)) == 3
