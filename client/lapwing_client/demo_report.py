"""What `lapwing demo` prints: the answers with their scores, and how good the probe is. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lapwing_client.results import Detection, Probe

BAR = 10
"""Characters of a full bar."""

STEPS = "▁▂▃▄▅▆▇█"

ROWS = (
    ("token_count", "length only"),
    ("log_probability", "mean token log-probability"),
    ("token_statistics", "log-probability statistics"),
    ("summed_attention_score", "AttnScore summed over heads"),
    ("random_heads", "random heads, same number"),
    ("all_heads", "all heads, no selection"),
    ("shuffled_labels", "control: shuffled labels"),
)
"""Baselines and controls of a probe's metrics, with their names here."""

FEATURES = {
    "attention_score.v1": "AttnScore",
    "laplacian_eigenvalues.v1": "LapEigvals",
    "sink_scores.v1": "sink scores",
}


@dataclass(frozen=True)
class Asked:
    """One question or text of the demo with what came of it."""

    question: str
    answer: str
    truth: str
    wrong: bool
    seen: bool | None
    """Whether the model ever read of the subject; None for given answers."""

    trail: tuple[float, ...]
    """The running probability after each token; empty for given answers."""

    detection: Detection


def answers(asked: Sequence[Asked], given: Sequence[Asked], rate: float) -> str:
    """The table of questions, answers, truths and scores."""
    head = ("question", "answer", "truth", "", "made up?", "while writing", "flagged")
    rows = [head, *(row(one) for one in asked)]
    rows += [("", "", "", "", "", "", ""), ("given answers, read by the model", "", "", "", "", "", "")]
    rows += [row(one) for one in given]
    text = aligned(rows)
    wrong = sum(one.wrong for one in asked)
    return (
        f"\nThe model answers {len(asked)} questions of held-out subjects; * marks subjects that it never read of.\n\n"
        f"{text}\n\n"
        f"{wrong} of the {len(asked)} answers are wrong (of places that share a name, each one's country counts as "
        f"right).\nFlagged means: above the threshold that {rate:.0%} of right answers pass. The probe was fitted on "
        "answers that the model\nwrote itself; of answers that are given to it, it can say less.\n"
    )


def row(one: Asked) -> tuple[str, ...]:
    """One line of the table."""
    return (
        shortened(one.question, 52) + (" *" if one.seen is False else ""),
        shortened(one.answer, 24),
        shortened(one.truth, 24),
        "wrong" if one.wrong else "right",
        bar(one.detection),
        trail(one.trail),
        {True: "FLAGGED", False: "-", None: "?"}[one.detection.flagged],
    )


def bar(detection: Detection) -> str:
    """A probability as a bar; plainly no score where there is none."""
    if detection.probability is None:
        return f"no score ({detection.reason})"
    full = round(detection.probability * BAR)
    return f"{'█' * full}{'░' * (BAR - full)} {detection.probability:.2f}"


def trail(probabilities: Sequence[float]) -> str:
    """The running probability, one mark a token."""
    return "".join(STEPS[min(len(STEPS) - 1, int(p * len(STEPS)))] for p in probabilities)


def quality(probe: Probe) -> str:
    """Held-out AUROC of the probes beside the baselines, none left out."""
    metrics = probe.metrics
    comparison: Mapping[str, Any] = metrics["comparison"]
    rows = [("held-out AUROC (95 % interval)", "overall", "within relations")]
    rows += [line(probe_name(name), entry) for name, entry in comparison.items() if entry["kind"] == "probe"]
    rows += [line(shown, comparison[name]) for name, shown in ROWS if name in comparison]
    if "log_probability+attention" in comparison:
        rows.append(line("log-probability + attention", comparison["log_probability+attention"]))
    test = metrics["test"]
    text = (
        f"{aligned(rows)}\n\n{test['rows']:,.0f} answers about {test['groups']:,.0f} subjects that no probe was "
        f"fitted on; {test['base_rate']:.0%} of them made up."
    )
    if "paired" in metrics:
        paired = metrics["paired"]
        text += f"\nAttention added to log-probability (paired): {interval(paired['difference'], '+.3f')} AUROC overall"
        if "difference_within" in paired:
            text += f",\n{interval(paired['difference_within'], '+.3f')} within relations."
    return text + "\n"


def probe_name(name: str) -> str:
    """A comparison's name for people, such as `LapEigvals (recipe paper)`."""
    recipe, _, features = name.partition("/")
    shown = " + ".join(FEATURES.get(feature, feature) for feature in features.split("+"))
    return f"{shown} (recipe {recipe})"


def line(name: str, entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """One row of the table of qualities."""
    within = interval(entry["within"]["mean"]) if "within" in entry else "-"
    return (name, interval(entry["auroc"]), within)


def interval(estimate: Mapping[str, float | None], form: str = ".3f") -> str:
    """A value with its interval."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} ({low:{form}} to {high:{form}})"


def shortened(text: str, limit: int) -> str:
    """Printable text on one line, cut to the limit."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
