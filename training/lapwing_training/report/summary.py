"""A fit in plain words: how good, how sure, for whom. Knows the metrics and no markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lapwing_detector.probe import Probe
from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.report.words import (
    about,
    feature_title,
    interval,
    number,
    one_line,
    percent,
    percent_interval,
    title,
)

MODES = {
    "generated": "It was fitted on answers that the model wrote itself; lapwing evaluate warns on text that the model "
    "only reads.",
    "supplied": "It was fitted on supplied texts that the model only read; generating with it warns, and so does "
    "lapwing evaluate on answers that the model wrote itself.",
    "mixed": "It was fitted both on answers that the model wrote and on supplied texts that the model only read.",
    "unknown": "Nobody noted whether the model wrote the answers it was fitted on, or only read them.",
}


def described(probe: Probe) -> str:
    """What the probe is and what it was fitted and judged on, in one paragraph."""
    test, held_out = probe.metrics.get("test"), probe.metrics.get("out_of_fold")
    features = ", ".join(feature_title(name) for name in probe.features)
    recipe = f"Recipe {probe.training['recipe']} on" if "recipe" in probe.training else "Reads"
    words = [
        f"{recipe} {features}, k = {probe.k}: {int(probe.selected.sum())} of {probe.selected.size} heads.",
        *reads_more(probe),
        f"Model: {one_line(probe.identity.name)}.",
    ]
    if probe.metrics.get("protocol") == "nested" and test:
        words.append(f"Fitted on {about(test)}; judged on the same rows by nested cross-validation.")
        words.append(f"AUROC {interval(test['auroc'])}.")
    elif test and held_out:
        words.append(f"Fitted on {about(held_out)}; judged on {about(test)}.")
        words.append(f"AUROC {interval(test['auroc'])} on held-out rows, {interval(held_out['auroc'])} out of fold.")
    return " ".join(words)


def reads_more(probe: Probe) -> tuple[str, ...]:
    """A sentence for a probe that reads more than attention, and nothing for others."""
    if not probe.reads_log_probabilities:
        return ()
    names = [TOKEN_STATISTICS[id].title for id in probe.statistic_weights]
    return (f"It reads more than attention: the log-probabilities of the response's tokens, too ({', '.join(names)}).",)


def in_words(metrics: Mapping[str, Any]) -> list[str]:
    """The findings, one sentence each, for a reader who knows no statistics."""
    return [*_ranking(metrics), *_flagging(metrics), *_saying(metrics), *_beside(metrics)]


def good_for(probe: Probe) -> tuple[str, ...]:
    """What the probe may be used for."""
    model = one_line(probe.identity.name)
    mode = MODES.get(str(probe.metrics.get("mode", probe.training.get("mode", ""))))
    lines = [
        f"Answers of {model}, to questions like those it was fitted on.",
        *([mode] if mode else []),
        "Deciding where to look first: a high probability is a reason to check an answer.",
    ]
    return tuple(lines)


def not_good_for(probe: Probe) -> tuple[str, ...]:
    """What the probe must not be used for."""
    return (
        "Any other model: it refuses them.",
        f"Prompt and answer of fewer than {probe.needed_tokens} tokens together: they have no score.",
        "Other domains, languages or ways of sampling, before lapwing evaluate has measured it there.",
        "Proof. A high probability does not show that an answer is wrong, and a low one does not show that it is true.",
    )


def judged_how(probe: Probe) -> str:
    """Which rows the numbers come from."""
    metrics, training = probe.metrics, probe.training
    if metrics.get("protocol") == "nested":
        folds = training.get("outer_folds", 5)
        apart = bool(training.get("guarantee"))
        but = " but those of the groups that set the thresholds" if apart else ""
        of_the_others = (
            " All numbers here are of the other four fifths of the groups: those that set the thresholds are judged "
            "nowhere."
        )
        return (
            f"Nested cross-validation: the rows of each of {folds} folds are scored by a probe that was chosen, fitted "
            "and calibrated on the other folds alone; groups are never divided. The saved probe is then fitted "
            f"on all rows{but}.{of_the_others * apart}"
        )
    share = training.get("test_share")
    kept = f"{share:.0%} of the groups were" if isinstance(share, float) else "Some groups were"
    return f"{kept} kept apart from the start; nothing was fitted, chosen or scaled on them."


def _ranking(metrics: Mapping[str, Any]) -> Iterator[str]:
    test = metrics.get("test")
    if not test or test["auroc"]["value"] is None:
        return
    auroc = test["auroc"]
    yield (
        f"Shown a made-up answer and another one, neither seen before, it gives the made-up one the higher score in "
        f"{auroc['value']:.0%} of all pairs: AUROC {interval(auroc)}, where guessing gets .500."
    )
    if auroc["low"] is not None and auroc["low"] <= 0.5:
        yield "That can't be told from guessing: do not use this probe."
    if "within" in test:
        yield (
            f"Within one kind of question it is {interval(test['within']['mean'])} (mean over the strata); a probe "
            "that only recognises the kind of question gets .500 there."
        )


def _flagging(metrics: Mapping[str, Any]) -> Iterator[str]:
    promise = metrics.get("guarantee")
    entries = promise["rates"] if promise else metrics.get("thresholds", ())
    usable = [entry for entry in entries if entry["logit"] is not None]
    if not usable:
        return
    entry = min(usable, key=lambda point: abs(point["false_positive_rate"] - 0.05))
    seen = percent_interval(entry["realised_rate"], entry.get("low"), entry.get("high"))
    kind = "guaranteed" if promise else "promised"
    yield (
        f"Flagging with at most {entry['false_positive_rate']:.0%} false alarms {kind}, it "
        f"finds {percent(entry.get('found'))} of the made-up answers; {seen} of the others were flagged in fact."
    )


def _saying(metrics: Mapping[str, Any]) -> Iterator[str]:
    test = metrics.get("test", {})
    if "ece" in test and test["ece"]["value"] is not None:
        rate = test["base_rate"]
        yield (
            f"The probability it says misses the observed share by {test['ece']['value']:.1%} on average. Its Brier "
            f"score is {interval(test['brier'])}; saying {rate:.0%} every time would get {number(rate * (1 - rate))}."
        )


def _beside(metrics: Mapping[str, Any]) -> Iterator[str]:
    rows = metrics.get("comparison", {})
    baselines = {
        name: row["auroc"]
        for name, row in rows.items()
        if row["kind"] == "baseline" and row["auroc"]["value"] is not None
    }
    if baselines:
        best = max(baselines, key=lambda name: float(baselines[name]["value"]))
        yield f"The best score that needs no probe is {title(best)}: AUROC {interval(baselines[best])}."
    yield from paired(metrics)


def paired(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Differences of AUROCs in the same resamples."""
    both = metrics.get("paired")
    if both:
        beside = title(both["of"]) if "of" in both else "log-probability"
        text = f"Attention added to {beside} changes the AUROC by {interval(both['difference'])}"
        if "difference_within" in both:
            text += f", and its mean within the strata by {interval(both['difference_within'])}"
        yield f"{text} (paired)."
    alone = metrics.get("against_statistics")
    if alone:
        text = f"Its AUROC less that of log-probability statistics alone is {interval(alone['difference'])}"
        if "difference_within" in alone:
            text += f", within the strata {interval(alone['difference_within'])}"
        yield f"{text} (paired)."
    paper = metrics.get("against_paper")
    if paper:
        text = (
            f"{title(paper['probe'])} reads {paper['heads']} heads, the published recipe all {paper['of']}; the AUROC "
            f"of the first less that of the second is {interval(paper['difference'])}"
        )
        if paper.get("difference_within"):
            text += f", within the strata by {interval(paper['difference_within'])}"
        yield f"{text} (paired)."
