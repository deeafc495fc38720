"""A real server around an engine that only sleeps, or a tiny model: what the service itself costs and holds.

    python benchmarks/serving_fake.py --item-ms 10 --forward-ms 0
    python benchmarks/serving_fake.py --tiny --batch-items 1   # a random model of 2 layers, without micro-batches

Prints "listening on HOST:PORT" and serves until it is told to stop.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lapwing_detector.calibration import Calibration
from lapwing_detector.detection import Detection
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import Scored, ScoreJob, detect
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import TokenIds
from lapwing_server.engine import Loaded
from lapwing_server.interpreter import for_good, run, take_short_turns
from lapwing_server.limits import Limits
from lapwing_server.server import Server, Settings
from lapwing_server.shelf import Shelf, Shelved

LAYERS = HEADS = 32
FEATURE = "laplacian_eigenvalues.v1"
DIGEST = "0" * 64


def a_probe() -> Probe:
    """Of a model of 32 layers of 32 heads, so that its heatmap has as many cells; it reads four heads."""
    generator = np.random.default_rng(0)
    selected = np.zeros((LAYERS, HEADS), bool)
    selected[:4, 0] = True
    return Probe(
        name="sleeping",
        features=(FEATURE,),
        k=1,
        layers=tuple(range(LAYERS)),
        weights=selected[..., None].astype(np.float32),
        bias=0.0,
        selected=selected,
        calibration=Calibration(1.0, 0.0),
        thresholds=(),
        identity=ModelIdentity("sleeping", "", *[DIGEST] * 3, "float32", "none", *[DIGEST] * 2, LAYERS, HEADS, (0.0,)),
        statistics={f"{FEATURE}/P_VALUE": generator.uniform(size=(LAYERS, HEADS)).astype(np.float32)},
    )


class SleepingEngine:
    """Every forward takes so long and every item in it so much longer; texts are one token for each byte."""

    def __init__(self, forward_seconds: float, item_seconds: float) -> None:
        self.probe = a_probe()
        self.identity = self.probe.identity
        self.max_tokens = 4096
        self._forward, self._item = forward_seconds, item_seconds

    def require(self, probe: Probe) -> None:
        """Fits every probe."""

    def tokens(self, prompt: Any, response: Any = None) -> TokenIds:
        """One for each byte."""
        return TokenIds(tuple(str(prompt).encode()), tuple(str(response or "").encode()))

    def score_ids(self, jobs: Sequence[ScoreJob]) -> list[Scored]:
        """Sleeps, and scores attention that is the same for all."""
        time.sleep(self._forward + self._item * len(jobs))
        return [Scored(self._detection(job), ()) for job in jobs]

    def streams(self) -> Any:
        """Writes nothing."""
        return NoStreams()

    def _detection(self, job: ScoreJob) -> Detection:
        sums = np.full((LAYERS, HEADS, len(job.ids.all)), 0.5, np.float32)
        summary = AttentionSummary(sums, sums, tuple(range(LAYERS)))
        return detect(job.probe, summary, job.ids, job.false_positive_rate, {})


class NoStreams:
    """Never has a stream."""

    def __len__(self) -> int:
        return 0

    def step(self) -> list[Any]:
        """Nothing."""
        return []


def tiny_detector() -> tuple[Any, Probe]:
    """A random model of two layers that reads the embedded model's tokens, and a probe of all its heads."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lapwing_detector.detector import Detector
    from lapwing_detector.embedded import model_path
    from lapwing_detector.identity import identity_of

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes)).eval()
    selected = np.ones((2, 4), bool)
    probe = replace(
        a_probe(),
        layers=(0, 1),
        weights=selected[..., None].astype(np.float32),
        selected=selected,
        identity=identity_of(model, tokenizer, "tiny"),
        statistics={},
    )
    return Detector.from_pretrained(model, probe, tokenizer=tokenizer), probe


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward-ms", type=float, default=0.0, help="milliseconds of each forward")
    parser.add_argument("--item-ms", type=float, default=0.0, help="milliseconds of each item in it")
    parser.add_argument("--tiny", action="store_true", help="a random model of 2 layers in place of sleeping")
    parser.add_argument("--batch-items", type=int, default=64, help="items of one forward (default 64)")
    arguments = parser.parse_args()

    def load() -> Loaded:
        if arguments.tiny:
            engine, probe = tiny_detector()
        else:
            engine = SleepingEngine(arguments.forward_ms / 1000, arguments.item_ms / 1000)
            probe = engine.probe
        return Loaded(engine, Shelf((Shelved(probe.name, probe),), probe))

    take_short_turns()
    server = Server(for_good(load), Settings(port=0, limits=Limits(batch_forward_items=arguments.batch_items)))
    port = await server.start()
    await server.loaded()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    run(main())
