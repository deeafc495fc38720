"""Which model this is: enough to refuse a probe that was fitted on another one, cheap for models of many gigabytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES_PER_TENSOR = 8
"""Values read from every parameter tensor, evenly spaced."""

NOT_ARCHITECTURE = frozenset(
    (
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "architectures",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "id2label",
        "label2id",
        "problem_type",
        "quantization_config",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
)
"""Configuration entries that don't change what the model computes from token ids, or are compared on their own."""


@dataclass(frozen=True)
class ModelIdentity:
    """What makes a model and its tokenizer the same as another."""

    name: str
    """Hub id or folder name, for people; not compared."""

    commit: str
    """Hub commit, for people; empty when unknown; not compared."""

    architecture: str
    """Digest of the configuration's architecture fields."""

    parameters: str
    """Digest of every parameter's name and shape."""

    weights: str
    """Digest of `sample`."""

    dtype: str
    quantisation: str
    """Method of quantisation, or `none`."""

    tokenizer: str
    chat_template: str
    layers: int
    heads: int
    sample: tuple[float, ...] = field(repr=False)
    """A fixed sample of the weights, converted to float32: compared with a tolerance when the dtype differs."""

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self) | {"sample": [float(value) for value in self.sample]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIdentity:
        """The inverse of `to_dict`; raises KeyError or TypeError for what is not one."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        for name, value in known.items():
            kind = {"layers": int, "heads": int, "sample": list | tuple}.get(name, str)
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {str(value)[:80]!r}, which it can't be")
        return cls(**known | {"sample": tuple(float(value) for value in known["sample"])})

    @property
    def digest(self) -> str:
        """One digest of all that is compared."""
        return sha256(
            "\n".join(
                (
                    self.architecture,
                    self.parameters,
                    self.weights,
                    self.quantisation,
                    self.tokenizer,
                    self.chat_template,
                )
            ).encode()
        )

    def differences(self, other: ModelIdentity) -> list[tuple[str, str, str]]:
        """What forbids using a probe of one with the other: (what, mine, theirs), empty when they are one model.

        Another dtype alone is no difference: the weights are then compared with the tolerance of the coarser one.
        """
        names = ("architecture", "parameters", "quantisation", "tokenizer", "chat_template")
        found = [(name, getattr(self, name), getattr(other, name)) for name in names]
        if not self._same_weights(other):
            found.append(("weights", self.weights, other.weights))
        return [(name, mine, theirs) for name, mine, theirs in found if mine != theirs]

    def _same_weights(self, other: ModelIdentity) -> bool:
        if self.dtype == other.dtype or len(self.sample) != len(other.sample):
            return self.weights == other.weights
        mine, theirs = np.array(self.sample, np.float32), np.array(other.sample, np.float32)
        for coarse in ("bfloat16", "float16"):
            if {self.dtype, other.dtype} == {"float32", coarse}:
                return np.array_equal(rounded(mine, coarse), rounded(theirs, coarse))
        # Both are rounded, each in its way: at most 2^-7 of the value apart, and 2^-23 near zero.
        return bool(np.allclose(mine, theirs, rtol=2**-7, atol=2**-23))


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Values as they are after a conversion to `bfloat16` or `float16` and back."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    nearest_even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (nearest_even & np.uint32(0xFFFF0000)).view(np.float32)


def identity_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> ModelIdentity:
    """The identity of a loaded model and its tokenizer; reads a few values of each tensor.

    Args:
        model: any of transformers'.
        tokenizer: the one that is used with it.
        name: how people call it; the class of the model without one.
    """
    sample = weight_sample(model)
    config = model.config.get_text_config()
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    quantisation = getattr(model.config, "quantization_config", None)
    method = getattr(quantisation, "quant_method", None) if quantisation is not None else None
    return ModelIdentity(
        name=name or type(model).__name__,
        commit=str(getattr(model.config, "_commit_hash", None) or ""),
        architecture=sha256(json.dumps(architecture_fields(model.config.to_dict()), sort_keys=True).encode()),
        parameters=sha256(json.dumps(shapes).encode()),
        weights=sha256(sample.astype("<f4").tobytes()),
        dtype=str(model.dtype).removeprefix("torch."),
        quantisation=str(getattr(method, "value", method) or "none"),
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=sha256(str(tokenizer.chat_template or "").encode()),
        layers=int(config.num_hidden_layers),
        heads=int(config.num_attention_heads),
        sample=tuple(sample.tolist()),
    )


def architecture_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what only concerns loading, saving and output; nested parts alike."""
    kept = {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE and value is not None}
    return {key: architecture_fields(value) if isinstance(value, dict) else str(value) for key, value in kept.items()}


def weight_sample(model: PreTrainedModel) -> NDArray[np.float32]:
    """Evenly spaced values of every parameter, in the order of the parameters' names, as float32."""
    import torch

    values = []
    for _, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()
        values.append(flat[places.to(flat.device)].to("cpu", torch.float32).numpy())
    return np.concatenate(values) if values else np.empty(0, np.float32)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of how text becomes ids; padding and truncation settings, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        described.pop("padding", None)
        described.pop("truncation", None)
    else:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return sha256(json.dumps([described, special], sort_keys=True).encode())


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
