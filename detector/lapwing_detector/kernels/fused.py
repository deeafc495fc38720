"""Attention by torch's own fused kernels, asked for the log-sum-exp that they reckon anyway. Knows no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

Operator: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(query, key, value, causal, scaling) to output (batch, heads, rows, width) and log-sum-exp (batch, heads, rows)."""


def choose(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float) -> Operator | None:
    """The fused kernel that `scaled_dot_product_attention` itself would take here, so that nothing is slower.

    None where it would take another: one in float32, one of a kind whose log-sum-exp is not known here, or none
    since its user forbade them (`torch.nn.attention.sdpa_kernel`). Keys are not repeated for grouped queries.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8:
        return None
    grouped = query.shape[1] != key.shape[1]
    backend = torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scaling, enable_gqa=grouped)
    return OPERATORS.get(backend)


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    output, lse, *_ = flash(query, key, value, 0.0, causal, False, scale=scaling)
    return output, lse.reshape(query.shape[:3])


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, lse, *_ = cudnn(query, key, value, None, True, 0.0, causal, False, scale=scaling)
    return output, lse.reshape(query.shape[:3])  # it comes as (batch, heads, rows, 1)


OPERATORS: dict[int, Operator] = {
    int(SDPBackend.FLASH_ATTENTION.value): _flash,
    int(SDPBackend.CUDNN_ATTENTION.value): _cudnn,
}
