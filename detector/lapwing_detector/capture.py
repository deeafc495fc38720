"""Captures the attention of a model's own forwards and generations, as two sums per layer, head and token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lapwing_detector.cache_mark import CacheMark, cache_in, past_length, require_room
from lapwing_detector.chunks import MAX_BYTES, AttentionChunks, Given
from lapwing_detector.decoding import plan_decoding
from lapwing_detector.eager_fallback import EagerFallback, reduce_map
from lapwing_detector.errors import CaptureError, InvalidInput
from lapwing_detector.forward import Forward, dropping, require_evaluation, require_plain, require_unpacked
from lapwing_detector.generation_run import Endings, Pending, Run
from lapwing_detector.layers import AttentionLayer, attention_layers, eager_layers, kept_heads
from lapwing_detector.reading import Reader
from lapwing_detector.rotary import reach_of, require_same_frequencies, switching_points
from lapwing_detector.sequences import Sequences
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.switch import AttentionSwitch, shadow


def capture_attention(
    model: PreTrainedModel,
    *,
    heads: Mapping[int, Collection[int]] | None = None,
    fallback: Literal["eager"] | None = None,
) -> Captured:
    """Capture the attention of everything that the model does inside the context.

        with capture_attention(model) as captured:
            model.generate(**inputs)
        summaries = captured.summaries()

    Inside the context the model is tied to its capture: a copy of it (`copy.deepcopy`) made there computes nothing,
    so copy it before or after.

    Args:
        model: a decoder whose attention goes through transformers' attention interface, in evaluation mode.
        heads: layer index -> the heads to keep, such as `probe.heads`. Other layers run by plain SDPA (by ours where
            SDPA is not supported) and are absent from the summaries; other heads of these layers are NaN there. All
            without it.
        fallback: for models whose attention does not: `eager` lets each layer compute its whole map, which is reduced
            at once and dropped. Slower, and it needs the memory of one map; call the model under `torch.no_grad()` or
            in inference mode, or autograd keeps them all. Of no effect where it is not needed.

    Raises:
        UnsupportedModel: the attention of this model can't be captured.
        InvalidInput: `heads` names a layer that has no attention, or no head; there is no such fallback.
    """
    return Captured(model, heads, fallback)


class Captured:
    """The attention of the newest batch of sequences that a model worked on. Made by `capture_attention`.

    A context; the model is captured inside it, and as it was before outside.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Mapping[int, Collection[int]] | None = None,
        fallback: Literal["eager"] | None = None,
    ) -> None:
        if fallback not in (None, "eager"):
            raise InvalidInput("fallback", f"is {fallback!r}; it must be 'eager', or None")
        eager = eager_layers(model) if fallback == "eager" else None
        layers = attention_layers(model) if eager is None else eager
        self._kept = kept_heads(layers, heads)
        self._layers = tuple(layer for layer in layers if self._kept is None or layer.index in self._kept)
        self._model = model
        self._layer_of: dict[nn.Module, Any] = {layer.module: layer for layer in layers}
        self._switch = (
            AttentionSwitch(model, layers, self._attention)
            if eager is None
            else EagerFallback(model, self._layers, self._map)
        )
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._switching = switching_points(model.config.get_text_config(decoder=True))
        self._dropping: tuple[tuple[str, nn.Module], ...] = ()
        self._causal: set[int] = set()
        self._look_again = True
        self._active: ExitStack | None = None
        self._reader = Reader()
        self._sequences = Sequences(self._layers, self._kept)
        self._mark: CacheMark | None = None
        self._forward: Forward | None = None
        self._run: Run | None = None
        self._pending: Pending | None = None
        self._given = Given()

    def __enter__(self) -> Self:
        if self._active is not None:
            raise CaptureError("this capture is active already; leave its context before entering it again")
        with ExitStack() as stack:
            self._look_again = True
            self._switch.on()
            stack.callback(self._switch.off)
            stack.callback(self._reader.clear)
            stack.callback(self._model.register_forward_pre_hook(self._open, with_kwargs=True).remove)
            stack.callback(self._model.register_forward_hook(self._close).remove)
            if hasattr(self._model, "generate"):
                stack.callback(shadow(self._model, "generate", self._generate))
                # Every `generate` makes its stopping criteria by this method, however it was come by.
                stack.callback(shadow(self._model, "_get_stopping_criteria", self._watch_endings))
            self._active = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def resume(self) -> Self:
        """The context again, later, with what was captured so far: to go on with the same cache."""
        return self

    def take_over(self, sequences: Sequences, cache: Cache) -> None:
        """Go on, with the next forward, from sums and a cache of forwards that were captured by this capture.

        Args:
            sequences: as `sums` had them, or `gathered` of such.
            cache: with the same sequences, column by column.
        """
        self._forward = self._pending = None
        self._sequences, self._mark = sequences, CacheMark(cache)
        # To look for what drops out, or is not causal, takes as long as a part of a layer: much for a small model.
        self._look_again = not self._dropping

    def forget(self) -> None:
        """Let go of what was captured, so that its memory can be used for other things."""
        self._forward = self._pending = self._mark = None
        self._sequences = Sequences(self._layers, self._kept)

    def complete(self) -> None:
        """Run the step that gives the newest token of each generated sequence its row, unless it has ended.

        Works inside the context and outside. It feeds that token to the cache of the generation, and lets go of
        the cache. A second call does nothing.

        Raises:
            CaptureError: the generation's static cache has no room for it, was changed, or holds other rotary
                frequencies than the step needs.
        """
        pending = self._pending
        if pending is None:
            return
        assert pending.run.cache is not None
        require_room(pending.run.cache, self._sequences.tokens)
        with self if self._active is None else ExitStack():
            self._step(pending)

    def summaries(self) -> list[AttentionSummary]:
        """One for each sequence of the newest batch, padding and finished rows left out; calls `complete`.

        Raises:
            CaptureError: nothing was captured, the last forward failed, or layers differ in their number of heads.
        """
        self._require_whole()
        self.complete()
        return self._sequences.summaries()

    def chunks(
        self,
        max_bytes: int = MAX_BYTES,
        *,
        sequence: int | None = None,
        final: bool = True,
        from_start: bool = False,
    ) -> AttentionChunks:
        """What was captured of a sequence since the last call, in pieces, for a server that scores it.

            with capture_attention(model) as captured:
                model.generate(**inputs)
            detection = client.score_attention(captured.chunks(), model=identity_of(model, tokenizer), ...)

        Args:
            max_bytes: of the arrays of one piece.
            sequence: place in the batch; may be left out where there is one.
            final: call `complete` first. False while the model still generates, such as in a streamer.
            from_start: everything once more, as if it were the first call.

        Raises:
            InvalidInput: there are several sequences and none is named, or one head is larger than `max_bytes`.
            CaptureError: as for `summaries`.
        """
        self._require_whole()
        if final:
            self.complete()
        return self._given.rest(self._sequences, sequence, from_start, max_bytes=max_bytes)

    @property
    def layers(self) -> tuple[int, ...]:
        """Index in the model of each captured layer."""
        return tuple(layer.index for layer in self._layers)

    @property
    def sums(self) -> Sequences:
        """What the summaries are made of, as it stands now, of the tokens that the model was fed: for `RunningLogits`.

        Raises:
            CaptureError: the last forward failed.
        """
        self._require_whole()
        return self._sequences

    def _require_whole(self) -> None:
        if self._forward is not None:
            raise CaptureError(
                "the last forward did not finish, so its sums are not whole; run it again from the start"
            )

    # What the model calls.

    def _open(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        past = past_length(cache)
        reach = reach_of(given, past) if self._switching else 0
        if self._look_again:
            self._dropping, self._look_again = dropping(self._model), False
            self._causal.clear()
        require_evaluation(self._dropping)
        require_unpacked(given)
        if past > 0:
            assert cache is not None
            self._require_continuation(cache, past)
            require_same_frequencies(self._switching, self._sequences.reach, reach)
        # Only now, that nothing was refused, is what was captured before let go.
        self._pending = None
        if past == 0:
            self._sequences, self._mark = Sequences(self._layers, self._kept), None
        self._sequences.reach, self._sequences.ends = reach, self._ends()
        if self._run is not None:
            kept = {name: given.get(name) for name in ("position_ids", "token_type_ids")}
            self._run.inputs = {name: value for name, value in kept.items() if value is not None}
        self._forward = Forward(past, self._sequences.batch, self._sequences.ends)
        if isinstance(self._switch, EagerFallback):
            self._switch.begin(given, past)

    def _close(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._forward
        if forward is None:
            raise CaptureError(
                "a forward ended that never began here; enter the context before the model is called, not within"
            )
        missing = [layer.name for layer in self._layers if layer.index not in forward.reported]
        if missing:
            raise CaptureError(f"{', '.join(missing)} did not report; every layer's attention must be seen, or none")
        assert forward.visible is not None
        self._sequences.close()
        self._sequences.tokens = forward.tokens
        self._sequences.visible.add(forward.visible)
        self._sequences.counted.add(forward.counted)
        cache = cache_in(output)
        self._mark = None if cache is None else CacheMark(cache)
        if self._run is not None:
            self._run.cache = cache
        self._forward = None

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls in place of its own attention functions."""
        layer, forward = self._layer_of.get(module), self._forward
        if layer is None and forward is not None:
            raise CaptureError(
                f"{type(module).__name__} is no layer of the decoder, whose attention is captured; give text only, "
                "without images or sounds"
            )
        if layer is None or forward is None:
            raise CaptureError(
                f"{type(module).__name__} computed attention outside of a forward of the captured "
                f"{type(self._model).__name__}; call the model itself, not a part of it"
            )
        require_plain(layer, dropout, is_causal, others, self._causal)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if not self._sequences.keeps(layer) and softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
        place = forward.report(layer, query, key, attention_mask)
        mechanism = {"scaling": scaling, "softcap": softcap, "sinks": s_aux}
        return self._reader.read(self._sequences, layer, query, key, value, place, mechanism), None

    def _map(self, layer: AttentionLayer, attention: Tensor, mask: Tensor) -> None:
        """What a layer that runs eagerly hands over; see EagerFallback."""
        forward = self._forward
        if forward is None:
            raise CaptureError(
                f"{layer.name} computed attention outside of a forward of the captured {type(self._model).__name__}; "
                "call the model itself, not a part of it"
            )
        place = forward.report(layer, attention, attention.transpose(-1, -2), mask)  # only shapes are looked at
        self._sequences.add(layer, *reduce_map(layer, attention, mask, place), forward.tokens)

    # Sequences that go on, and that end.

    def _require_continuation(self, cache: Cache, past: int) -> None:
        if self._forward is not None:
            raise CaptureError("the forward before did not finish; start again from an empty cache")
        if past == self._sequences.tokens and self._mark is None:
            raise CaptureError(
                f"{type(self._model).__name__} did not return the cache that its forward filled, so whether it is "
                "the same one is not known; score the text in one forward"
            )
        if past != self._sequences.tokens or self._mark is None:
            raise CaptureError(
                f"the cache holds {past} tokens, {self._sequences.tokens} of them were captured; run all forwards "
                "that fill it inside the context, and do not crop it"
            )
        self._mark.require(cache)
        if self._ends() is None and self._sequences.any_ended:  # within one `generate` they stay in the batch
            raise CaptureError(
                "some sequences of this batch have ended and were fed padding; they can't go on, start a new batch"
            )

    def _ends(self) -> Tensor | None:
        """(batch,) where the sequences of the generation that is running end; None before its first new token."""
        return None if self._run is None or self._run.endings is None else self._run.endings.ends

    def _watch_endings(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Endings:
        """In place of the method by which `generate` makes its stopping criteria."""
        if self._run is None:
            raise CaptureError(
                "generate runs past the capture, as it was taken from the model before the context or from its "
                "class; call model.generate(...) itself inside the context"
            )
        if self._run.endings is not None:
            raise CaptureError("generate was called while it was running; finish one generation before the next")
        self._run.endings = Endings(original(*args, **kwargs))
        return self._run.endings

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `model.generate`."""
        if self._run is not None:
            raise CaptureError("generate was called while it was running; one generation at a time")
        arguments = plan_decoding(self._model, args, kwargs)
        run = self._run = Run()
        try:
            result = original(**arguments)
        finally:
            self._run = None
        if run.endings is None or run.endings.ends is None:
            raise CaptureError(
                f"{type(self._model).__name__}.generate does not decide by transformers' stopping criteria, so where "
                "its sequences end is not known; score the finished text in one forward"
            )
        if run.cache is None:
            raise CaptureError(
                f"{type(self._model).__name__} generates without a cache, beginning anew with every token; score the "
                "finished text in one forward"
            )
        ids = result if isinstance(result, Tensor) else result.sequences
        unfed = ids.shape[1] - self._sequences.tokens
        if unfed not in (0, 1):  # 0 where stopping is noticed a step late
            raise CaptureError(
                f"generate returned {ids.shape[1]} tokens, {self._sequences.tokens} of them were captured; "
                "leave out what adds or removes tokens, or score the finished text in one forward"
            )
        if unfed and bool((run.endings.ends > self._sequences.tokens).any()):
            self._pending = Pending(run, ids[:, -1])
        return result

    def _step(self, pending: Pending) -> None:
        """Feed the newest tokens, as `generate` would have done had it gone on."""
        cache, mark = pending.run.cache, self._mark
        assert mark is not None
        inputs = {name: value[..., -1:] for name, value in pending.run.inputs.items()}
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + 1
        known = self._sequences.visible.all
        visible = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
        if not bool(visible.all()):
            inputs["attention_mask"] = visible.long()
        self._run = pending.run
        try:
            with torch.inference_mode(mark.inference), torch.no_grad():  # in this order: the former sets the latter
                self._model(input_ids=pending.tokens[:, None], past_key_values=cache, use_cache=True, **inputs)
        finally:
            self._run = None
