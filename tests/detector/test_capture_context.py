"""The context leaves the model and transformers as they were, whatever happened inside."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError
from lapwing_detector.switch import PREFIX
from tests.detector.tiny_models import FAMILIES, captured_forward, difference, new_model, tiny_model, token_ids


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that capturing touches."""
    return {
        "implementations": [
            getattr(module.config, "_attn_implementation", None)
            for module in model.modules()
            if getattr(module, "config", None) is not None
        ],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_with_kwargs))
            for module in model.modules()
        ],
        "attributes": set(model.__dict__),
        "generate": model.__dict__.get("generate"),
        "functions": set(AttentionInterface._global_mapping),
        "masks": set(AttentionMaskInterface._global_mapping),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model(family: str) -> None:
    model = new_model(family)
    before = state(model)
    with capture_attention(model) as captured:
        assert state(model) != before
        model.generate(token_ids(1, 5), max_new_tokens=3)
    assert state(model) == before
    captured.summaries()  # which enters once more for the newest token
    assert state(model) == before


def test_an_implementation_of_the_users_choice_comes_back() -> None:
    model = new_model("llama", attn_implementation="eager")
    with capture_attention(model):
        pass
    assert model.config._attn_implementation == "eager"


def test_a_generate_of_the_users_own_comes_back() -> None:
    model = new_model("llama")
    calls: list[int] = []
    real = model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    model.generate = counting
    with capture_attention(model) as captured:
        model.generate(token_ids(1, 5), max_new_tokens=3)
    assert model.generate is counting
    assert calls == [1]
    assert captured.summaries()


def test_an_exception_inside_restores_the_model() -> None:
    model = new_model("llama")
    before = state(model)

    def interrupted() -> None:
        with capture_attention(model):
            model(token_ids(1, 5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state(model) == before


def test_an_exception_inside_a_forward_or_a_generation_restores_the_model() -> None:
    model = new_model("llama")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before = state(model)
    for run in (model, lambda ids: model.generate(ids, max_new_tokens=3)):
        with pytest.raises(ZeroDivisionError), capture_attention(model):
            run(token_ids(1, 5))
        assert state(model) == before
    handle.remove()
    with capture_attention(model) as captured:
        model.generate(token_ids(1, 5), max_new_tokens=3)
    assert captured.summaries()


def test_an_exception_on_entering_restores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    before = state(model)
    monkeypatch.setattr(type(model), "register_forward_hook", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture_attention(model):
        pass
    assert state(model) == before


def test_two_captures_at_once_are_refused() -> None:
    model = new_model("llama")
    first, second = capture_attention(model), capture_attention(model)
    with first:
        with pytest.raises(CaptureError, match="already"), second:
            pass
        with pytest.raises(CaptureError, match="already"), first:
            pass
        model(token_ids(1, 5))  # the first is unharmed
    assert first.summaries()[0].token_count == 5
    twin = LlamaForCausalLM(model.config).eval()  # shares the config that says which attention is used
    with first.resume(), pytest.raises(CaptureError, match="shares its config"), capture_attention(twin):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_every_entry_has_a_name_of_its_own() -> None:
    one, other = new_model("llama"), new_model("mistral")
    with capture_attention(one), capture_attention(other):
        names = {model.config._attn_implementation for model in (one, other)}
    assert len(names) == 2
    assert all(name.startswith(PREFIX) for name in names)


def test_two_models_in_two_threads() -> None:
    models = [new_model("llama"), new_model("mistral")]
    expected = [captured_forward(model, token_ids(1, 30))[0] for model in models]
    worst: list[float] = []

    def work(index: int) -> None:
        for _ in range(15):
            summary = captured_forward(models[index], token_ids(1, 30))[0]
            worst.append(difference(summary, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 30
    assert max(worst) == 0


def test_capturing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured_forward(tiny_model("llama"), token_ids(1, 5))


def test_the_cache_is_let_go() -> None:
    import gc
    import weakref

    model = tiny_model("llama")
    captured = capture_attention(model)
    with captured:
        result = model.generate(token_ids(1, 5), max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)
    cache = weakref.ref(result.past_key_values)
    del result
    assert cache() is not None  # still needed for the newest token
    captured.summaries()
    gc.collect()
    assert cache() is None


def test_buffers_grow_by_doubling() -> None:
    model = tiny_model("llama")
    sizes: set[int] = set()
    cache = None
    captured = capture_attention(model)
    with captured, torch.no_grad():
        for _ in range(100):
            cache = model(token_ids(1, 1), past_key_values=cache, use_cache=True).past_key_values
            sizes.add(captured._sequences.sums[0].diagonal.shape[-1])
    assert len(sizes) <= 9  # 1, 2, 4, ... 128
