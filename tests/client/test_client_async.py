"""The client that awaits: the twin of the one that blocks, and what only it can do wrong."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from service_fakes import WAIT, FakeEngine, Gate, Running, a_shelf
from wire_server import WireServer

from lapwing_client import (
    AsyncAttentionStream,
    AsyncClient,
    AsyncGenerationStream,
    AttentionStream,
    Cancelled,
    Client,
    DeadlineExceeded,
    Generation,
    GenerationStream,
    InvalidRequest,
    LapwingError,
    NotFound,
    Unavailable,
)

# Twins.


def public(kind: type) -> dict[str, Any]:
    members = {name: member for base in reversed(kind.__mro__) for name, member in vars(base).items()}
    return {name: member for name, member in members.items() if not name.startswith("_") and callable(member)}


TWINS = [
    (Client, AsyncClient),
    (GenerationStream, AsyncGenerationStream),
    (AttentionStream, AsyncAttentionStream),
]


def first_line(member: Any) -> str:
    return (inspect.getdoc(member) or "").split("\n")[0].rstrip(".")


@pytest.mark.parametrize("twins", TWINS, ids=lambda pair: pair[0].__name__)
def test_twins_have_the_same_methods(twins: tuple[type, type]) -> None:
    assert set(public(twins[0])) == set(public(twins[1]))
    assert list(public(twins[0])) == list(public(twins[1])), "in the same order"
    assert "close" in public(twins[0]), "also what is inherited"


@pytest.mark.parametrize("name", ["__init__", *public(Client)])
def test_twins_take_the_same_arguments_and_say_the_same(name: str) -> None:
    one, other = getattr(Client, name), getattr(AsyncClient, name)
    for parameters in zip(*(inspect.signature(method).parameters.values() for method in (one, other)), strict=True):
        assert len({(parameter.name, parameter.kind, parameter.default) for parameter in parameters}) == 1
        annotations = [str(parameter.annotation) for parameter in parameters]
        assert annotations[1] in (annotations[0], f"{annotations[0]} | Async{annotations[0]}")
    if name != "__init__":
        assert first_line(one).split(";")[0] == first_line(other).split(";")[0]


def test_control_a_twin_that_differs_is_seen() -> None:
    one, other = inspect.signature(Client.score), inspect.signature(Client.probe)
    assert list(one.parameters.values()) != list(other.parameters.values())


# Every call, against a real server: both clients are answered alike.


CALLS = {
    "score": lambda client: client.score("hello", "world"),
    "score_batch": lambda client: client.score_batch([("hello", "world"), ("hello", [1, 999])]),
    "heatmap": lambda client: client.heatmap("AUROC", image="png"),
    "probes": lambda client: client.probes(),
    "probe": lambda client: client.probe(),
    "activate_probe": lambda client: client.activate_probe("fake-probe"),
    "reload_probes": lambda client: client.reload_probes(),
    "server_info": lambda client: client.server_info(),
    "wait_until_ready": lambda client: client.wait_until_ready(),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running(shelf=a_shelf("fake-probe", "other-probe", rejected=("broken-probe",))) as running:
        yield running


def timeless(value: Any) -> Any:
    """A value as JSON, without what a clock said."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def as_json(answer: Any) -> Any:
    return timeless([one.to_dict() for one in answer] if isinstance(answer, list) else answer.to_dict())


@pytest.mark.parametrize("name", CALLS)
def test_both_are_answered_alike(name: str, server: Running) -> None:
    async def ask() -> Any:
        async with AsyncClient(server.target) as client:
            return await CALLS[name](client)

    with Client(server.target) as client:
        expected = outcome(lambda: CALLS[name](client))
    assert outcome(lambda: asyncio.run(ask())) == expected


def outcome(ask: Any) -> Any:
    """The answer as JSON, or the error: a shelf without a directory reloads nothing."""
    try:
        return as_json(ask())
    except LapwingError as error:
        return type(error), error.reason, error.field


def test_both_generate_alike(server: Running) -> None:
    async def read() -> list[Any]:
        async with AsyncClient(server.target) as client:
            return [event async for event in client.generate("hello", max_new_tokens=5, contributions=True)]

    with Client(server.target) as client:
        expected = list(client.generate("hello", max_new_tokens=5, contributions=True))
    assert as_json(asyncio.run(read())) == as_json(expected)


def test_both_refuse_alike(server: Running) -> None:
    async def ask() -> None:
        async with AsyncClient(server.target) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.score("x", [1, 2, 999])
            assert caught.value.field == "response.token_ids[2]"
            with pytest.raises(NotFound):
                await client.probe("nope")
            with pytest.raises(InvalidRequest, match="prompt: is a NoneType"):
                await client.score(None, "x")  # type: ignore[arg-type]

    asyncio.run(ask())


def test_tasks_share_a_client_and_each_gets_its_own_answer(server: Running) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(server.target) as client:
            found = await asyncio.gather(*(client.score("prompt", f"response {i}") for i in range(40)))
            return [bytes(detection.token_ids).decode() for detection in found]

    assert asyncio.run(ask()) == [f"promptresponse {i}" for i in range(40)]


# Loops.


def test_it_may_be_made_before_a_loop_runs() -> None:
    with WireServer() as server:
        client = AsyncClient(server.target)

        async def ask() -> float | None:
            async with client:
                return (await client.score("a", "bc")).logit

        assert asyncio.run(ask()) == 2


def test_another_loop_is_told_apart() -> None:
    with WireServer() as server:
        client = AsyncClient(server.target)

        async def ask() -> None:
            await client.score("a", "b")

        asyncio.run(ask())
        with pytest.raises(RuntimeError, match="belongs to the event loop in which it is first used"):
            asyncio.run(ask())


def test_the_client_that_blocks_works_inside_of_a_running_loop() -> None:
    """As in a notebook, whose cells run inside of one."""

    async def cell(target: str) -> list[Any]:
        with Client(target) as client:
            pairs = [("a", "b" * i) for i in range(1, 9)]
            scored = [outcome.logit for _, outcome in client.score_many(pairs)]  # type: ignore[union-attr]
            return [client.score("a", "bc").logit, len(list(client.generate("a"))), scored]

    with WireServer() as server:
        assert asyncio.run(cell(server.target)) == [2, 4, list(range(1, 9))]


def test_both_kinds_work_side_by_side_in_one_loop() -> None:
    async def cell(target: str) -> list[Any]:
        with Client(target) as blocking:
            async with AsyncClient(target) as awaiting:
                return [blocking.score("a", "bc").logit, (await awaiting.score("a", "bcd")).logit]

    with WireServer() as server:
        assert asyncio.run(cell(server.target)) == [2, 3]


# Leaving.


async def close_it(stream: AsyncGenerationStream) -> None:
    await stream.close()
    await stream.close()
    with pytest.raises(LapwingError):
        await anext(stream)


async def leave_it(stream: AsyncGenerationStream) -> None:
    with pytest.raises(KeyError):
        async with stream:
            raise KeyError


@pytest.mark.parametrize("leave", [close_it, leave_it, None])
def test_leaving_a_generation_stops_the_model(leave: Any) -> None:
    gate, forwards = Gate(), itertools.count()

    def before() -> None:
        if next(forwards) >= 2:  # the prompt and the first token have been computed
            gate()

    engine = FakeEngine(before=before)

    async def read(target: str) -> None:
        async with AsyncClient(target) as client:
            stream = client.generate("hello", max_new_tokens=200)
            await anext(stream)
            assert await asyncio.to_thread(gate.reached.wait, WAIT), "the second token is being computed"
            if leave is None:
                del stream
                gc.collect()
            else:
                await leave(stream)
            await asyncio.wrap_future(server.begin(server.server.guard.idle()))

    with Running(engine) as server:
        asyncio.run(read(server.target))
        gate.open()
        server.settle()
    assert engine.steps == 2, "the one that was read and the one that was being computed"


def test_a_cancelled_task_cancels_its_call_and_stays_cancelled() -> None:
    waiting, gone = threading.Event(), threading.Event()

    def before(method: str, context: Any) -> None:
        context.add_callback(gone.set)
        waiting.set()
        gone.wait(WAIT)

    async def ask(target: str) -> None:
        async with AsyncClient(target) as client:
            task = asyncio.create_task(client.score("a", "b"))
            await asyncio.to_thread(waiting.wait, WAIT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(gone.wait, WAIT)

    with WireServer(before) as server:
        asyncio.run(ask(server.target))


def test_closing_ends_what_is_under_way_with_an_error_of_ours() -> None:
    waiting, gone = threading.Event(), threading.Event()

    def before(method: str, context: Any) -> None:
        context.add_callback(gone.set)
        waiting.set()
        gone.wait(WAIT)

    async def ask(target: str) -> None:
        client = AsyncClient(target, retry=False)
        task = asyncio.create_task(client.score("a", "b"))
        await asyncio.to_thread(waiting.wait, WAIT)
        await client.close()
        await client.close()
        with pytest.raises(Cancelled):
            await task
        for call in (client.score("a", "b"), client.wait_until_ready(), client.probes()):
            with pytest.raises(Cancelled, match="the client is closed"):
                await call
        with pytest.raises(Cancelled, match="the client is closed"):
            client.generate("a")

    with WireServer(before) as server:
        asyncio.run(ask(server.target))


def test_a_finished_stream_stays_finished(server: Running) -> None:
    async def read() -> None:
        async with AsyncClient(server.target) as client:
            stream = client.generate("hello", max_new_tokens=2)
            *_, last = [event async for event in stream]
            assert isinstance(last, Generation)
            assert [event async for event in stream] == []
            await stream.close()
            assert [event async for event in stream] == []

    asyncio.run(read())


# Time.


def test_every_call_has_a_deadline() -> None:
    gate = Gate()

    async def ask(target: str) -> None:
        async with AsyncClient(target, timeout=0.05) as client:
            for call in (client.score("hello", "world"), anext(client.generate("hello"))):
                with pytest.raises(DeadlineExceeded):
                    await call
            gate.open()
            assert (await client.score("hello", "world", timeout=WAIT)).probability

    with Running(FakeEngine(before=gate)) as server:
        asyncio.run(ask(server.target))


def test_waiting_for_a_server_that_is_not_there() -> None:
    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(DeadlineExceeded, match=r"nobody answers at 127\.0\.0\.1:1"):
                await client.wait_until_ready(0.2)
            with pytest.raises(Unavailable, match="start one: lapwing serve"):
                await client.score("a", "b")

    asyncio.run(ask())


def test_the_loop_goes_on_while_a_plan_waits() -> None:
    async def ask(target: str) -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        async with AsyncClient(target) as client:
            ticking = asyncio.create_task(tick())
            with pytest.raises(DeadlineExceeded):
                await client.wait_until_ready(0.3)
            ticking.cancel()
        return ticks

    with WireServer(serving=False) as server:
        assert asyncio.run(ask(server.target)) > 2, "control: a plan that blocks the loop leaves one"


def test_asynchronous_prompts_stream_in_order(server: Running) -> None:
    async def items() -> AsyncIterator[tuple[str, str]]:
        for i in range(10):
            yield "prompt", f"response {i}"

    async def ask() -> list[str]:
        async with AsyncClient(server.target) as client:
            return [bytes(o.token_ids).decode() async for _, o in client.score_many(items())]  # type: ignore[union-attr]

    assert asyncio.run(ask()) == [f"promptresponse {i}" for i in range(10)]
