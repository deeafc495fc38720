"""The running logit is, after every token, what the probe says of the same tokens read at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lapwing_detector import sequences
from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.detector import Detector
from lapwing_detector.errors import CaptureError
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.running import RunningLogits
from lapwing_detector.sequences import Sequences
from tests.detector.captures import STEP_BY_STEP, padded
from tests.detector.probes import random_probe
from tests.detector.running_sums import HEADS, LAYERS, SAME_SUMS, a_probe, require_same, said
from tests.detector.tiny_models import EOS, WINDOW, captured_forward, new_model, tiny_model, token_ids


def stepped(model: PreTrainedModel, captured: Captured, ids: torch.Tensor, first: int) -> Iterator[int]:
    """Feed a prompt and then token by token; gives the length after each."""
    cache = None
    for start, stop in [(0, first), *((at, at + 1) for at in range(first, ids.shape[1]))]:
        with captured.resume(), torch.no_grad():
            cache = model(ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
        yield stop


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_model_that_reads_token_by_token(family: str) -> None:
    model, probe, ids = tiny_model(family), a_probe(), token_ids(1, 134)
    assert ids.shape[1] > 8 * WINDOW  # of mistral and gemma2: far past its edge
    captured = capture_attention(model, heads=probe.heads)
    running = RunningLogits(probe, captured)
    for tokens in stepped(model, captured, ids, first=122):
        [logit] = running.logits()
        assert logit == pytest.approx(said(probe, captured.summaries()[0]), abs=SAME_SUMS)
        alone = said(probe, captured_forward(model, ids[:, :tokens])[0])
        assert logit == pytest.approx(alone, abs=10 * STEP_BY_STEP)  # 50 numbers that are STEP_BY_STEP apart at most
    assert logit != pytest.approx(said(probe, captured_forward(model, ids[:, :-1])[0]), abs=10 * STEP_BY_STEP)


def test_asking_late_or_twice_changes_nothing() -> None:
    model, probe, ids = tiny_model("llama"), a_probe(), token_ids(1, 90)
    captured = capture_attention(model, heads=probe.heads)
    every, some = RunningLogits(probe, captured), RunningLogits(probe, captured)
    for tokens in stepped(model, captured, ids, first=40):
        logits = every.logits()
        assert every.logits() == logits
        if tokens % 7 == 0:
            require_same(some.logits(), logits, SAME_SUMS)


@pytest.mark.parametrize(
    ("piece_bytes", "pieces"), [(sequences.PIECE_BYTES, {1}), (1, {LAYERS}), (3000, {1, 2, LAYERS})]
)
def test_buffers_grow_while_tokens_come(piece_bytes: int, pieces: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "PIECE_BYTES", piece_bytes)
    model, probe, ids = tiny_model("llama"), a_probe(k=2), token_ids(1, 150)
    captured = capture_attention(model, heads=probe.heads)
    running, capacities, found = RunningLogits(probe, captured), set(), set()
    for _ in stepped(model, captured, ids, first=2):
        require_same(running.logits(), [said(probe, captured.summaries()[0])], SAME_SUMS)
        capacities |= {sums.capacity for sums in captured.sums.joint}
        found.add(len(captured.sums.joint))
    assert len(capacities) > 2
    assert found == pieces


def test_sums_that_were_moved_are_let_go_though_nobody_asks_again() -> None:
    model, probe, ids = tiny_model("llama"), a_probe(k=2), token_ids(1, 80)
    captured = capture_attention(model, heads=probe.heads)
    running, steps = RunningLogits(probe, captured), stepped(model, captured, ids, first=4)
    next(steps)
    running.logits()
    [joint] = captured.sums.joint
    before = [StorageWeakRef(part.untyped_storage()) for part in (joint.diagonal, joint.received)]
    capacity = joint.capacity
    del joint
    while next(steps) <= capacity:
        assert not any(storage.expired() for storage in before)
    assert all(storage.expired() for storage in before)
    require_same(running.logits(), [said(probe, captured.summaries()[0])], SAME_SUMS)


def test_too_short_is_no_logit_and_never_zero() -> None:
    model, probe = tiny_model("llama"), a_probe(k=5)
    captured = capture_attention(model, heads=probe.heads)
    running = RunningLogits(probe, captured)
    found = [running.logits() for _ in stepped(model, captured, token_ids(1, 7), first=1)]
    assert [logit is None for [logit] in found] == [True] * 4 + [False] * 3


def test_a_new_text_starts_anew() -> None:
    model, probe = tiny_model("llama"), a_probe()
    captured = capture_attention(model, heads=probe.heads)
    running = RunningLogits(probe, captured)
    for seed, first, last in ((1, 60, 70), (2, 4, 9), (3, 9, 9)):
        ids = token_ids(1, last, seed=seed)
        for _ in stepped(model, captured, ids, first):
            require_same(running.logits(), [said(probe, captured.summaries()[0])], SAME_SUMS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_sequence_of_a_padded_batch_counts_its_own_tokens(side: str) -> None:
    model, probe, lengths = tiny_model("llama"), a_probe(), (66, 40, 2)
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in lengths], side)
    new = token_ids(3, 6, seed=9)
    captured = capture_attention(model, heads=probe.heads)
    running, cache = RunningLogits(probe, captured), None
    for fed in (ids, *new.split(1, dim=1)):
        if cache is not None:
            mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        with captured.resume(), torch.no_grad():
            cache = model(fed, attention_mask=mask, position_ids=positions, past_key_values=cache).past_key_values
        logits = running.logits()
        require_same(logits, [said(probe, summary) for summary in captured.summaries()], SAME_SUMS)
        assert len(set(logits)) == 3
    alone = [torch.cat([token_ids(1, n, seed=n)[0], more]) for n, more in zip(lengths, new, strict=True)]
    expected = [said(probe, captured_forward(model, one[None])[0]) for one in alone]
    require_same(logits, expected, 10 * STEP_BY_STEP)


class Asks(LogitsProcessor):
    """Asks for the running logits before every token of a generation."""

    def __init__(self, running: RunningLogits) -> None:
        self.running = running
        self.logits: list[list[float | None]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(self.running.logits())
        return scores


def test_a_sequence_that_has_ended_keeps_its_logit_while_others_go_on() -> None:
    model, probe = tiny_model("llama"), a_probe()
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (9, 12, 30)], "left")
    captured = capture_attention(model, heads=probe.heads)
    asks = Asks(RunningLogits(probe, captured))
    torch.manual_seed(3)
    with captured:
        result = model.generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=True, logits_processor=LogitsProcessorList([asks])
        )
    answers = result[:, 30:]
    lengths = [
        int((torch.isin(row, torch.tensor(EOS)).nonzero().flatten().tolist() or [len(row)])[0]) for row in answers
    ]
    assert min(lengths) < max(lengths) - 2
    summaries = captured.summaries()  # with the row of the newest token
    require_same(asks.running.logits(), [said(probe, summary) for summary in summaries], SAME_SUMS)
    early = lengths.index(min(lengths))
    assert len({logits[early] for logits in asks.logits[: lengths[early]]}) == lengths[early]
    assert len({logits[early] for logits in asks.logits[lengths[early] :]}) == 1


def test_a_broken_model_has_no_logit() -> None:
    model, probe = new_model("llama"), a_probe()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    captured = capture_attention(model, heads=probe.heads)
    with captured, torch.no_grad():
        model(token_ids(1, 9))
    assert RunningLogits(probe, captured).logits() == [None]


def test_a_probe_that_reads_no_head_says_its_bias() -> None:
    probe = a_probe(selected=np.zeros((LAYERS, HEADS), bool), weights=np.zeros_like(a_probe().weights))
    captured = capture_attention(tiny_model("llama"), heads=probe.heads or None)
    with captured, torch.no_grad():
        tiny_model("llama")(token_ids(1, 9))
    assert RunningLogits(probe, captured).logits() == [probe.bias]


def test_a_capture_of_other_heads_is_refused() -> None:
    probe = a_probe()
    for heads in (None, {0: [0]}):
        captured = capture_attention(tiny_model("llama"), heads=heads)
        with captured, torch.no_grad():
            tiny_model("llama")(token_ids(1, 9))
        with pytest.raises(CaptureError, match=r"exactly the heads that the probe 'random' reads.*heads=probe\.heads"):
            RunningLogits(probe, captured).logits()


def test_nothing_to_read_is_said() -> None:
    model, probe = new_model("llama"), a_probe()
    captured = capture_attention(model, heads=probe.heads)
    running = RunningLogits(probe, captured)
    with pytest.raises(CaptureError, match="nothing was captured yet"):
        running.logits()
    model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with captured, pytest.raises(ZeroDivisionError), torch.no_grad():
        model(token_ids(1, 9))
    with pytest.raises(CaptureError, match="did not finish"):
        running.logits()


def test_the_last_running_logit_is_that_of_the_detection_which_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LanguageModel.load()
    detector = Detector(loaded, random_probe(layers=6, heads=8, k=10, identity=loaded.identity))
    calls: list[int] = []
    real = Sequences.summary
    monkeypatch.setattr(Sequences, "summary", lambda sums, row: calls.append(row) or real(sums, row))
    *tokens, generation = detector.generate("Question: which time zone is the city of Paris in? Answer:")
    assert tokens[-1].logit == generation.detection.logit
    assert tokens[-1].probability == generation.detection.probability
    assert calls == [0]
    assert tokens[-2].logit != pytest.approx(generation.detection.logit, abs=STEP_BY_STEP)  # one token earlier
