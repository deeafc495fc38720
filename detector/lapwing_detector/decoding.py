"""What one call of `model.generate` is going to do, and whether its attention can be followed token by token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

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


@dataclass(frozen=True)
class Decoding:
    """A call of `model.generate` that can be followed."""

    arguments: dict[str, Any]
    """What to call the original `generate` with."""

    stop_ids: Tensor
    """(n,) token ids that end a sequence."""

    prompt_tokens: int
    """Length of the prompt: tokens that are fed behind it were generated."""

    def ends(self, tokens: Tensor) -> Tensor:
        """Which of these token ids end their sequence; bool, of the same shape."""
        return torch.isin(tokens, self.stop_ids.to(tokens.device))


def plan_decoding(model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Decoding:
    """Read the arguments of `model.generate`.

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
    batch, prompt_tokens = _prompt_shape(given, options)
    return Decoding(
        arguments=_arguments(given, options, config, prompt_tokens),
        stop_ids=_stop_ids(config, given, batch * (config.num_return_sequences or 1)),
        prompt_tokens=prompt_tokens,
    )


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


def _prompt_shape(given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[int, int]:
    """(sequences, tokens) of the prompt; transformers starts from one BOS token when there is none."""
    ids = given.get("inputs")
    ids = options.get("input_ids") if ids is None else ids
    if ids is None:
        return 1, 1
    mask = options.get("attention_mask")
    if mask is not None and mask.shape[1] != ids.shape[1]:
        raise UnsupportedGeneration(
            f"attention_mask has {mask.shape[1]} columns, the prompt {ids.shape[1]} tokens; "
            "to go on from a cache give all token ids of the conversation, not only the new ones"
        )
    return int(ids.shape[0]), int(ids.shape[1])


def _stop_ids(config: GenerationConfig, given: Mapping[str, Any], batch: int) -> Tensor:
    stops = _as_list(config.eos_token_id)
    # A sequence of a batch that other criteria have ended is fed padding, without an end-of-sequence token before.
    if stops and batch > 1 and (given.get("stopping_criteria") or config.stop_strings is not None):
        stops += _as_list(config.pad_token_id)
    return torch.tensor(stops, dtype=torch.long)


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [int(one) for one in torch.as_tensor(ids).reshape(-1).tolist()]


def _arguments(
    given: Mapping[str, Any], options: Mapping[str, Any], config: GenerationConfig, prompt_tokens: int
) -> dict[str, Any]:
    """The arguments, with compiling off and with room in a static cache for the newest token's own step."""
    changes: dict[str, Any] = {"disable_compile": True}
    if "static" in (config.cache_implementation or ""):
        room = prompt_tokens + int(config.max_new_tokens or config.max_length or 0)
        changes["max_cache_len"] = max(int(config.max_cache_len or 0), room)
    if given.get("generation_config") is None:
        return {**given, **options, **changes}
    own = copy.deepcopy(given["generation_config"])
    own.update(**changes)
    return {**given, **options, "generation_config": own}
