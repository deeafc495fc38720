"""What a reader should know before trusting the numbers, in plain sentences. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lapwing_training.evaluation import baselines
from lapwing_training.evaluation.nested import Fitted


def notes(fitted: Fitted, judged: Mapping[str, Any]) -> list[str]:
    """Of a fit, from what it found and how it was judged."""
    return [*_of_the_fit(fitted), *_of_the_rows(judged), *_of_the_controls(judged)]


def mode_note(fitted_on: str | None, here: str) -> list[str]:
    """A warning where the model wrote the texts of one side and only read those of the other.

    Args:
        fitted_on: mode of the store that the probe was fitted on; None where nobody noted it.
        here: mode of the store that is judged.
    """
    known = {
        "generated": "that the model wrote itself",
        "supplied": "that the model only read",
        "mixed": "of both kinds",
    }
    if fitted_on not in known or here not in known or fitted_on == here:
        return []
    return [
        f"The probe was fitted on texts {known[fitted_on]} ({fitted_on}), these are texts {known[here]} ({here}): its "
        "probabilities and thresholds may not hold here; fit one on texts like these."
    ]


def _of_the_fit(fitted: Fitted) -> Iterator[str]:
    if fitted.probe.chosen.get("significant_heads") == 0:
        yield "No head separates the classes at q < .05; the strongest were taken all the same."
    if fitted.probe.statistic_weights:
        yield "It reads more than attention: the log-probabilities of the response's tokens, too."
    if fitted.calibration.slope == 0.0:
        yield "The out-of-fold logits carry no signal: every probability is the base rate."


def _of_the_rows(judged: Mapping[str, Any]) -> Iterator[str]:
    guarantee = judged["guarantee"]
    for entry in judged["thresholds"] if guarantee is None else guarantee["rates"]:
        if entry["reason"]:
            yield f"No threshold at {entry['false_positive_rate']:.0%}: {entry['reason']}."
    if judged["mode"] == "mixed":
        yield "The store mixes texts that the model wrote with texts that it only read: a probe of one kind may differ."
    if "log_probability" not in judged["comparison"]:
        yield "The store holds no log-probability, so that baseline is absent; extract into a new directory to have it."
    elif judged["log_probability_missing"]:
        yield f"{judged['log_probability_missing']} test rows have no log-probability; they count as the middle one."


def _of_the_controls(judged: Mapping[str, Any]) -> Iterator[str]:
    for name, reason in judged["absent"].items():
        yield f"No control with {name.replace('_', ' ')}: {reason}."
    control = judged["comparison"].get("shuffled_labels")
    if control is None:
        return
    if judged["protocol"] == "nested":
        yield (
            f"Labels were shuffled and heads drawn by lot {control['draws']} times only, since nested cross-validation "
            f"fits every draw in each fold; --test-share 0.2 shuffles {baselines.SHUFFLES} times."
        )
    found = control["auroc"]
    if found["low"] is not None and not found["low"] <= 0.5 <= found["high"]:
        yield (
            f"With shuffled labels the AUROC is {found['value']:.3f}, outside its own interval around .5; this "
            "happens by chance in 1 run of 20: train again with another --seed, and look for a leak if it stays."
        )
