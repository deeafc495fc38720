"""Every feature of a growing text is that of the text read at once; on random maps, without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lapwing_detector import running_features
from lapwing_detector.features import FEATURES
from lapwing_detector.probe import Probe
from lapwing_detector.running import RunningLogits
from lapwing_detector.running_features import STARTS, Workspace, largest
from lapwing_detector.sequences import Sequences, Sums
from tests.detector.running_sums import SAME_SUMS, Summed, a_probe, growing, said

EACH = [(feature,) for feature in FEATURES]
MIXES = [*EACH, tuple(FEATURES), tuple(FEATURES)[::-1], ("sink_scores.v1", "attention_score.v1")]
OF_ALL_TOKENS = ("laplacian_eigenvalues.v1", "sink_scores.v1")

SEEN = 500 * SAME_SUMS
"""What breaking something does to the logit, at least."""


def without_the_last(chunks: torch.Tensor, k: int) -> torch.Tensor:
    """The candidates, but the least of all chunks in place of one of them."""
    ranked = chunks.amax(dim=-1).argsort(dim=-1, descending=True)
    return torch.cat([ranked[:, : k - 1], ranked[:, -1:]], dim=-1)


def apart(sequences: Sequences, layers: list[list[int]]) -> Summed:
    """The same with a memory of its own for each of some groups of layers, as each device has one."""
    joint, sums = [], {}
    for group in layers:
        olds = [sequences.sums[layer] for layer in group]
        both = [torch.cat([getattr(old, name) for old in olds], dim=1) for name in ("diagonal", "received")]
        joint.append(Sums(*both))
        parts = zip(*(one.split([old.diagonal.shape[1] for old in olds], dim=1) for one in both), strict=True)
        sums |= {layer: Sums(*part) for layer, part in zip(group, parts, strict=True)}
    return Summed(replace(sequences, joint=joint, sums=sums))


def worst(probe: Probe, tokens: int, first: int) -> float:
    """Largest difference to the oracle over all lengths."""
    running, differences = None, []
    for summed in growing(probe, tokens, first):
        running = running or RunningLogits(probe, summed)
        [found], expected = running.logits(), said(probe, summed.sums.summaries()[0])
        assert (found is None) == (expected is None)
        if found is not None:
            differences.append(abs(found - expected))
    return max(differences)


@pytest.mark.parametrize("features", MIXES, ids="+".join)
@pytest.mark.parametrize("k", [1, 2, 10])
def test_every_feature_and_mix_across_chunks(features: tuple[str, ...], k: int) -> None:
    # One of 2 chunks is looked into from 65 tokens on, two of 3 from 129; 10 are always more than there are.
    assert running_features.CHUNK == 64
    assert worst(a_probe(features, k), tokens=136, first=1) < SAME_SUMS


@pytest.mark.parametrize("first", [1, 3, 4, 5, 37])
def test_few_of_many_chunks(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr(running_features, "CHUNK", 4)
    assert worst(a_probe(k=3), tokens=80, first=first) < SAME_SUMS


@pytest.mark.parametrize("feature", OF_ALL_TOKENS)
def test_control_denominators_that_are_not_renewed(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    renewed = Workspace.reciprocals
    monkeypatch.setattr(Workspace, "reciprocals", lambda space, tokens: renewed(space, max(tokens, 60))[:tokens])
    assert worst(a_probe((feature,)), tokens=50, first=40) > SEEN


@pytest.mark.parametrize("feature", OF_ALL_TOKENS)
def test_control_a_chunk_whose_candidates_are_left_out(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    monkeypatch.setattr(running_features, "CHUNK", 4)
    monkeypatch.setattr(running_features, "candidates", without_the_last)
    assert worst(a_probe((feature,)), tokens=40, first=30) > SEEN


@pytest.mark.parametrize(
    ("feature", "kind"), [("attention_score.v1", "MeanLog"), ("attention_eigenvalues.v1", "LargestDiagonal")]
)
def test_control_new_tokens_that_are_not_taken_in(monkeypatch: pytest.MonkeyPatch, feature: str, kind: str) -> None:
    running = getattr(running_features, kind)
    add = running.add
    monkeypatch.setattr(running, "add", lambda one, diagonal: add(one, diagonal) if diagonal.shape[1] > 1 else None)
    assert worst(a_probe((feature,)), tokens=40, first=8) > SEEN


def test_there_is_a_running_form_of_every_feature() -> None:
    assert set(STARTS) == set(FEATURES)


@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 2, 4), (5, 7, 4), (2, 65, 3)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_largest_by_chunks_are_the_largest(shape: tuple[int, int, int], k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(shape, generator=generator)
    together = spread.clone()
    together[:, -1] += 10  # all of them in the last chunk
    equal = torch.randint(3, shape, generator=generator).float()
    for numbers in (spread, together, equal):
        assert torch.equal(largest(numbers, k), numbers.view(shape[0], -1).topk(k).values)


def test_a_diagonal_of_zero_has_the_log_of_the_floor() -> None:
    probe = a_probe(("attention_score.v1",))
    [summed] = growing(probe, tokens=9, first=9)
    for sums in summed.sums.sums.values():
        sums.diagonal[:, :, 4] = 0.0
    [logit] = RunningLogits(probe, summed).logits()
    assert logit == pytest.approx(said(probe, summed.sums.summaries()[0]), abs=SAME_SUMS)


def test_layers_on_several_devices_are_summed_up() -> None:
    probe = a_probe()
    *_, summed = growing(probe, tokens=70, first=69)
    parted = apart(summed.sums, [[0, 2], [1]])  # not in the order of the layers
    assert len(parted.sums.joint) == 2
    expected = said(probe, summed.sums.summaries()[0])
    assert RunningLogits(probe, parted).logits() == [pytest.approx(expected, abs=SAME_SUMS)]
    # Control: what the second one holds matters.
    parted.sums.joint[1].received.zero_()
    assert RunningLogits(probe, parted).logits() != [pytest.approx(expected, abs=SEEN)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["diagonal", "received"])
@pytest.mark.parametrize("features", EACH, ids="+".join)
def test_what_is_not_finite_has_no_logit(features: tuple[str, ...], name: str, value: float) -> None:
    probe = a_probe(features)
    steps = growing(probe, tokens=80, first=76)
    running = RunningLogits(probe, next(steps))
    assert running.logits() != [None]
    sums = next(steps).sums.sums[min(probe.heads)]
    sums.received[0, 0, 76] = value  # of which a_ii is a part
    if name == "diagonal":
        sums.diagonal[0, 0, 76] = value
    assert running.logits() == [None]
    next(steps)
    assert running.logits() == [None]  # and it stays so
