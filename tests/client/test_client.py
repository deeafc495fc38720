"""The client against a real server: every method, deadlines, leaving, waiting."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
from service_fakes import LAPLACIAN, WAIT, FakeEngine, Gate, Running, a_probe, a_shelf

from lapwing_client import (
    Client,
    DeadlineExceeded,
    Detection,
    GeneratedToken,
    Generation,
    InvalidRequest,
    LapwingError,
    Matrix,
    NotFound,
    Overloaded,
    ServerError,
    TooLarge,
    Unavailable,
)
from lapwing_client.client import channel_options, is_local
from lapwing_detector.errors import ProbeCorrupt
from lapwing_server.engine import Loaded
from lapwing_server.limits import Limits
from lapwing_server.refusal import Refusal


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
    ],
)
def test_wrong_sampling_names_its_field(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(client.generate("hello", **options))
    assert caught.value.field == field


def test_what_is_not_known_is_told_apart(client: Client) -> None:
    with pytest.raises(NotFound, match="no probe 'nope'; known are broken-probe, fake-probe"):
        client.probe("nope")
    with pytest.raises(NotFound):
        client.heatmap(probe="nope")
    with pytest.raises(InvalidRequest, match="feature: 'nope' is not in probe fake-probe; known are") as caught:
        client.heatmap(feature="nope")
    assert caught.value.field == "feature"
    with pytest.raises(InvalidRequest, match="statistic: is 'nope'; known are P_VALUE, Q_VALUE"):
        client.heatmap("nope")
    with pytest.raises(InvalidRequest, match="image: is 'gif'; known are PNG, SVG"):
        client.heatmap(image="gif")  # type: ignore[arg-type]


def test_nine_megabytes_are_too_large_and_the_caller_must_act(client: Client) -> None:
    with pytest.raises(TooLarge, match=r"server_info\(\).limits") as caught:
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


# Time.


@pytest.mark.parametrize("call", ["score", "score_batch", "generate"])
def test_every_call_has_a_deadline(call: str) -> None:
    gate = Gate()
    with Running(FakeEngine(before=gate)) as server, Client(server.target, timeout=0.05) as client:
        calls: dict[str, Callable[[], object]] = {
            "score": lambda: client.score("hello", "world"),
            "score_batch": lambda: client.score_batch([("hello", "world")]),
            "generate": lambda: next(client.generate("hello")),
        }
        with pytest.raises(DeadlineExceeded):
            calls[call]()
        gate.open()
        assert client.score("hello", "world", timeout=WAIT).probability, "a call may be given its own"


# Leaving.


def leave_by_closing(client: Client, computing: Any) -> None:
    stream = client.generate("hello", max_new_tokens=200)
    next(stream)
    computing()
    stream.close()
    stream.close()
    with pytest.raises(LapwingError):
        next(stream)


def leave_by_with(client: Client, computing: Any) -> None:
    with client.generate("hello", max_new_tokens=200) as stream:
        next(stream)
        computing()


def leave_by_dropping(client: Client, computing: Any) -> None:
    for _ in client.generate("hello", max_new_tokens=200):
        computing()
        break
    gc.collect()


def leave_by_raising(client: Client, computing: Any) -> None:
    with suppress(KeyError), client.generate("hello", max_new_tokens=200) as stream:
        next(stream)
        computing()
        raise KeyError


@pytest.mark.parametrize("leave", [leave_by_closing, leave_by_with, leave_by_dropping, leave_by_raising])
def test_leaving_a_generation_stops_the_model(leave: Any) -> None:
    gate, passed = Gate(), threading.Event()

    def before() -> None:
        gate() if passed.is_set() else passed.set()

    def computing() -> None:
        assert gate.reached.wait(WAIT), "the second token is being computed"

    engine = FakeEngine(before=before)
    with Running(engine) as server, Client(server.target) as client:
        leave(client, computing)
        server.call(asyncio.wait_for(server.server.guard.idle(), WAIT))
        gate.open()
        server.settle()
    assert engine.steps == 2, "the one that was read and the one that was being computed"


# Readiness.


def test_waiting_for_a_server_that_is_ready(server: Running) -> None:
    with Client(server.target) as client:
        assert client.wait_until_ready(WAIT).state == "SERVING"


def test_waiting_for_a_server_that_is_loading() -> None:
    gate = Gate()

    def load() -> Loaded:
        gate()
        return Loaded(FakeEngine(), a_shelf())

    with Running(load=load, ready=False) as server, Client(server.target) as client:
        with pytest.raises(DeadlineExceeded, match=r"not ready after 0.2 s: model and probe are being loaded"):
            client.wait_until_ready(0.2)
        threading.Timer(0.1, gate.open).start()
        assert client.wait_until_ready(WAIT).state == "SERVING"


def test_waiting_for_a_server_that_is_not_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(DeadlineExceeded, match=r"nobody answers at 127\.0\.0\.1:1"):
        client.wait_until_ready(0.2)


def test_waiting_for_a_server_that_failed_ends_at_once() -> None:
    def load() -> Loaded:
        raise ProbeCorrupt("the probe is torn")

    with Running(load=load) as server, Client(server.target) as client, pytest.raises(Unavailable, match="is torn"):
        client.wait_until_ready(60.0)


def test_a_client_outlives_a_restart_of_its_server() -> None:
    with Running() as first, Client(first.target) as client:
        assert client.score("hello", "world").probability
        first.close()
        with pytest.raises(Unavailable):
            client.score("hello", "world")
        with Running(port=first.port):
            client.wait_until_ready(WAIT)
            assert client.score("hello", "world").probability


# The connection.


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("unix:/run/lapwing", True),
        ("example.org:50051", False),
        ("127.0.0.1.example.org:50051", False),
        ("localhost.example.org:50051", False),
        ("192.0.2.1:50051", False),
        ("dns:///localhost:50051", False),
    ],
)
def test_a_token_stays_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) == local
    if local:
        Client(target, token="secret").close()
    else:
        with pytest.raises(ValueError, match="a token goes only to this machine") as caught:
            Client(target, token="secret")
        assert "secret" not in str(caught.value)


def test_the_token_is_sent_with_every_call() -> None:
    seen: list[Any] = []
    with Running() as server, Client(server.target, token="secret") as client:
        enter = server.server.guard._enter

        def spy(method: str, context: Any) -> None:
            seen.append((method, dict(context.invocation_metadata()).get("authorization")))
            enter(method, context)

        server.server.guard._enter = spy  # type: ignore[method-assign]
        client.wait_until_ready(WAIT)
        client.score("hello", "world")
        list(client.generate("hello", max_new_tokens=1))
        client.probes()
    assert {token for _, token in seen} == {"Bearer secret"}
    assert len({method for method, _ in seen}) == 5


def test_a_server_that_goes_away_is_tried_again() -> None:
    options = dict(channel_options(True))
    [config] = json.loads(options["grpc.service_config"])["methodConfig"]
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert [one["service"] for one in config["name"]] == ["lapwing.v1.Detector", "lapwing.v1.Probes"]
    assert "grpc.service_config" not in dict(channel_options(False))


@pytest.mark.parametrize("retry", [True, False])
def test_a_call_that_was_refused_once_succeeds_only_with_retries(retry: bool) -> None:
    refusals = iter([True])

    def before() -> None:
        if next(refusals, False):
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING", "going away")

    with Running(FakeEngine(before=before)) as server, Client(server.target, retry=retry) as client:
        if retry:
            assert client.score("hello", "world").probability
        else:
            with pytest.raises(Unavailable, match="going away"):
                client.score("hello", "world")
