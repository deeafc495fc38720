"""What a report says, and what it leaves out."""

from __future__ import annotations

import re
from typing import Any

import pytest
from report_fakes import Page, estimate, fake_probe, full_metrics, in_ascii
from training_fakes import SCORE

from lapwing_detector.probe import Probe
from lapwing_training.report import (
    comparison_table,
    html_report,
    interval,
    model_card,
    number,
    sections,
    training_report,
)


@pytest.fixture(scope="module")
def full() -> Probe:
    return fake_probe(full_metrics())


@pytest.fixture(scope="module")
def source(full: Probe) -> str:
    return html_report(full)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


PARTS = {
    "comparison": ("comparison", "strata"),
    "roc": (),
    "pr": (),
    "thresholds": ("thresholds",),
    "curve": ("number",),
    "stages": ("running",),
    "strata": ("strata",),
    "examples": ("examples",),
    "histogram": (),
    "guarantee": (),
    "calibration": (),
    "significance": (),
    "stability": (),
    "against_paper": (),
    "paired": (),
    "mode": (),
    "command": (),
    "protocol": (),
    "notes": (),
    "out_of_fold": (),
}
"""Keys of the metrics, and the sections that are nothing without them."""


@pytest.mark.parametrize("key", PARTS)
def test_what_an_older_probe_lacks_is_left_out(key: str) -> None:
    metrics = full_metrics()
    whole = {section.anchor for section in sections.of_probe(fake_probe(metrics))}
    del metrics[key]
    fewer = {section.anchor for section in sections.of_probe(fake_probe(metrics))}
    assert whole - fewer == set(PARTS[key])
    assert len(training_report(fake_probe(metrics))) <= len(training_report(fake_probe(full_metrics())))


def test_without_curves_there_is_no_section_of_curves() -> None:
    metrics = full_metrics()
    del metrics["roc"], metrics["pr"]
    assert "curves" not in {section.anchor for section in sections.of_probe(fake_probe(metrics))}


def test_a_probe_without_metrics_still_says_what_it_is() -> None:
    bare = fake_probe({}, statistics={}, training={})
    page = Page(html_report(bare))
    assert page.values("href")[:1] == ["#short"]
    for text in (page.text, training_report(bare), model_card(bare)):
        assert "of 16 heads" in text
        assert "tiny" in text


def test_the_findings_come_first_and_in_words(page: Page, full: Probe) -> None:
    for text in (in_ascii(page), training_report(full)):
        for finding in (
            "in 78% of all pairs: AUROC .780 (.750 to .810), where guessing gets .500",
            "Flagging with at most 5% false alarms guaranteed, it finds 21.0% of the made-up answers; 4.0% (3.0%",
            "The best score that needs no probe is mean token log-probability: AUROC .740 (.710 to .770)",
            "the published recipe all 16; the AUROC of the first less that of the second is .020 (.005 to .035)",
            "Nested cross-validation: the rows of each of 5 folds",
            "fitted on answers that the model wrote itself",
            "lapwing train store --out my-probe --seed 0",
        ):
            assert finding in text, finding
    anchors = [section.anchor for section in sections.of_probe(full)]
    assert anchors[:2] == ["short", "use"]


def test_a_probe_that_can_not_be_told_from_guessing_is_called_so() -> None:
    metrics = full_metrics()
    verdict = "can't be told from guessing: do not use"
    assert verdict not in training_report(fake_probe(metrics))
    metrics["test"]["auroc"] = estimate(0.52)
    assert verdict in training_report(fake_probe(metrics))
    metrics["test"]["auroc"] = {"value": None, "low": None, "high": None}
    assert verdict not in training_report(fake_probe(metrics))


def test_the_strongest_tokens_are_named_in_markdown() -> None:
    metrics = full_metrics()
    metrics["examples"]["missed"][0] |= {
        "tokens": ["Pa", "ris\n", " is", " b*"],
        "contributions": [0.5, -0.25, 0.0, 0.05],
    }
    assert "“Pa” +.500, “ris” -.250, “b\\*” +.050" in training_report(fake_probe(metrics))


def test_what_a_probe_says_of_its_rows_is_true_of_a_guaranteed_one() -> None:
    saved = "The saved probe is then fitted on all rows"
    assert f"{saved}." in training_report(fake_probe(full_metrics()))
    training = fake_probe(full_metrics()).training | {"guarantee": True}
    told = training_report(fake_probe(full_metrics(), training=training))
    assert f"{saved} but those of the groups that set the thresholds." in told


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("generated", "lapwing evaluate warns on text that the model only reads"),
        ("supplied", "generating with it warns, and so does lapwing evaluate"),
    ],
)
def test_only_what_warns_is_said_to_warn(mode: str, says: str) -> None:
    assert says in training_report(fake_probe(full_metrics() | {"mode": mode}))


def test_numbers_have_three_digits_and_no_leading_zero() -> None:
    assert [number(value) for value in (0.5, -0.25, 1.0, 12.3456, 0.0)] == [".500", "-.250", "1.000", "12.346", ".000"]
    assert interval(estimate(0.7)) == ".700 (.670 to .730)"
    assert interval({"value": 0.7, "low": None, "high": None}) == ".700"
    assert interval({"value": None, "low": None, "high": None}) == "-"


def test_the_table_of_comparisons_has_the_probe_first(full: Probe) -> None:
    rows = comparison_table(full.metrics).splitlines()
    assert rows[2].startswith("| **lapwing: Laplacian eigenvalues (this probe)** | .780 (.750 to .810) |")
    assert len(rows) == 2 + len(full.metrics["comparison"])
    alone = dict(full.metrics, probe="unnamed")
    assert comparison_table(alone).splitlines()[2].startswith("| **this probe** |")


def test_pictures_of_the_card_are_those_that_are_saved(full: Probe) -> None:
    card = model_card(full)
    for name in ("p_value.png", "auroc.png", "head_probe.png", "selected.png"):
        assert f"({name})" in card
    fewer = {key: value for key, value in full.statistics.items() if key != f"{SCORE}/HEAD_PROBE"}
    assert "head_probe.png" not in model_card(fake_probe(full_metrics(), statistics=fewer))
    assert len(card) < 4000


def test_how_often_heads_were_selected_stands_where_they_were_resampled(full: Probe) -> None:
    text = training_report(full)
    assert "Selection frequency" in [block.title for block in section_of(full, "heads") if hasattr(block, "caption")]
    rows = [line for line in text.splitlines() if line.startswith("| layer") and line.endswith(("yes |", "no |"))]
    assert rows[0].startswith("| layer 3 head 3 | 100.0% |")
    assert len(rows) == 16
    for line in rows:
        layer, head = map(int, re.findall(r"layer (\d) head (\d)", line)[0])
        assert line.endswith("yes |") == full.selected[layer, head]
    page = Page(html_report(full))
    assert [label for label in page.values("aria-label") if "share of the resamples" in label]
    metrics = full_metrics()
    del metrics["stability"]
    assert "Selection frequency" not in Page(html_report(fake_probe(metrics))).text


def section_of(probe: Probe, anchor: str) -> tuple[Any, ...]:
    return next(section.blocks for section in sections.of_probe(probe) if section.anchor == anchor)


def test_a_guaranteed_probe_says_which_rows_its_numbers_are_of() -> None:
    training = fake_probe(full_metrics()).training | {"guarantee": True}
    told = training_report(fake_probe(full_metrics(), training=training))
    assert "All numbers here are of the other four fifths of the groups" in told
    assert "four fifths" not in training_report(fake_probe(full_metrics()))


def test_a_probe_that_reads_more_than_attention_says_so_at_once() -> None:
    more = fake_probe(full_metrics(), statistic_weights={"minimum_log_odds.v1": -0.5})
    said = "It reads more than attention: the log-probabilities of the response's tokens, too (lowest log-odds)."
    for text in (training_report(more), model_card(more), Page(html_report(more)).text):
        assert said in text
    for text in (model_card(more), Page(html_report(more)).text):
        assert "attention and from the log-probabilities of its tokens" in text
    assert "more than attention" not in training_report(fake_probe(full_metrics()))
