"""The client for programs that await: `Client`'s twin, method by method."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from lapwing_client import calls, many, plans, results
from lapwing_client.attention_header import header_request, known_of
from lapwing_client.attention_stream import AsyncAttentionStream
from lapwing_client.caller import AsyncCaller
from lapwing_client.connection import Connection
from lapwing_client.deadline import Timeout
from lapwing_client.errors import LapwingError
from lapwing_client.generation_stream import AsyncGenerationStream
from lapwing_client.many_tasks import score_by_tasks
from lapwing_client.requests import Prompt, Response
from lapwing_client.tls import TLS, Source

Item = TypeVar("Item", bound=Sequence[Any])


class AsyncClient(AsyncCaller):
    """Talks to a Lapwing server; for one event loop, the one in which it is first used.

    Every method has the arguments, answers and errors of the same one of `Client`, where they are explained. Those that
    return a stream (`generate`, `score_many`, `attention_stream`) are not awaited; the stream is.

    Example:
        async with AsyncClient("localhost:50051") as client:
            async for event in client.generate("Question: which country is the city of Kyoto in? Answer:"):
                print(event)
    """

    def __init__(
        self,
        target: str | Sequence[str] = "localhost:50051",
        *,
        token: str | None = None,
        tls: bool | Source | TLS | None = None,
        timeout: Timeout = 60.0,
        retry: bool = True,
    ) -> None:
        super().__init__(Connection(target, token, tls, timeout, retry))

    async def score(
        self,
        prompt: Prompt,
        response: Response,
        *,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> results.Detection:
        """How likely the response to the prompt is made up."""
        return await self._ask(
            calls.score(prompt, response, false_positive_rate=false_positive_rate, probe=probe),
            timeout,
        )

    async def score_batch(
        self,
        items: Sequence[tuple[Prompt, Response]],
        *,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> list[results.Detection | LapwingError]:
        """The same for several responses in one call; an item that is refused has its error in its place."""
        return await self._ask(calls.score_batch(items, false_positive_rate=false_positive_rate, probe=probe), timeout)

    def score_many(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        concurrency: int = 16,
        progress: bool = True,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> AsyncGenerator[tuple[Item, results.Detection | LapwingError], None]:
        """The same for as many responses as one likes, several at once, each in a call of its own.

        The items may come from an asynchronous iterable, too.
        """
        many.require_items(items, "__aiter__")
        options = {"false_positive_rate": false_positive_rate, "probe": probe}
        return score_by_tasks(
            items,
            lambda item: many.outcome(item, options, self._connection.deadline(timeout)),
            self._perform,
            many.at_once(concurrency),
            progress,
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_strings: str | Sequence[str] = (),
        stop_when_probability_above: float | None = None,
        minimum_tokens: int | None = None,
        score_every: int | None = None,
        contributions: bool = False,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> AsyncGenerationStream:
        """Lets the server's model write, token by token, and scores every token."""
        call = calls.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_strings=stop_strings,
            stop_when_probability_above=stop_when_probability_above,
            minimum_tokens=minimum_tokens,
            score_every=score_every,
            contributions=contributions,
            false_positive_rate=false_positive_rate,
            probe=probe,
        )
        return AsyncGenerationStream(self, call, self._connection.deadline(timeout))

    def attention_stream(
        self,
        *,
        model: Any,
        layers: Sequence[int],
        heads: int,
        prompt_tokens: int,
        response_tokens: int | None = None,
        attention_sinks: bool | None = None,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> AsyncAttentionStream:
        """Scores a response by its attention, of a model that runs elsewhere; the stream's methods are awaited."""
        header = header_request(
            model,
            layers,
            heads,
            prompt_tokens,
            response_tokens=response_tokens,
            attention_sinks=attention_sinks,
            false_positive_rate=false_positive_rate,
            probe=probe,
        )
        deadline = self._connection.deadline(timeout)
        return AsyncAttentionStream(
            header,
            lambda: self._begin(calls.score_attention(), deadline),
            lambda answer: self._read(answer, deadline),
        )

    async def score_attention(
        self,
        chunks: Iterable[Any],
        *,
        model: Any,
        prompt_tokens: int,
        layers: Sequence[int] | None = None,
        heads: int | None = None,
        response_tokens: int | None = None,
        attention_sinks: bool | None = None,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> results.Detection:
        """The same for attention that is all there."""
        given = {
            "layers": layers,
            "heads": heads,
            "response_tokens": response_tokens,
            "attention_sinks": attention_sinks,
        }
        known = known_of(chunks, prompt_tokens, given)
        options: dict[str, Any] = {"false_positive_rate": false_positive_rate, "probe": probe, "timeout": timeout}
        async with self.attention_stream(model=model, prompt_tokens=prompt_tokens, **known, **options) as stream:
            for chunk in chunks:
                await stream.send(chunk)
            return await stream.finish()

    async def heatmap(
        self,
        statistic: str = "P_VALUE",
        *,
        probe: str = "",
        feature: str = "",
        image: Literal["png", "svg"] | None = None,
        timeout: Timeout | None = None,
    ) -> results.Heatmap:
        """One number of every layer and head of a probe."""
        return await self._ask(calls.heatmap(statistic, probe, feature, image), timeout)

    async def probes(self, *, timeout: Timeout | None = None) -> list[results.Probe]:
        """All probes of the server, by name; asks page by page, within the timeout for all."""
        return await plans.follow_async(plans.every_probe(self._connection.deadline(timeout)), self._perform)

    async def probe(self, name: str = "", *, timeout: Timeout | None = None) -> results.Probe:
        """One probe; the active one without a name."""
        return await self._ask(calls.probe(name), timeout)

    async def activate_probe(
        self, name: str, revision: str = "", *, timeout: Timeout | None = None
    ) -> results.Activation:
        """Makes another probe, or another revision, the one that scores; needs a token with the scope "admin"."""
        return await self._ask(calls.activate_probe(name, revision), timeout)

    async def reload_probes(self, *, timeout: Timeout | None = None) -> list[results.Probe]:
        """Makes the server look for new probes and revisions; needs a token with the scope "admin"."""
        return await self._ask(calls.reload_probes(), timeout)

    async def server_info(self, *, timeout: Timeout | None = None) -> results.ServerInfo:
        """What runs there; answers also while the model is loading."""
        return await self._ask(calls.server_info(), timeout)

    async def wait_until_ready(self, timeout: Timeout | None = None) -> results.ServerInfo:
        """Waits until the server, or one of the replicas, is there and its model is loaded."""
        plan = plans.until_ready(self._connection.target, self._connection.deadline(timeout))
        return await plans.follow_async(plan, self._perform)
