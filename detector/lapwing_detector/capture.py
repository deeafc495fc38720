"""Captures the attention of a model's own forwards and generations, as two sums per layer, head and token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lapwing_detector.attention import attend
from lapwing_detector.cache_mark import CacheMark, cache_in, past_length, require_room
from lapwing_detector.decoding import Decoding, plan_decoding
from lapwing_detector.errors import CaptureError
from lapwing_detector.forward import Forward, require_plain, require_unpacked
from lapwing_detector.layers import attention_layers
from lapwing_detector.sequences import LayerSums, Sequences
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.switch import AttentionSwitch


def capture_attention(model: PreTrainedModel) -> Captured:
    """Capture the attention of everything that the model does inside the context.

        with capture_attention(model) as captured:
            model.generate(**inputs)
        summaries = captured.summaries()

    Args:
        model: a decoder whose attention goes through transformers' attention interface, in evaluation mode.

    Raises:
        UnsupportedModel: the attention of this model can't be captured.
    """
    return Captured(model)


@dataclass
class Run:
    """One call of `generate`."""

    plan: Decoding
    cache: Cache | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Per-token inputs of its newest forward, for the step after the last one."""


@dataclass(frozen=True)
class Pending:
    """The newest token of each sequence, which was generated but never fed, so that it has no row yet."""

    run: Run
    tokens: Tensor
    """(batch,) ids."""


class Captured:
    """The attention of the newest batch of sequences that a model worked on. Made by `capture_attention`.

    A context; the model is captured inside it, and as it was before outside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = attention_layers(model)
        self._model = model
        self._layer_of: dict[nn.Module, Any] = {layer.module: layer for layer in self._layers}
        self._switch = AttentionSwitch(model, self._layers, self._attention)
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._active: ExitStack | None = None
        self._sequences = Sequences(self._layers)
        self._mark: CacheMark | None = None
        self._forward: Forward | None = None
        self._run: Run | None = None
        self._pending: Pending | None = None

    def __enter__(self) -> Self:
        if self._active is not None:
            raise CaptureError("this capture is active already; leave its context before entering it again")
        with ExitStack() as stack:
            self._switch.on()
            stack.callback(self._switch.off)
            stack.callback(self._model.register_forward_pre_hook(self._open, with_kwargs=True).remove)
            stack.callback(self._model.register_forward_hook(self._close).remove)
            if hasattr(self._model, "generate"):
                stack.callback(self._shadow_generate())
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

    def complete(self) -> None:
        """Run the step that gives the newest token of each generated sequence its row, unless it has ended.

        Works inside the context and outside. It feeds that token to the cache of the generation, and lets go of
        the cache. A second call does nothing.

        Raises:
            CaptureError: the generation's static cache has no room for it.
        """
        pending = self._pending
        if pending is None:
            return
        if bool(self._unfinished(pending).any()):
            assert pending.run.cache is not None
            require_room(pending.run.cache, self._sequences.tokens)
            with self if self._active is None else ExitStack():
                self._step(pending)
        self._pending = None

    def summaries(self) -> list[AttentionSummary]:
        """One for each sequence of the newest batch, padding and finished rows left out; calls `complete`.

        Raises:
            CaptureError: nothing was captured, the last forward failed, or layers differ in their number of heads.
        """
        if self._forward is not None:
            raise CaptureError(
                "the last forward did not finish, so its sums are not whole; run it again from the start"
            )
        self.complete()
        return self._sequences.summaries()

    # What the model calls.

    def _open(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        past = past_length(cache)
        require_unpacked(given)
        self._pending = None
        if cache is None or past == 0:
            self._sequences, self._mark = Sequences(self._layers), None
        else:
            self._require_continuation(cache, past)
        self._finish_rows(given.get("input_ids"), past)
        if self._run is not None:
            kept = {name: given.get(name) for name in ("position_ids", "token_type_ids")}
            self._run.inputs = {name: value for name, value in kept.items() if value is not None}
        self._forward = Forward(past, self._sequences.batch, self._sequences.finished)

    def _close(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._forward
        if forward is None:
            raise CaptureError(
                "a forward ended that never began here; enter the context outside of the model's forward"
            )
        missing = [layer.name for layer in self._layers if layer.index not in forward.reported]
        if missing:
            raise CaptureError(f"{', '.join(missing)} did not report; every layer's attention must be seen, or none")
        assert forward.visible is not None
        self._sequences.tokens = forward.tokens
        self._sequences.visible.append(forward.visible)
        self._sequences.counted.append(forward.counted)
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
        layer = self._layer_of.get(module)
        if layer is None or self._forward is None:
            raise CaptureError(
                f"{type(module).__name__} computed attention outside of a forward of the captured "
                f"{type(self._model).__name__}; call the model itself, not a part of it"
            )
        require_plain(layer, dropout, is_causal, others)
        place = self._forward.report(layer, query, key, attention_mask)
        output, diagonal, received = attend(
            query,
            key[:, :, : place.columns],
            value[:, :, : place.columns],
            mask=place.mask,
            first=place.first,
            counted=place.counted.to(query.device),
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            sinks=s_aux,
        )
        # Not in inference mode even if the model is: later steps may add to the sums outside of it.
        with torch.no_grad(), torch.inference_mode(False):
            sums = self._sequences.sums.get(layer.index)
            if sums is None:
                sums = self._sequences.sums[layer.index] = LayerSums.empty(diagonal)
            sums.add(diagonal, received, self._forward.tokens)
        return output, None

    # Sequences that go on, and that end.

    def _require_continuation(self, cache: Cache, past: int) -> None:
        if self._forward is not None:
            raise CaptureError("the forward before did not finish; start again from an empty cache")
        if past != self._sequences.tokens or self._mark is None:
            raise CaptureError(
                f"the cache holds {past} tokens, {self._sequences.tokens} of them were captured; run all forwards "
                "that fill it inside the context, and do not crop it"
            )
        self._mark.require(cache)
        finished = self._sequences.finished
        if self._run is None and finished is not None and bool(finished.any()):
            raise CaptureError(
                "some sequences of this batch have ended and were fed padding; they can't go on, start a new batch"
            )

    def _finish_rows(self, ids: Tensor | None, past: int) -> None:
        """A sequence ends as soon as a stop token is fed behind the prompt; one inside the prompt is content."""
        if self._run is None or ids is None or past < self._run.plan.prompt_tokens:
            return
        ended = self._run.plan.ends(ids[:, -1])
        finished = self._sequences.finished
        self._sequences.finished = ended if finished is None else finished | ended

    def _shadow_generate(self) -> Callable[[], None]:
        """Let `model.generate` go through here; returns what undoes it."""
        attributes = self._model.__dict__
        original: Callable[..., Any] = self._model.generate  # type: ignore[assignment]
        own = attributes.get("generate")

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self._generate(original, args, kwargs)

        def undo() -> None:
            del attributes["generate"]
            if own is not None:
                attributes["generate"] = own

        attributes["generate"] = generate
        return undo

    def _generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._run is not None:
            raise CaptureError("generate was called while it was running; one generation at a time")
        run = self._run = Run(plan_decoding(self._model, args, kwargs))
        try:
            result = original(**run.plan.arguments)
        finally:
            self._run = None
        ids = result if isinstance(result, Tensor) else result.sequences
        unfed = ids.shape[1] - self._sequences.tokens
        if unfed not in (0, 1):  # 0 where stopping is noticed a step late
            raise CaptureError(
                f"generate returned {ids.shape[1]} tokens, {self._sequences.tokens} of them were captured"
            )
        self._pending = Pending(run, ids[:, -1]) if unfed else None
        return result

    def _unfinished(self, pending: Pending) -> Tensor:
        ended = pending.run.plan.ends(pending.tokens)
        finished = self._sequences.finished
        return ~ended if finished is None else ~(ended | finished.to(ended.device))

    def _step(self, pending: Pending) -> None:
        """Feed the newest tokens, as `generate` would have done had it gone on."""
        cache, mark = pending.run.cache, self._mark
        assert mark is not None
        inputs = {name: value[..., -1:] for name, value in pending.run.inputs.items()}
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + 1
        visible = torch.cat([*self._sequences.visible, torch.ones_like(self._sequences.visible[-1][:, :1])], dim=1)
        if not bool(visible.all()):
            inputs["attention_mask"] = visible.long()
        self._run = pending.run
        try:
            with torch.no_grad(), torch.inference_mode(mark.inference):
                self._model(input_ids=pending.tokens[:, None], past_key_values=cache, use_cache=True, **inputs)
        finally:
            self._run = None
