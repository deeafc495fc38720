"""What one call of `model.generate` is going to do, and whether its attention can be followed token by token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode

from lapwing_detector.errors import UnsupportedGeneration

FOLLOWED = frozenset({GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE})

_MEND = "generate with greedy search or sampling and a cache, or score the finished text in one forward"

_REFUSED_ARGUMENTS = (
    ("custom_generate", "a decoding loop that is not known can't be followed"),
    ("assistant_model", "assisted decoding takes tokens back"),
    ("synced_gpus", "it goes on feeding sequences that have ended"),
    ("negative_prompt_ids", "it runs forwards of its own beside the sequence"),
    ("inputs_embeds", "without token ids the end of a sequence can't be seen"),
)

_REFUSED_OPTIONS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("num_beams", (None, 1), "beam search reorders the cache"),
    ("constraints", (None,), "constrained beam search reorders the cache"),
    ("force_words_ids", (None,), "constrained beam search reorders the cache"),
    ("use_mtp", (None, False), "multi-token prediction takes tokens back"),
    ("prompt_lookup_num_tokens", (None,), "prompt lookup takes tokens back"),
    ("assistant_early_exit", (None,), "assisted decoding takes tokens back"),
    ("dola_layers", (None,), "DoLa is a decoding loop that is not known"),
    ("penalty_alpha", (None, 0.0), "contrastive search tries tokens that it does not keep"),
    ("use_cache", (None, True), "every step would run over the whole sequence again"),
    ("guidance_scale", (None, 1), "classifier-free guidance runs forwards of its own beside the sequence"),
    ("token_healing", (None, False), "it changes the prompt"),
    ("output_attentions", (None, False), "the maps do not exist while they are summed up"),
)
"""Option, values that are fine, and why others are not."""


def plan_decoding(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of `model.generate`.

    Returns:
        the arguments to call the original with.

    Raises:
        UnsupportedGeneration: its attention could not be followed; names the option.
    """
    kind: Any = type(model)  # the class's own signature: an instance may carry a wrapper
    given = dict(inspect.signature(kind.generate).bind(model, *args, **kwargs).arguments)
    options = given.pop("kwargs", {})
    del given["self"]
    for name, why in _REFUSED_ARGUMENTS:
        value = given.get(name, options.get(name))
        if value is not None and value is not False:
            raise _refusal(name, value, why)
    config = _effective_config(model, given.get("generation_config"), options)
    _require_followed(config)
    return _arguments(given, options, config, _prompt_tokens(given, options))


def _refusal(option: str, value: object, why: str) -> UnsupportedGeneration:
    shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return UnsupportedGeneration(f"{option}={shown}: {why}; {_MEND}")


def _effective_config(model: Any, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
    """The generation config as `generate` itself is going to put it together."""
    effective, _ = model._prepare_generation_config(config, **options)
    assert isinstance(effective, GenerationConfig)
    return effective


def _require_followed(config: GenerationConfig) -> None:
    for option, fine, why in _REFUSED_OPTIONS:
        value = getattr(config, option, None)
        if value not in fine:
            raise _refusal(option, value, why)
    if config.cache_implementation == "paged":
        raise _refusal("cache_implementation", "paged", "continuous batching mixes sequences")
    mode = config.get_generation_mode()
    if mode not in FOLLOWED:
        raise _refusal("generation mode", str(mode.value), "a decoding loop that is not known can't be followed")


def _prompt_tokens(given: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Length of the prompt; transformers starts from one BOS token when there is none."""
    ids = given.get("inputs")
    ids = options.get("input_ids") if ids is None else ids
    if ids is None:
        return 1
    mask = options.get("attention_mask")
    if mask is not None and mask.shape[1] != ids.shape[1]:
        raise UnsupportedGeneration(
            f"attention_mask has {mask.shape[1]} columns, the prompt {ids.shape[1]} tokens; "
            "to go on from a cache give all token ids of the conversation, not only the new ones"
        )
    return int(ids.shape[1])


def _arguments(
    given: Mapping[str, Any], options: Mapping[str, Any], config: GenerationConfig, prompt_tokens: int
) -> dict[str, Any]:
    """The arguments, with compiling off and with room in a static cache for the newest token's own step."""
    changes: dict[str, Any] = {"disable_compile": True}
    if config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
        room = prompt_tokens + int(config.max_new_tokens or config.max_length or 0)
        changes["max_cache_len"] = max(int(config.max_cache_len or 0), room)
    if given.get("generation_config") is None:
        return {**given, **options, **changes}
    own = copy.deepcopy(given["generation_config"])
    own.update(**changes)
    return {**given, **options, "generation_config": own}
