"""Random probes, summaries and identities: small real ones, no mocks."""

from __future__ import annotations

import numpy as np

from lapwing_detector.calibration import Calibration
from lapwing_detector.identity import ModelIdentity, sha256
from lapwing_detector.probe import Probe, Threshold
from lapwing_detector.summary import AttentionSummary

BOTH = ("attention_score.v1", "laplacian_eigenvalues.v1")


def random_maps(layers: int, heads: int, tokens: int, seed: int = 0) -> np.ndarray:
    """(layers, heads, tokens, tokens) float64: causal attention maps, rows summing to 1."""
    random = np.random.default_rng(seed)
    scores = random.normal(0.0, 2.0, (layers, heads, tokens, tokens))
    scores[..., ~np.tri(tokens, dtype=bool)] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def summary_of(maps: np.ndarray) -> AttentionSummary:
    return AttentionSummary(
        np.diagonal(maps, axis1=-2, axis2=-1).astype(np.float32),
        maps.sum(axis=-2).astype(np.float32),
        tuple(range(maps.shape[0])),
    )


def random_identity(seed: int = 0, **changes: object) -> ModelIdentity:
    sample = np.random.default_rng(seed).normal(size=16).astype(np.float32)
    values = {
        "name": f"model-{seed}",
        "commit": "",
        "architecture": sha256(b"llama"),
        "parameters": sha256(b"shapes"),
        "weights": sha256(sample.tobytes()),
        "dtype": "float32",
        "quantisation": "none",
        "tokenizer": sha256(b"tokenizer"),
        "chat_template": sha256(b""),
        "layers": 2,
        "heads": 4,
        "sample": tuple(sample.tolist()),
    }
    return ModelIdentity(**values | changes)


def random_probe(
    layers: int = 2,
    heads: int = 4,
    k: int = 3,
    features: tuple[str, ...] = BOTH,
    seed: int = 0,
    identity: ModelIdentity | None = None,
    name: str = "random",
) -> Probe:
    random = np.random.default_rng(seed)
    width = sum(1 if feature == "attention_score.v1" else k for feature in features)
    selected = random.random((layers, heads)) < 0.6
    selected[0, 0], selected[-1, -1] = True, False
    weights = random.normal(size=(layers, heads, width)).astype(np.float32) * selected[..., None]
    statistics = {
        f"{feature}/{statistic}": random.random((layers, heads)).astype(np.float32)
        for feature in BOTH
        for statistic in ("P_VALUE", "Q_VALUE", "AUROC", "EFFECT_SIZE", "HEAD_PROBE")
    }
    return Probe(
        name=name,
        features=features,
        k=k,
        layers=tuple(range(layers)),
        weights=weights,
        bias=0.25,
        selected=selected,
        calibration=Calibration(1.5, -0.5),
        thresholds=(Threshold(0.01, 2.0, None, 400), Threshold(0.05, 1.0, 0.04, 400), Threshold(0.10, 0.5, 0.11, 400)),
        identity=identity or random_identity(),
        statistics=statistics,
        metrics={"auroc": {"value": 0.7, "low": 0.65, "high": 0.75}},
        training={"items": 12},
    )
