"""Flags that come one by one are those of all at once, and each costs the same however many there are."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lapwing_detector.flags import LEAST_ROOM, Flags

TOKENS = 6 * LEAST_ROOM


class Moved(TorchDispatchMode):
    """Counts the flags that are copied from one tensor to another."""

    def __init__(self) -> None:
        super().__init__()
        self.flags = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.copy_.default, torch.ops.aten.cat.default):
            self.flags += result.numel()
        return result


class Joined:
    """The control: joins all of them whenever some come."""

    def __init__(self) -> None:
        self.all = torch.empty(1, 0, dtype=torch.bool)

    def add(self, flags: Tensor) -> None:
        self.all = torch.cat([self.all, flags], dim=1)


def moved(flags: Flags | Joined) -> int:
    with Moved() as count:
        for token in range(TOKENS):
            flags.add(torch.tensor([[token % 3 == 0]]))
    assert flags.all[0].tolist() == [token % 3 == 0 for token in range(TOKENS)]
    return count.flags


def test_each_token_costs_the_same_however_many_there_are() -> None:
    assert moved(Flags()) < 3 * TOKENS  # each once when it comes, and in all moves together at most twice
    assert moved(Joined()) > TOKENS * TOKENS / 2


def test_in_and_out_of_inference_mode_they_are_those_of_all_at_once() -> None:
    chance = random.Random(0)
    for _ in range(50):
        batch, flags, parts = chance.randint(1, 4), Flags(), []
        assert flags.tokens == 0
        for _ in range(chance.randint(1, 12)):
            rows = chance.choice((1, 1, 1, 40, 300))
            new = torch.tensor([[chance.random() < 0.7 for _ in range(rows)] for _ in range(batch)])
            with torch.inference_mode(chance.random() < 0.5):
                flags.add(new.clone())  # made there, as a model does
            parts.append(new)
            assert flags.tokens == sum(part.shape[1] for part in parts)
            assert torch.equal(flags.all, torch.cat(parts, dim=1))
