"""Clients take turns: nobody waits longer because somebody else asks for much, and nobody takes all there is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from door_fakes import a_file, entry
from engine_fakes import FakeEngine, a_probe
from metrics_pages import registry_page
from scheduler_fakes import PROBE, a_desk, an_item, run
from service_fakes import WAIT, Gate, Running, told, wait_until

from lapwing.v1 import detector_pb2, detector_pb2_grpc
from lapwing_detector.options import GenerationOptions
from lapwing_server.admission import Places, TooLate
from lapwing_server.limits import Limits
from lapwing_server.metrics import Metrics
from lapwing_server.refusal import Refusal
from lapwing_server.scheduler import AT_ONCE, answer_all
from lapwing_server.security.principals import Principal
from lapwing_server.settings import Settings
from lapwing_server.waiting import Call, Entry, Waiting, call_of

ME, YOU = Principal("me", frozenset()), Principal("you", frozenset())


def a_call(client: str, *sizes: int) -> Call:
    return call_of([an_item("ab")] * len(sizes), list(sizes), 0.0, None, None, client)


def all_of(waiting: Waiting) -> Iterator[Entry]:
    while (entry := waiting.take()) is not None:
        yield entry


def some_waiting(seed: int) -> tuple[Waiting, random.Random]:
    """Calls of a few clients, some of which have had turns."""
    dice, waiting = random.Random(seed), Waiting()
    for _ in range(dice.randrange(12)):
        waiting.add(a_call(dice.choice("abcd"), *(dice.randrange(1, 99) for _ in range(dice.randrange(1, 9)))))
        if dice.random() < 0.3:
            waiting.take()
    return waiting, dice


@pytest.mark.parametrize(("greedy", "order"), [("you", "you me you me you you"), ("me", "me me me me me me")])
def test_clients_take_turns_and_then_their_calls(greedy: str, order: str) -> None:
    waiting = Waiting()
    calls = [a_call(greedy, 1, 1), a_call(greedy, 1), a_call(greedy, 1), a_call("me", 1, 1)]
    for call in calls:
        waiting.add(call)
    taken = list(all_of(waiting))
    assert " ".join(entry.call.client for entry in taken) == order
    of_greedy = [calls.index(entry.call) for entry in taken if entry.call is not calls[3]]
    assert of_greedy == [0, 1, 2, 0]
    last = max(place for place, entry in enumerate(taken) if entry.call is calls[3])
    assert last == (3 if greedy == "you" else 5), "control: among its own calls the new one waits for all"
    assert (waiting.items, waiting.tokens, waiting.items_of("me"), waiting.items_of("you")) == (0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_ahead_of_a_call_is_what_is_taken_before_its_last_item(seed: int) -> None:
    waiting, dice = some_waiting(seed)
    call = a_call(dice.choice("abcde"), *[1] * dice.randrange(1, 9))
    expected = waiting.ahead_of(call.items, call.client)
    waiting.add(call)
    before = 0
    for taken in all_of(waiting):
        if taken.call is call and taken.place == call.items - 1:
            break
        before += taken.size if taken.call is not call else 0
    assert before == expected


@pytest.mark.parametrize("seed", range(40))
def test_a_client_waits_for_one_turn_of_each_other_whatever_they_ask_for(seed: int) -> None:
    waiting, dice = some_waiting(seed)
    waiting.add(call := a_call("mine", *[1] * dice.randrange(1, 9)))
    mine = [place for place, entry in enumerate(all_of(waiting)) if entry.call is call]
    assert all(place < 5 * (turn + 1) for turn, place in enumerate(mine))


def test_who_leaves_takes_nothing_along() -> None:
    for seed in range(50):
        waiting, dice = some_waiting(seed)
        before = waiting.items, waiting.tokens, [waiting.items_of(client) for client in "abcd"]
        waiting.add(call := a_call(dice.choice("abcde"), 5, 6))
        assert waiting.items_of(call.client) >= 2
        assert (waiting.remove(call), waiting.remove(call)) == (2, 0)
        assert (waiting.items, waiting.tokens, [waiting.items_of(client) for client in "abcd"]) == before
        assert call not in [entry.call for entry in all_of(waiting)]


@pytest.mark.parametrize(("greedy", "before"), [("you", 2), ("me", 40)])
def test_a_small_call_does_not_wait_for_another_clients_many(greedy: str, before: int) -> None:
    """Control: with turns by call alone, it waited for one item of each of them."""

    async def main() -> None:
        async with a_desk(FakeEngine(before=Gate()), batch_forward_items=1) as desk:
            score = lambda text, client: asyncio.create_task(  # noqa: E731
                desk.scheduler.score([an_item(text)], client=client)
            )
            calls = [score("first", greedy)]
            await desk.reached(desk.engine.before)
            calls += [score(f"many {i}", greedy) for i in range(40)]
            await desk.queued(40)
            calls.append(score("small", "me"))
            await desk.queued(41)
            desk.engine.before.open()  # type: ignore[attr-defined]
            await asyncio.gather(*calls)
            texts = [bytes(ids).decode() for ids in desk.engine.scored]
            assert len([text for text in texts[: texts.index("small")] if text.startswith("many")]) < before + 1
            assert (texts.index("small") == 41) is (greedy == "me"), "control"

    run(main())


def test_shadows_wait_as_the_client_whose_response_they_score() -> None:
    async def main() -> None:
        async with a_desk() as desk:
            added: list[str] = []
            add = desk.scheduler._queue.add
            desk.scheduler._queue.add = lambda call: (added.append(call.client), add(call))[1]  # type: ignore[method-assign]
            options, shadow = GenerationOptions(max_new_tokens=3), a_probe("shadow-probe", bias=1.0)
            stream = desk.scheduler.generate("hello", PROBE, options, shadows=(shadow,), client="me")
            assert [event async for event in stream]
            await desk.settle()
            assert added == ["me"]

    run(main())


# What one client may have.


@pytest.mark.parametrize(("limits", "mine"), [({}, 4), ({"generate_streams": 1}, 1), ({"streams_per_client": 8}, 8)])
def test_one_client_takes_half_of_the_streams(limits: dict[str, Any], mine: int) -> None:
    counted = Places(Limits(**limits).for_many(), Metrics())
    taken = [counted.take("generate", ME) for _ in range(mine)]
    for place in taken:
        place.__enter__()
    with pytest.raises(Refusal):
        counted.take("generate", ME).__enter__()
    left = Limits(**limits).generate_streams - mine
    others = [counted.take("generate", YOU) for _ in range(left)]
    for place in others:
        place.__enter__()
    assert counted.taken == mine + left
    assert (left == 0) is (limits != {}), "control: where somebody says so, one takes all"


SMALL = Limits(queue_items=8, batch_items=4)


@pytest.mark.parametrize("apart", [True, False])
def test_only_clients_that_say_who_they_are_are_held_to_halves(tmp_path: Path, apart: bool) -> None:
    """All others may be one: on this machine, or behind a proxy."""
    given = {"limits": Limits(generate_streams=8, attention_total_bytes=2**31), **(tokens(tmp_path) if apart else {})}
    limits = Settings(**given).limits_in_force
    assert (limits.streams_of_one, limits.items_of_one, limits.attention_of_one) == (
        (4, 256, 2**30) if apart else (24, 512, 2**31)
    )
    with Running(**given) as server, grpc.insecure_channel(server.target) as channel:
        request = detector_pb2.GetServerInfoRequest()
        stub, metadata = detector_pb2_grpc.DetectorStub(channel), [("authorization", "Bearer my-token")]
        said = stub.GetServerInfo(request, timeout=WAIT, metadata=metadata).limits.max_streams_per_client
        assert said == server.server.scheduler.places._each == limits.streams_of_one


@pytest.mark.parametrize("name", ["streams_per_client", "queue_items_per_client", "attention_bytes_per_client"])
def test_control_what_somebody_says_is_no_half(name: str) -> None:
    limits = Limits(**{name: 7})
    assert getattr(limits.for_many(), name) == getattr(limits, name) == 7


@pytest.mark.parametrize(("items", "skipped"), [(3, 0), (4, 1)])
def test_shadows_take_no_place_that_their_client_could_need(items: int, skipped: int) -> None:
    """Of eight that its calls may take, what is scored for the metrics alone leaves half."""

    async def main() -> None:
        async with a_desk(queue_items=100, queue_items_per_client=8) as desk:
            busy = Gate()
            desk.worker.post(busy)
            for _ in range(items):
                desk.scheduler._queue.add(a_call("me", 1))
            desk.scheduler._queue.add(a_call("you", *[1] * 20))
            desk.scheduler._add_shadow(an_item("ab"), "me")
            assert desk.counted("lapwing_shadow_skips_total", reason="no_room") == skipped
            assert desk.scheduler._queue.items_of("me") == 4
            busy.open()

    run(main())


def score(stub: Any, token: str) -> Any:
    request = detector_pb2.ScoreRequest(prompt={"text": "hello"}, response={"text": "world"})
    return stub.Score.future(request, timeout=WAIT, metadata=[("authorization", f"Bearer {token}")])


def reason_of(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call.result(WAIT)
    assert told(caught.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    return told(caught.value).reason


def tokens(tmp_path: Path) -> dict[str, Any]:
    return {"tokens_file": a_file(tmp_path, entry("me", "my-token", "admin") + entry("you", "your-token", "score"))}


def test_one_client_fills_half_of_the_queue(tmp_path: Path) -> None:
    gate = Gate()
    with (
        Running(FakeEngine(before=gate), limits=SMALL, **tokens(tmp_path)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [score(stub, "my-token")]
        assert gate.reached.wait(WAIT)
        calls += [score(stub, "my-token") for _ in range(4)]
        server.queued(4)
        assert reason_of(score(stub, "my-token")) == "CLIENT_QUEUE_FULL"
        with pytest.raises(grpc.RpcError) as unknown:
            score(stub, "no-token").result(WAIT)
        assert unknown.value.code() is grpc.StatusCode.UNAUTHENTICATED, "who calls is asked first"
        calls += [score(stub, "your-token") for _ in range(4)]
        server.queued(8)
        assert reason_of(score(stub, "your-token")) == "QUEUE_FULL"
        gate.open()
        assert all(call.result(WAIT).detection.logit for call in calls)
        assert score(stub, "my-token").result(WAIT).detection.logit, "and is taken on again"
        seen = registry_page(server.server.metrics)
        assert [seen("shed_total", reason=reason) for reason in ("CLIENT_QUEUE_FULL", "QUEUE_FULL")] == [1, 1]


def test_control_who_need_not_say_who_they_are_share_all_of_it() -> None:
    """Behind a proxy all of them have one address."""
    gate = Gate()
    with Running(FakeEngine(before=gate), limits=SMALL) as server, grpc.insecure_channel(server.target) as channel:
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [score(stub, "nobody asks for it")]
        assert gate.reached.wait(WAIT)
        calls += [score(stub, "nobody asks for it") for _ in range(8)]
        server.queued(8)
        assert reason_of(score(stub, "nobody asks for it")) == "QUEUE_FULL"
        gate.open()
        assert all(call.result(WAIT).detection.logit for call in calls)


def test_turns_go_by_principal(tmp_path: Path) -> None:
    """Over the wire: what the handler tells the scheduler is who showed the token."""
    gate = Gate()
    batch = detector_pb2.ScoreBatchRequest(items=[{"prompt": {"text": "batch"}, "response": {"text": "!"}}] * 3)
    with (
        Running(FakeEngine(before=gate), limits=SMALL, **tokens(tmp_path)) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = detector_pb2_grpc.DetectorStub(channel)
        calls = [score(stub, "my-token")]
        assert gate.reached.wait(WAIT)
        calls.append(stub.ScoreBatch.future(batch, metadata=[("authorization", "Bearer my-token")]))
        calls.append(score(stub, "your-token"))
        server.queued(4)
        queue = server.server.scheduler._queue
        assert (queue.items_of("me"), queue.items_of("you")) == (3, 1)
        gate.open()
        assert all(call.result(WAIT) for call in calls)
    wait_until(lambda: queue.items == 0)


def test_the_answers_of_a_forward_are_given_a_few_at_a_time() -> None:
    """Whoever comes meanwhile need not wait until all of them are written."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls = [call_of([an_item("ab")], [1], 0.0, None, loop.create_future()) for _ in range(2 * AT_ONCE + 1)]
        for call in calls:
            call.settle(0, TooLate())
        answer_all(calls)
        counts: list[int] = []
        for _ in range(3):
            counts.append(sum(call.answer is not None and call.answer.done() for call in calls))
            await asyncio.sleep(0)
        assert counts == [AT_ONCE, 2 * AT_ONCE, 2 * AT_ONCE + 1]

    asyncio.run(main())
