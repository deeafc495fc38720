"""How much memory sums take while they grow, and that nothing is lost where there is none left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lapwing_detector import sequences
from lapwing_detector.errors import CaptureError
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.sequences import Part, Sequences, gathered

LAYERS = tuple(AttentionLayer(index, str(index), nn.Identity()) for index in range(8))
HEADS = 4
PROMPT, ROWS = 600, 700


class Living(TorchDispatchMode):
    """Counts the bytes of all memory that tensors made inside have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        del tensor
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return result


def rows_of(layer: AttentionLayer, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Diagonal and column sums of the last rows, which differ from place to place; halves, whose sums are exact."""
    received = (torch.arange(HEADS * tokens) % (97 + layer.index)).reshape(1, HEADS, tokens) / 2
    return received[:, :, -rows:].clone(), received


def begun() -> Sequences:
    new = Sequences(LAYERS)
    feed(new, PROMPT)
    return new


def feed(grown: Sequences, count: int = 1) -> None:
    tokens = grown.tokens + count
    for layer in LAYERS:
        grown.add_kept(layer, HEADS, *rows_of(layer, tokens, count), tokens)
    grown.close()
    grown.tokens = tokens
    grown.counted.add(torch.ones(1, count, dtype=torch.bool))


@pytest.mark.parametrize("piece_bytes", [1, 1 << 30])
def test_two_numbers_for_each_head_and_token_and_little_more(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "PIECE_BYTES", piece_bytes)
    with Living() as living:
        grown = begun()
        for _ in range(ROWS):
            feed(grown)
        capacities = {sums.capacity for sums in grown.sums.values()}
    each = 4 * HEADS * capacities.pop()
    assert not capacities
    sums = 2 * len(LAYERS) * each
    assert sum(living.sizes.values()) < sums + 2 * each
    # While one piece is moved it is there twice; with all layers in one, the control, that is much.
    assert (living.most < sums + 3 * each) is (piece_bytes == 1)


@pytest.mark.parametrize("room", [PROMPT + 1, 4 * PROMPT])
@pytest.mark.parametrize("fails_at", [1, 4, 7, 2 * len(LAYERS)])
def test_what_cannot_grow_is_as_it_was(fails_at: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "PIECE_BYTES", 1)
    expected = begun()
    feed(expected)
    grown, calls, zeros = begun(), [], torch.zeros

    def failing(*args: Any, **rest: Any) -> Tensor:
        calls.append(1)
        if len(calls) == fails_at:
            raise MemoryError("none left")
        return zeros(*args, **rest)

    monkeypatch.setattr(torch, "zeros", failing)
    with pytest.raises(MemoryError):
        grown.join(room)
    assert grown.joint == []
    for _ in range(2):
        feed(grown)
    assert len(calls) > fails_at
    feed(expected)
    [found], [other] = grown.summaries(), expected.summaries()
    np.testing.assert_array_equal(found.received, other.received)
    np.testing.assert_array_equal(found.diagonal, other.diagonal)
    assert found.received.sum() > 0


def test_sequences_amid_a_forward_that_failed_are_not_put_together_with_others() -> None:
    amid, whole = begun(), begun()
    amid.visible.add(torch.ones(1, PROMPT, dtype=torch.bool))
    whole.visible.add(torch.ones(1, PROMPT, dtype=torch.bool))
    amid.add_kept(LAYERS[0], HEADS, *rows_of(LAYERS[0], PROMPT + 1, 1), PROMPT + 1)
    for parts in ((amid, whole), (whole, amid)):
        with pytest.raises(CaptureError, match="amid a forward that failed"):
            gathered([Part(one, [0], 0) for one in parts])
    for one in (amid, whole):
        [summary] = gathered([Part(one, [0], 0)]).summaries()
        assert summary.token_count == PROMPT


def test_rows_of_a_forward_that_failed_are_not_added_twice() -> None:
    grown, expected = begun(), begun()
    for layer in LAYERS[:3]:
        grown.add_kept(layer, HEADS, *rows_of(layer, PROMPT + 1, 1), PROMPT + 1)
    for _ in range(2):
        feed(grown)
        feed(expected)
    np.testing.assert_array_equal(grown.summaries()[0].received, expected.summaries()[0].received)
    for layer in LAYERS[:3]:
        grown.add_kept(layer, HEADS, *rows_of(layer, PROMPT + 3, 1), PROMPT + 3)
    grown.close()  # the control: as if it had not failed
    feed(grown)
    feed(expected)
    assert not np.array_equal(grown.summaries()[0].received, expected.summaries()[0].received)
