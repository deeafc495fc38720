"""Triton kernels for NVIDIA GPUs: attention with its column sums at about the speed of attention alone.

What they compute is what `lapwing_detector.attention.attend` computes. The output comes from torch's own fused
attention where that does the job, whose log-sum-exp is kept; a second kernel recomputes the scores from it, a block of
columns at a time, and sums the columns. No map exists, no row is masked that need not be, and heads that nobody reads
cost nothing. There are no gradients.

This package imports without triton; `available` says whether its functions can be called.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

from lapwing_detector.kernels.rows import Rows

WIDEST = 512
"""Bytes of one head's query, key or value up to which blocks of them fit into a multiprocessor."""

INTERPRETED = False
"""Whether tensors on the CPU are taken too, by Triton's interpreter (TRITON_INTERPRET=1): for tests, as it is slow."""


class KernelsMissing(UserWarning):
    """The model is on a device other than a CPU and the kernels can't run there, so that capturing is slower."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; a warning says why not, once for each reason. A CPU needs none of them.

    They need an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, triton and a C compiler.
    """
    if device.type == "cpu":
        return INTERPRETED and missing() is None
    why = _unfit(device) or missing()
    if why is not None:
        _say(why)
    return why is None


@cache
def missing() -> str | None:
    """What has to be installed before kernels can run; None if nothing."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "triton finds no C compiler (install gcc, or set CC)"
    return None


@cache
def _unfit(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:  # AMD's devices are called cuda as well
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"the kernels need compute capability 8.0, this GPU has {capability}"


@cache
def _say(why: str) -> None:
    warnings.warn(f"{why}, so torch alone captures attention, more slowly", KernelsMissing, stacklevel=3)


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these tensors, shaped as it says, on a device where the kernels are available."""
    graded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return (
        not graded
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) * query.element_size() <= WIDEST
        and query.shape[1] % key.shape[1] == 0
        and query.shape[2] > 0
        and query.shape[0] > 0
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    starts: Tensor | None,
    first: int,
    counted: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of some rows of the map, with the sums of these rows.

    Args:
        query: (batch, heads, rows, width).
        key: (batch, key-value heads, columns, width); each serves heads / key-value heads consecutive heads.
        value: (batch, key-value heads, columns, value width).
        starts: (batch or 1, rows) int32, the first column that each row sees; it sees those from there to its own, and
            none if it starts behind its own (padding): its output is then zero. None: every row sees all to its own.
        first: column of the first row's own token; row j is column first + j, and the last row is the last column.
        counted: (batch, rows) bool, the rows that take part in `received`; None, which is fastest: all.
        scaling: of the scores, before the soft-cap.
        softcap: scores become softcap * tanh(scores / softcap), before they are masked.
        sinks: (heads,) learned logits that take part in the denominator and are dropped from the map.
        heads: (heads read,) int32, those whose sums are wanted, on the device of `query`; None: all.

    Returns:
        output (batch, rows, heads, value width) in the dtype of `value`; diagonal (batch, heads read, rows) and
        received (batch, heads read, columns), float32.

    Raises:
        CaptureError: a gradient is asked for, or rows and columns do not end together.
    """
    from lapwing_detector.kernels.attending import attend_rows

    return attend_rows(query, key, value, Rows(first, starts, counted, scaling, softcap, sinks), heads)


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    diagonal: Tensor,
    received: Tensor,
    starts: Tensor | None,
    counted: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """One row, as `attend`, with its weights added to sums that are there already: a step of decoding.

    Args:
        query: (batch, heads, 1, width).
        diagonal: (batch, heads read, 1) float32, written; any strides, such as a column of a larger buffer.
        received: (batch, heads read, columns) float32, added to; the last stride is 1.

    Returns:
        output (batch, 1, heads, value width).

    Raises:
        CaptureError: as `attend`.
    """
    from lapwing_detector.kernels.attending import attend_one_row

    rows = Rows(key.shape[2] - 1, starts, counted, scaling, softcap, sinks)
    return attend_one_row(query, key, value, rows, heads, diagonal, received)
