"""Probes whose metrics hold everything that a report can show, made without a fit, and a reader of pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from training_fakes import LAPLACIAN, SCORE, identity

from lapwing_detector.calibration import Calibration
from lapwing_detector.probe import Probe, Threshold

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]><svg onload=alert(1)>",
    "</style></p></td><iframe src=//evil.example>",
    "--><!-- <base href=//evil.example>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &#60;script&#62; <b>",
    "$\\frac{1}{0}$ ![x](http://evil.example/x.png) `a` | *b* _c_ <http://evil.example>",
)

HTML = (
    "html head meta title style body nav main header section h1 h2 h3 p ol ul li a div figure figcaption table thead "
    "tbody tr th td small span strong wbr details summary pre code"
)
SVG = "svg g defs path use text tspan clippath image rect"
ALLOWED = {*HTML.split(), *SVG.split()}

VOID = {"meta", "wbr", "br", "img", "link", "input", "hr", "base"}


def estimate(value: float, half: float = 0.03) -> dict[str, float | None]:
    return {"value": value, "low": value - half, "high": value + half}


def judged(auroc: float, strata: Sequence[str], **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "auroc": estimate(auroc),
        "auprc": estimate(auroc - 0.05),
        "within": {
            "mean": estimate(auroc - 0.06),
            "strata": {name: estimate(auroc - 0.02 * n, 0.05) for n, name in enumerate(strata)},
        },
    }
    return row | {f"tpr_at_fpr_{rate}": estimate(float(rate) * 4) for rate in ("0.01", "0.05", "0.10")} | more


def full_metrics(texts: Sequence[str] = ("capital", "river"), tokens: bool = True) -> dict[str, Any]:
    """Metrics in which every key of a report is filled; `texts` are the strata, prompts, responses, tokens and ids."""
    own = f"lapwing/{LAPLACIAN}"
    about = {"rows": 4000, "groups": 1000, "hallucinated": 1600, "base_rate": 0.4}
    return {
        "protocol": "nested",
        "probe": own,
        "test": judged(0.78, texts) | about | calibrated(),
        "out_of_fold": judged(0.79, texts) | about,
        **compared(own, texts),
        **flagged(),
        **curves(),
        "stages": [stage(fraction) for fraction in (0.25, 0.5, 0.75, 1.0)],
        "significance": {name: tested() for name in (SCORE, LAPLACIAN)},
        "stability": {"resamples": 200, "frequency": (np.arange(16).reshape(4, 4) / 15).tolist()},
        "examples": {
            "missed": [example(number, 1, texts, tokens) for number in range(10)],
            "false_alarms": [example(number, 0, texts, tokens) for number in range(10)],
        },
        "mode": "generated",
        "command": "lapwing train store --out my-probe --seed 0",
        "notes": [f"Something to know about {texts[0]}."],
        "log_probability_missing": 0,
    }


def calibrated() -> dict[str, Any]:
    said = np.linspace(0.05, 0.95, 10)[:8]
    bins = [{"rows": int(500 - 60 * n), "said": float(p), "true": float(min(1.0, p * 1.1))} for n, p in enumerate(said)]
    return {"brier": estimate(0.18), "ece": estimate(0.021, 0.01), "reliability": bins}


def compared(own: str, texts: Sequence[str]) -> dict[str, Any]:
    """The strata, everything beside the probe, and paired differences."""
    strata = {
        name: {"rows": 900 - 40 * n, "base_rate": 0.3 + 0.05 * (n % 5), "judged": True} for n, name in enumerate(texts)
    }
    return {
        "strata": strata | {"rare": {"rows": 7, "base_rate": 1.0, "judged": False}},
        "comparison": {
            own: judged(0.78, texts, kind="probe"),
            f"paper/{LAPLACIAN}": judged(0.76, texts, kind="probe"),
            "token_count": judged(0.56, texts, kind="baseline"),
            "log_probability": judged(0.74, texts, kind="baseline"),
            "log_probability+attention": judged(0.82, texts, kind="combination"),
            "token_statistics": judged(0.75, texts, kind="combination"),
            "random_heads": judged(0.72, texts, kind="control", draws=10, over_draws={"lowest": 0.7, "highest": 0.74}),
            "shuffled_labels": judged(0.5, texts, kind="control"),
        },
        "paired": {"difference": estimate(0.04, 0.01), "difference_within": estimate(0.03, 0.01)},
        "against_paper": {"probe": own, "heads": 5, "of": 16, "difference": estimate(0.02, 0.015)},
    }


def flagged() -> dict[str, Any]:
    """Operating points, and those of a guarantee."""
    five = {"realised_rate": 0.04, "low": 0.03, "high": 0.06, "found": 0.21}
    return {
        "thresholds": [
            {
                "false_positive_rate": rate,
                "logit": 2.0 - 10 * rate,
                "negatives": 2400,
                "reason": None,
                "realised_rate": rate * 1.1,
                "low": rate * 0.8,
                "high": rate * 1.4,
                "found": rate * 4,
            }
            for rate in (0.01, 0.05, 0.10)
        ],
        "guarantee": {
            "calibration_groups": 300,
            "rates": [
                {"false_positive_rate": 0.05, "logit": 1.6, **five},
                {"false_positive_rate": 0.10, "logit": 1.2, "realised_rate": 0.09, "low": 0.07, "high": 0.11},
            ],
        },
    }


def curves() -> dict[str, Any]:
    """What is drawn of the scores, and against the number of heads."""
    fractions, steps = np.linspace(0.0, 1.0, 50), np.linspace(0.0, 1.0, 11)
    return {
        "calibration": {"kind": "platt", "reason": "fewer than 1,000 rows for isotonic"},
        "roc": {"false_positive_rate": fractions.tolist(), "true_positive_rate": (fractions**0.35).tolist()},
        "pr": {"recall": fractions.tolist(), "precision": (0.95 - 0.55 * fractions**2).tolist()},
        "histogram": {
            "edges": steps.tolist(),
            "hallucinated": [20, 40, 70, 110, 160, 220, 260, 300, 260, 160],
            "other": [300, 480, 520, 420, 280, 180, 110, 70, 30, 10],
        },
        "curve": {
            "heads": [1, 2, 4, 8, 16],
            "selected": [estimate(value) for value in (0.66, 0.71, 0.75, 0.775, 0.78)],
            "random": [estimate(value, 0.05) for value in (0.57, 0.62, 0.68, 0.74, 0.78)],
        },
    }


def stage(fraction: float) -> dict[str, Any]:
    return {
        "fraction": fraction,
        "rows": 4000,
        "tokens": 40 * fraction,
        "auroc": estimate(0.62 + 0.16 * fraction),
        "brier": estimate(0.24 - 0.06 * fraction),
        "brier_final": estimate(0.27 - 0.09 * fraction),
        "slope": 1.0,
        "intercept": 0.0,
    }


def tested() -> dict[str, Any]:
    """What is said of the significance of one feature."""
    strongest = [{"layer": 2, "head": 1, **estimate(0.66)}, {"layer": 0, "head": 3, **estimate(0.36)}]
    return {"heads": 16, "share_p": 0.5, "share_q": 0.375, "strongest": strongest}


def example(number: int, label: int, texts: Sequence[str], tokens: bool) -> dict[str, Any]:
    words = [f"{text} " for text in texts] + ["of", " France", " is"]
    return {
        "id": f"{texts[number % len(texts)]}-{label}-{number}",
        "prompt": f"Where is {texts[number % len(texts)]}?",
        "response": "".join(words),
        "label": label,
        "probability": 0.02 * number if label else 1 - 0.02 * number,
        "tokens": words if tokens else None,
        "contributions": np.random.default_rng(number).normal(size=len(words)).tolist() if tokens else None,
    }


def fake_probe(metrics: dict[str, Any], layers: int = 4, heads: int = 4, model: str = "tiny", **more: Any) -> Probe:
    rng = np.random.default_rng(1)
    selected = rng.random((layers, heads)) < 0.3
    selected[0, 0] = True
    statistics = {}
    for name in (SCORE, LAPLACIAN):
        p_value = rng.random((layers, heads)) ** 4
        for statistic, values in {
            "P_VALUE": p_value,
            "Q_VALUE": np.minimum(1.0, 1.5 * p_value),
            "AUROC": 0.5 + 0.15 * rng.normal(size=(layers, heads)),
            "HEAD_PROBE": 0.5 + 0.2 * rng.random((layers, heads)),
        }.items():
            statistics[f"{name}/{statistic}"] = values.astype(np.float32)
    weights = rng.normal(size=(layers, heads, 4)) * selected[..., None]
    known: dict[str, Any] = {
        "name": "fake",
        "features": (LAPLACIAN,),
        "k": 4,
        "layers": tuple(range(layers)),
        "weights": weights.astype(np.float32),
        "bias": 0.0,
        "selected": selected,
        "calibration": Calibration(1.0, 0.0),
        "thresholds": (Threshold(0.05, 1.5, 0.055, 2400),),
        "identity": replace(identity(layers=layers, heads=heads), name=model),
        "statistics": statistics,
        "metrics": metrics,
        "training": {
            "recipe": "lapwing",
            "trained_as": f"lapwing/{LAPLACIAN}",
            "chosen": {"heads": int(selected.sum()), "C": 0.01},
            "store_digest": "f" * 64,
            "outer_folds": 5,
            "seed": 0,
        },
    }
    return Probe(**known | more)


class Page(HTMLParser):
    """What a browser would see of a page: elements with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]

    def of_class(self, start: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if attributes.get("class", "").startswith(start)]


def parsed(markdown: str) -> Page:
    return Page(MarkdownIt("commonmark").enable("table").render(markdown))


def in_ascii(page: Page) -> str:
    return page.text.replace("\xa0", " ").replace("−", "-")
