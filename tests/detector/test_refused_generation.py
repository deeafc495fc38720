"""Ways of generating that can't be followed are refused by name, before any number is produced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError, UnsupportedGeneration
from tests.detector.captures import require_nothing
from tests.detector.tiny_models import difference, new_model, tiny_model, token_ids


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"generation_config": GenerationConfig(num_beams=3, max_new_tokens=4)}, "num_beams=3"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"dola_layers": "high"}, "dola_layers='high'"),
        ({"force_words_ids": [[5]], "num_beams": 1}, "force_words_ids"),
        ({"custom_generate": "somebody/loop"}, "custom_generate='somebody/loop'"),
        ({"custom_generate": lambda *_: None}, "custom_generate=function"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"token_healing": True}, "token_healing"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"negative_prompt_ids": token_ids(1, 2)}, "negative_prompt_ids"),
        ({"inputs_embeds": torch.zeros(1, 9, 16)}, "inputs_embeds"),
        ({"attention_mask": torch.ones(1, 20)}, "attention_mask has 20"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_generation_that_cannot_be_followed(options: dict[str, Any], name: str) -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, pytest.raises(UnsupportedGeneration) as caught:
        model.generate(token_ids(1, 9), **{"max_new_tokens": 4, **options})
    assert name in str(caught.value)
    require_nothing(captured)


def test_assisted_generation() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, pytest.raises(UnsupportedGeneration, match="assistant_model"):
        model.generate(token_ids(1, 9), assistant_model=tiny_model("mistral"), max_new_tokens=4)
    require_nothing(captured)


def test_options_of_the_model_itself() -> None:
    model = new_model("llama")
    model.generation_config.num_beams = 4
    with capture_attention(model) as captured, pytest.raises(UnsupportedGeneration, match="num_beams=4"):
        model.generate(token_ids(1, 9), max_new_tokens=4)
    require_nothing(captured)
    with capture_attention(model) as captured:
        model.generate(token_ids(1, 9), max_new_tokens=4, num_beams=1)
    assert captured.summaries()


def test_generate_within_generate() -> None:
    model = tiny_model("llama")

    def again(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        model.generate(ids, max_new_tokens=1)
        return scores

    with capture_attention(model), pytest.raises(CaptureError, match="one generation at a time"):
        model.generate(token_ids(1, 9), max_new_tokens=4, logits_processor=LogitsProcessorList([again]))


def test_generate_that_runs_past_the_capture() -> None:
    model = new_model("llama")
    bound = model.generate
    for generate in (bound, lambda ids, **options: type(model).generate(model, ids, **options)):
        with capture_attention(model) as captured, pytest.raises(CaptureError, match=r"call model\.generate"):
            generate(token_ids(1, 9), max_new_tokens=4)
        require_nothing(captured)
    assert bound(token_ids(1, 9), max_new_tokens=4).shape == (1, 13)  # outside of the context it does its work


def test_generate_of_the_users_own_that_loops_by_itself() -> None:
    model = new_model("llama")

    def loop(inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat([inputs, model(inputs).logits[:, -1:].argmax(-1)], dim=1)

    model.generate = loop
    with capture_attention(model), pytest.raises(CaptureError, match="stopping criteria"):
        model.generate(token_ids(1, 9))


def test_a_generation_that_was_refused_leaves_the_capture_usable() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, torch.no_grad():
        with pytest.raises(UnsupportedGeneration):
            model.generate(token_ids(1, 9), num_beams=2)
        model(token_ids(1, 5))
        first = captured.summaries()
    with capture_attention(model) as captured, torch.no_grad():
        model(token_ids(1, 5))
    assert difference(first[0], captured.summaries()[0]) == 0
