"""The client: one method for each thing that a server does."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any, Literal, TypeVar

from lapwing_client import calls, many, plans, results
from lapwing_client.attention_header import header_request, known_of
from lapwing_client.attention_stream import AttentionStream
from lapwing_client.caller import Caller
from lapwing_client.connection import Connection
from lapwing_client.deadline import Timeout
from lapwing_client.errors import LapwingError
from lapwing_client.generation_stream import GenerationStream
from lapwing_client.many_threads import score_by_threads
from lapwing_client.requests import Prompt, Response
from lapwing_client.tls import TLS, Source

Item = TypeVar("Item", bound=Sequence[Any])


class Client(Caller):
    """Talks to a Lapwing server; may be shared by threads, also by those in which an event loop runs.

    Args:
        target: HOST:PORT; several of them, as a list or with commas, for replicas that take turns; or any other
            address that gRPC resolves, such as `dns:///NAME:PORT`.
        token: sent with every call; only to a server on this machine or over an encrypted connection.
        tls: how to encrypt: `True` to trust the authorities that this system trusts, a file or bytes with the
            certificates of others, or a `TLS` with a certificate of one's own; unencrypted without it.
        timeout: seconds that a call may take unless it is given its own.
        retry: whether calls are tried again, up to four times, when the server does not answer or has too much to do;
            of streams only those that have not begun, and only when it does not answer. A request of more than 1 MiB
            is sent once.

    Raises:
        InvalidRequest: an argument can't be used; `field` says which.

    Example:
        In a notebook, where a detection shows itself as a table and a heatmap as a picture:

        client = Client("localhost:50051")
        client.score("Question: which country is the city of Lyon in? Answer:", "Peru")
        client.heatmap("P_VALUE", image="png")
        for event in client.generate("Question: which country is the city of Kyoto in? Answer:"):
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

    def score(
        self,
        prompt: Prompt,
        response: Response,
        *,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> results.Detection:
        """How likely the response to the prompt is made up.

        Args:
            prompt: text, chat messages (`[{"role": "user", "content": "..."}]`), or token ids.
            response: text or token ids.
            false_positive_rate: operating point of `flagged`, in (0, 1); 0.05 without it.
            probe: name of the one that scores; the active one without it.
            timeout: seconds, or a `Deadline` that several calls share.

        Raises:
            LapwingError: see its subclasses.
        """
        return self._ask(
            calls.score(prompt, response, false_positive_rate=false_positive_rate, probe=probe),
            timeout,
        )

    def score_batch(
        self,
        items: Sequence[tuple[Prompt, Response]],
        *,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> list[results.Detection | LapwingError]:
        """The same for several responses in one call; an item that is refused has its error in its place.

        Args:
            items: (prompt, response) each as for `score`; at most `server_info().limits.max_batch_items`.
            false_positive_rate: as for `score`.
            probe: as for `score`.
            timeout: seconds for all of them.

        Raises:
            LapwingError: the whole call failed.
        """
        return self._ask(calls.score_batch(items, false_positive_rate=false_positive_rate, probe=probe), timeout)

    def score_many(
        self,
        items: Iterable[Item],
        *,
        concurrency: int = 16,
        progress: bool = True,
        false_positive_rate: float | None = None,
        probe: str = "",
        timeout: Timeout | None = None,
    ) -> Generator[tuple[Item, results.Detection | LapwingError], None, None]:
        """The same for as many responses as one likes, several at once, each in a call of its own.

        Args:
            items: (prompt, response) each as for `score`; read as they are needed, at most four for each that may be
                asked for at once ahead of the answers.
            concurrency: how many are asked for at the same time.
            progress: whether standard error shows how far it is, once it has taken two seconds.
            false_positive_rate: as for `score`.
            probe: as for `score`.
            timeout: seconds for each, in which it is asked for again while the server has too much to do.

        Returns:
            An iterator of (item, detection) in the order of the items. An item that is refused has its error in place
            of the detection; an error that all would get, such as a server that is gone, is raised. Leaving the
            iterator (`close`, or dropping it) ends the calls that run.

        Raises:
            InvalidRequest: there are no items to go through, or the concurrency is not a number from 1 to 1000.
        """
        many.require_items(items)
        options = {"false_positive_rate": false_positive_rate, "probe": probe}
        return score_by_threads(
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
    ) -> GenerationStream:
        """Lets the server's model write, token by token, and scores every token.

        Args:
            prompt: as for `score`.
            max_new_tokens: at most so many; without it 64, or as many as the server allows where that is less.
            temperature: 0, the default, takes the likeliest token each time.
            top_p: samples from the likeliest tokens that make up this probability, in (0, 1].
            seed: makes sampling repeatable.
            stop_strings: the response ends before the first of these.
            stop_when_probability_above: the response ends, `FLAGGED`, when its probability rises above this, in [0, 1).
            minimum_tokens: so many are written before that may end it; 1 without it.
            score_every: scores only one token of so many, and the last: 3 is every third; 1 without it.
            contributions: whether scored tokens say what each token so far adds to the score.
            false_positive_rate: as for `score`.
            probe: as for `score`.
            timeout: seconds for the whole response.

        Returns:
            An iterator of `GeneratedToken`, at the end one `Generation`. Leaving it (`with`, `close`, or dropping it)
            stops the model within a token.

        Raises:
            LapwingError: here or while iterating.
        """
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
        return GenerationStream(self, call, self._connection.deadline(timeout))

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
    ) -> AttentionStream:
        """Scores a response by its attention, of a model that runs elsewhere; also while it is being written.

        Args:
            model: which model it is: anything with the attributes or keys of `results.ModelIdentity`, such as what the
                detector's `identity_of(model, tokenizer)` returns. It must be the one that the probe was fitted on.
            layers: index in the model of each layer that is sent.
            heads: of each layer.
            prompt_tokens: tokens of the prompt.
            response_tokens: tokens of the response; as many as are sent without it.
            attention_sinks: whether the model has logits beside the keys, so that rows add up to less than 1.
            false_positive_rate: as for `score`.
            probe: as for `score`.
            timeout: seconds for the whole stream.

        Returns:
            A context: `send` what there is, `score_now` as often as wanted, `finish` for the score of the whole.

        Raises:
            LapwingError: here for what can't be sent, or while sending.
        """
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
        method, deadline = self._stubs.detector.ScoreAttention, self._connection.deadline(timeout)
        return AttentionStream(
            header,
            lambda outbox: self._call(method, outbox, deadline),
            lambda error: self._error_of(error, deadline),
        )

    def score_attention(
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
        """The same for attention that is all there.

        Args:
            chunks: each as for `AttentionStream.send`. What they know themselves, as the attributes `layers`, `heads`,
                `tokens` and `attention_sinks`, need not be given.
            model: as for `attention_stream`, like all others.
            prompt_tokens: tokens of the prompt.
            layers: index in the model of each layer that is sent.
            heads: of each layer.
            response_tokens: tokens of the response.
            attention_sinks: whether rows add up to less than 1.
            false_positive_rate: as for `score`.
            probe: as for `score`.
            timeout: seconds.

        Raises:
            LapwingError: see its subclasses.

        Example:
            with capture_attention(model) as captured:
                model.generate(**inputs)
            client.score_attention(captured.chunks(), model=identity_of(model, tokenizer), prompt_tokens=12)
        """
        given = {
            "layers": layers,
            "heads": heads,
            "response_tokens": response_tokens,
            "attention_sinks": attention_sinks,
        }
        known = known_of(chunks, prompt_tokens, given)
        options: dict[str, Any] = {"false_positive_rate": false_positive_rate, "probe": probe, "timeout": timeout}
        with self.attention_stream(model=model, prompt_tokens=prompt_tokens, **known, **options) as stream:
            for chunk in chunks:
                stream.send(chunk)
            return stream.finish()

    def heatmap(
        self,
        statistic: str = "P_VALUE",
        *,
        probe: str = "",
        feature: str = "",
        image: Literal["png", "svg"] | None = None,
        timeout: Timeout | None = None,
    ) -> results.Heatmap:
        """One number of every layer and head of a probe.

        Args:
            statistic: `P_VALUE`, `Q_VALUE`, `AUROC`, `EFFECT_SIZE`, `HEAD_PROBE`, `WEIGHT` or `SELECTED`.
            probe: its name; the active one without it.
            feature: id such as `laplacian_eigenvalues.v1`; the probe's first one without it.
            image: also draw it.
            timeout: seconds.

        Raises:
            LapwingError: `NotFound` for the probe, `InvalidRequest` for the rest.
        """
        return self._ask(calls.heatmap(statistic, probe, feature, image), timeout)

    def probes(self, *, timeout: Timeout | None = None) -> list[results.Probe]:
        """All probes of the server, by name; asks page by page, within the timeout for all."""
        return plans.follow(plans.every_probe(self._connection.deadline(timeout)), self._perform)

    def probe(self, name: str = "", *, timeout: Timeout | None = None) -> results.Probe:
        """One probe; the active one without a name."""
        return self._ask(calls.probe(name), timeout)

    def activate_probe(self, name: str, revision: str = "", *, timeout: Timeout | None = None) -> results.Activation:
        """Makes another probe, or another revision, the one that scores; needs a token with the scope "admin".

        Args:
            name: of the probe.
            revision: the one that the name stands for without it.
            timeout: seconds.

        Raises:
            LapwingError: `NotFound`, or `PreconditionFailed` for one that fails its checks: what scored before stays.
        """
        return self._ask(calls.activate_probe(name, revision), timeout)

    def reload_probes(self, *, timeout: Timeout | None = None) -> list[results.Probe]:
        """Makes the server look for new probes and revisions; needs a token with the scope "admin".

        Returns:
            All probes afterwards, those that failed their checks with the reason.
        """
        return self._ask(calls.reload_probes(), timeout)

    def server_info(self, *, timeout: Timeout | None = None) -> results.ServerInfo:
        """What runs there; answers also while the model is loading."""
        return self._ask(calls.server_info(), timeout)

    def wait_until_ready(self, timeout: Timeout | None = None) -> results.ServerInfo:
        """Waits until the server, or one of the replicas, is there and its model is loaded.

        Returns what `server_info` does, and so needs a token with the scope "read" where tokens are asked for.

        Raises:
            Unavailable: the server said that its model could not be loaded, fails, or does not come back.
            DeadlineExceeded: it took longer than the timeout.
            PermissionDenied, TLSError, Unimplemented: waiting would not help.
        """
        plan = plans.until_ready(self._connection.target, self._connection.deadline(timeout))
        return plans.follow(plan, self._perform)
