"""Whether what was captured on the GPU is right, since the time of something else means nothing."""

from __future__ import annotations

import sys

import torch
from gpu_work import HEADS, LAYERS, Heads, Run, Work, counted, make_ids, run, without_kernels
from torch import Tensor
from transformers import LlamaForCausalLM

CHECKED: dict[Work, int] = {"prefill": 700, "decode": 3}
"""Prompts at which kernels and torch are compared: a multiple of no block; and a short one, so that the rows of the
tokens decoded after it are not lost among those of the prompt."""

SAME = 0.1
"""How far logits and sums may lie apart, as a share of their norm. Rounding to bfloat16 in another order, through 32
layers, should move them by 1 or 2 %; a mask one column off moves the diagonal by 40 %, for its first rows see few
columns. The logits say little of masks, as the layers of a random model outside attention weigh far more."""


def against_torch(model: LlamaForCausalLM) -> dict[str, float]:
    """How far what the kernels give lies from what torch gives, as a share of the norm.

    Raises:
        SystemExit: farther than rounding explains.
    """
    far = {}
    for work, tokens in CHECKED.items():
        ids = make_ids(tokens)
        found = run(model, work, ids, "all")
        with without_kernels(), counted() as calls:
            expected = run(model, work, ids, "all")
        if calls:
            sys.exit("the kernels can't be switched off, so nothing is there to compare them with")
        for name, one, other in zip(("logits", "diagonal", "received"), _arrays(found), _arrays(expected), strict=True):
            far[f"{work} {name}"] = round(apart(one, other), 4)
    if not all(share <= SAME for share in far.values()):  # nor is NaN small enough
        sys.exit(f"kernels and torch disagree, by shares of the norm: {far}; at most {SAME} is rounding")
    return far


def _arrays(captured: Run) -> tuple[Tensor, Tensor, Tensor]:
    assert captured.summary is not None
    return (
        captured.logits,
        torch.from_numpy(captured.summary.diagonal),
        torch.from_numpy(captured.summary.received),
    )


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference, as a share of the other's norm."""
    return float((one - other).norm() / other.norm())


def require_right(heads: Heads, plain: Run, captured: Run) -> None:
    """What can be said at every length: the logits are the plain model's, and each row of a map sums to 1.

    Raises:
        SystemExit: they are not.
    """
    if not (far := apart(captured.logits, plain.logits)) <= SAME:
        sys.exit(f"captured and plain logits lie {far:.3f} of their norm apart; at most {SAME} is rounding")
    assert captured.summary is not None
    sums = torch.from_numpy(captured.summary.received).sum(-1)
    sums = sums[sums.isfinite()]  # heads that were not asked for are NaN
    expected = LAYERS * HEADS // (4 if heads == "quarter" else 1)
    # Every row of a map sums to 1; 1 % is for weights rounded to bfloat16.
    if len(sums) != expected or not bool(((sums / captured.summary.token_count - 1).abs() < 0.01).all()):
        sys.exit(f"the captured sums are wrong: {len(sums)} heads of {expected}, {sums}")
