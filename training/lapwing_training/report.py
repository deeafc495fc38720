"""Numbers as Markdown: the report of a fit, the model card, the report on another store. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lapwing_detector.features import FEATURES
from lapwing_detector.probe import Probe
from lapwing_training.options import ATTENTION_SCORE, LAPLACIAN

TITLES = {
    "token_count": "length only (token count)",
    "log_probability": "mean token log-probability",
    "summed_attention_score": "AttnScore summed over heads",
    "log_probability+attention": "log-probability + attention",
    "random_heads": "random heads, same number",
    "all_heads": "all heads, no selection",
    "shuffled_labels": "shuffled labels (must be .5)",
}


def training_report(probe: Probe) -> str:
    """Everything that training found, for a reader who decides whether to use the probe."""
    metrics = probe.metrics
    parts = [
        f"# Report: {probe.name} (revision {probe.revision})",
        _summary(probe),
        *_notes(metrics),
        "## Held-out rows, against everything it must beat",
        "95 % intervals by group bootstrap. `within` is the mean of the AUROCs within each stratum: a probe that only "
        "recognises the kind of question shows .5 there.",
        comparison_table(metrics),
        *_over_draws(metrics),
        *_paired(metrics),
        *_strata(metrics),
        "## Operating points",
        "Logits are counted from the mean of the training rows, in their standard deviations.",
        _thresholds(metrics),
        "## Probabilities",
        _calibration(metrics),
        "## Heads (training rows only)",
        _significance(metrics),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def transfer_report(result: Mapping[str, Any]) -> str:
    """A probe on another store."""
    parts = [
        f"# {result['probe']} (revision {result['revision']}) on {result['store']}",
        f"{_about(result['test'])}; {result['seen_groups_left_out']} rows of groups that it was fitted on left out.",
        *_missing(result),
        comparison_table(result),
        *_paired(result),
        *_strata(result),
        _thresholds(result),
        _calibration(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(probe: Probe) -> str:
    """README.md of the probe directory."""
    metrics = probe.metrics
    tested = all(f"{name}/Q_VALUE" in probe.statistics for name in (ATTENTION_SCORE, LAPLACIAN))
    pictures = ["![Heads that the probe reads](selected.png)"]
    if tested:
        pictures.insert(0, "![p-value of each head: AttnScore left, Laplacian eigenvalues right](p_value.png)")
        pictures.insert(1, "![AUROC of each head](auroc.png)")
    parts = [
        f"# {probe.name}",
        "A Lapwing probe: how likely it is that a model's answer is made up, read from the model's own attention.",
        _summary(probe),
        "## Use",
        "```python\nfrom lapwing_detector import Detector\n\n"
        f'detector = Detector.from_pretrained(model, "path/of/this/directory")  # model: {probe.identity.name}\n'
        'print(detector.score("prompt", "response").probability)\n```',
        f"It scores {probe.identity.name} and refuses every other model. A sequence of fewer than "
        f"{probe.needed_tokens} tokens has no score.",
        *_notes(metrics),
        "## How good it is",
        comparison_table(metrics),
        _thresholds(metrics),
        "## Which heads",
        "A low p-value marks a head that separates made-up answers from others; bright cells carry no signal.",
        *pictures,
        _significance(metrics),
        "## Limits",
        "The numbers hold for questions like those it was fitted on; measure your own with `lapwing evaluate`. "
        "A high probability is a reason to look, not a proof, and a low one is no proof of truth.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_table(metrics: Mapping[str, Any]) -> str:
    """One row for the probe and each thing beside it."""
    comparison: Mapping[str, Any] = metrics["comparison"]
    own = metrics.get("probe")
    rows = [] if own in comparison else [("**this probe**", metrics["test"])]
    rows += [
        (f"**{title(name)}** (this probe)" if name == own else title(name), comparison[name])
        for name in _order(metrics)
    ]
    return table(
        ("", "AUROC", "within", "AUPRC", "TPR at 1 % FPR", "at 5 %", "at 10 %"),
        [
            (
                name,
                interval(row["auroc"]),
                interval(row["within"]["mean"]) if "within" in row else "-",
                interval(row["auprc"]),
                *(interval(row[f"tpr_at_fpr_{rate}"]) for rate in ("0.01", "0.05", "0.10")),
            )
            for name, row in rows
        ],
    )


def title(name: str) -> str:
    """A comparison's name for people."""
    recipe, _, features = name.partition("/")
    if not features:
        return TITLES.get(name, name)
    return f"{recipe}: {' + '.join(FEATURES[feature].title for feature in features.split('+'))}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in lines)


def interval(estimate: Mapping[str, float | None]) -> str:
    """A value with its interval, such as `.712 (.690-.733)`."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return number(value) if low is None or high is None else f"{number(value)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three digits, the leading zero left out."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _order(metrics: Mapping[str, Any]) -> list[str]:
    kinds = ("probe", "combination", "baseline", "control")
    names = sorted(metrics["comparison"], key=lambda name: kinds.index(metrics["comparison"][name]["kind"]))
    return sorted(names, key=lambda name: name != metrics.get("probe"))


def _summary(probe: Probe) -> str:
    test, held_out = probe.metrics["test"], probe.metrics["out_of_fold"]
    features = ", ".join(FEATURES[name].title for name in probe.features)
    return (
        f"Recipe `{probe.training['recipe']}` on {features}, k = {probe.k}: {int(probe.selected.sum())} of "
        f"{probe.selected.size} heads. Model: {probe.identity.name}. Fitted on {_about(held_out)}; judged on "
        f"{_about(test)}. AUROC {interval(test['auroc'])} on held-out rows, {interval(held_out['auroc'])} out of fold."
    )


def _about(sample: Mapping[str, Any]) -> str:
    return f"{sample['rows']:,} rows of {sample['groups']:,} groups, {sample['base_rate']:.1%} hallucinated"


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    found = metrics.get("notes", [])
    return ["\n".join(f"> {note}" for note in found)] if found else []


def _paired(metrics: Mapping[str, Any]) -> list[str]:
    if "paired" not in metrics:
        return []
    paired = metrics["paired"]
    text = f"Attention added to log-probability changes the AUROC by {interval(paired['difference'])}"
    if "difference_within" in paired:
        text += f", and its mean within the strata by {interval(paired['difference_within'])}"
    return [f"{text} (paired)."]


def _over_draws(metrics: Mapping[str, Any]) -> list[str]:
    """How far single draws lie apart, which the interval of their average does not say."""
    lines = [
        f"{title(name)}: single AUROCs from {number(row['over_draws']['lowest'])} to "
        f"{number(row['over_draws']['highest'])} over {row['draws']} draws; the row above is their average."
        for name, row in metrics["comparison"].items()
        if "over_draws" in row
    ]
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _missing(result: Mapping[str, Any]) -> list[str]:
    count = result["log_probability_missing"]
    if "log_probability" not in result["comparison"]:
        return ["> The items carry no log-probability, so that baseline is absent."]
    return [f"> {count} rows have no log-probability; they count as the middle one."] if count else []


def _strata(metrics: Mapping[str, Any]) -> list[str]:
    strata: Mapping[str, Any] = metrics["strata"]
    if not strata:
        return []
    comparison: Mapping[str, Any] = metrics["comparison"]
    columns = [name for name in _order(metrics) if "within" in comparison[name]]
    columns = [name for name in columns if comparison[name]["kind"] != "control" or name == "random_heads"]
    shown = {"this probe": metrics["test"]} | {
        title(name): comparison[name] for name in columns if name != metrics.get("probe")
    }
    rows = [
        (
            name,
            str(about["rows"]),
            f"{about['base_rate']:.1%}",
            *(interval(row["within"]["strata"][name]) if about["judged"] else "too few" for row in shown.values()),
        )
        for name, about in strata.items()
    ]
    return ["## Within each stratum (AUROC)", table(("stratum", "rows", "hallucinated", *shown), rows)]


def _thresholds(metrics: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{entry['false_positive_rate']:.0%}",
            "-" if entry["logit"] is None else f"{entry['logit']:.4f}",
            str(entry["negatives"]),
            "-" if entry["realised_rate"] is None else f"{entry['realised_rate']:.1%}",
            "-" if entry["found"] is None else f"{entry['found']:.1%}",
        )
        for entry in metrics["thresholds"]
    ]
    head = (
        "false alarms promised",
        "flag above logit",
        "set on negatives",
        "false alarms seen",
        "hallucinations found",
    )
    return table(head, rows)


def _calibration(metrics: Mapping[str, Any]) -> str:
    test = metrics["test"]
    rows = [(f"{entry['said']:.3f}", f"{entry['true']:.3f}", str(entry["rows"])) for entry in test["reliability"]]
    return (
        f"On held-out rows: Brier score {interval(test['brier'])}, "
        f"expected calibration error {interval(test['ece'])}.\n\n"
        + table(("probability said", "share hallucinated", "rows"), rows)
    )


def _significance(metrics: Mapping[str, Any]) -> str:
    rows = [
        (
            FEATURES[name].title,
            str(entry["heads"]),
            f"{entry['share_p']:.0%}",
            f"{entry['share_q']:.0%}",
            "; ".join(f"layer {one['layer']} head {one['head']} {interval(one)}" for one in entry["strongest"]),
        )
        for name, entry in metrics["significance"].items()
    ]
    head = ("feature", "heads", "p < .05", "q < .05 (Benjamini-Hochberg)", "strongest heads: AUROC (95 % DeLong)")
    return table(head, rows)
