"""The page: hostile text stays text, nothing comes from elsewhere, tokens have their colours."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report_fakes import ALLOWED, HOSTILE, Page, fake_probe, full_metrics, parsed

from lapwing_detector.head_map import figure_bytes
from lapwing_detector.probe import Probe
from lapwing_training.report import (
    html,
    html_report,
    model_card,
    sections,
    training_report,
)
from lapwing_training.report.heads import heatmaps
from lapwing_training.report.html import MOST_TOKENS, _coloured
from lapwing_training.report.svg import PALETTE, drawn

MARKDOWN = "h1 h2 h3 p ul li table thead tbody tr th td strong blockquote pre code img"


@pytest.fixture(scope="module")
def full() -> Probe:
    return fake_probe(full_metrics())


@pytest.fixture(scope="module")
def source(full: Probe) -> str:
    return html_report(full)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_hostile_texts_come_out_as_text() -> None:
    metrics = full_metrics(HOSTILE)
    metrics["calibration"]["reason"] = metrics["command"] = HOSTILE[0]
    metrics["comparison"][HOSTILE[1]] = metrics["comparison"]["token_count"]
    page = Page(html_report(fake_probe(metrics, model=HOSTILE[0])))
    assert page.tags <= ALLOWED
    assert not page.unbalanced
    assert not page.open
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for text in HOSTILE:
        assert page.text.count(text) >= 3, text  # in a table and in examples of either side
    written = [Page(f"<p>{text}</p>") for text in HOSTILE]
    assert {"script", "img", "svg", "iframe", "b"} <= {tag for other in written for tag in other.tags}  # control


def test_hostile_texts_stay_text_in_markdown() -> None:
    metrics = full_metrics(HOSTILE)
    for text in (
        training_report(fake_probe(metrics, model=HOSTILE[7])),
        model_card(fake_probe(metrics, model=HOSTILE[0])),
    ):
        rendered = parsed(text)
        allowed = {*MARKDOWN.split()}
        assert rendered.tags <= allowed, rendered.tags - allowed
        assert set(rendered.values("src")) <= {"p_value.png", "auroc.png", "head_probe.png", "selected.png"}
    shown = parsed(training_report(fake_probe(metrics)))
    for text in HOSTILE:
        assert text in shown.text, text
    assert {"script", "iframe"} & parsed("\n\n".join(HOSTILE)).tags  # control


def test_what_can_not_be_seen_is_shown_and_can_be_written() -> None:
    odd = "a\x00b\x1b[31m\u202egnp.exe\ud800\u2066 z\u200bz"
    source = html_report(fake_probe(full_metrics((odd, "plain")), model=odd))
    source.encode("utf-8")
    training_report(fake_probe(full_metrics((odd, "plain")))).encode("utf-8")
    assert "Where is a\\u0000b\\u001b[31m\\u202egnp.exe\\ud800\\u2066 z\\u200bz?" in source
    assert not set("\x00\x1b\u202e\u2066\u200b") & set(source)


def test_a_page_needs_nothing_from_elsewhere(source: str, page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "img"} & page.tags
    assert "http:" not in source
    assert "https:" not in source
    assert "url(" not in source.replace("url(#", "")
    assert "@import" not in source
    for value in page.values("href") + page.values("xlink:href"):
        assert value.startswith(("#", "data:image/png;base64,"))
    assert not page.values("src")
    [policy] = [element["content"] for _, element in page.elements if "http-equiv" in element]
    assert policy.startswith("default-src 'none'")


def test_every_anchor_has_its_place_and_every_id_is_there_once(page: Page) -> None:
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    inside = [value for value in page.values("href") if value.startswith("#")]
    clips = re.findall(r"url\(#([^)]+)\)", " ".join(page.values("clip-path")))
    assert len(inside) > 20
    assert clips
    assert {value.lstrip("#") for value in inside} | set(clips) <= set(ids)
    contents = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert contents == [f"#{section.anchor}" for section in sections.of_probe(fake_probe(full_metrics()))]


def test_the_same_probe_gives_the_same_page_also_when_it_was_saved(source: str) -> None:
    metrics = json.loads(json.dumps(full_metrics(), sort_keys=True))
    assert html_report(fake_probe(metrics)) == source


def test_pictures_take_the_colours_and_the_letters_of_the_page(source: str) -> None:
    assert not [colour for colour in PALETTE if colour in source]
    assert "font-family" not in source.partition("</style>")[2]
    assert "stroke: currentColor" in source
    assert source.count("var(--made-up)") > 10


def test_the_page_stays_small_whatever_is_written(full: Probe) -> None:
    long = ("word " * 30) * 40
    metrics = full_metrics([f"{long}{number}" for number in range(60)])
    for entry in (*metrics["examples"]["missed"], *metrics["examples"]["false_alarms"]):
        entry["tokens"] = ["a long word, "] * 3000
        entry["contributions"] = np.random.default_rng(0).normal(size=3000).tolist()
    source = html_report(fake_probe(metrics, layers=32, heads=32))
    assert len(source.encode()) < 1_500_000
    assert "The 40 largest of 61 strata." in source


def test_heatmaps_say_how_they_are_read(page: Page) -> None:
    labels = [label for label in page.values("aria-label") if label.startswith("Heatmap")]
    # Pairs of p, q, AUROC and head probe; weight and selection of the one it reads, and how often heads were selected.
    assert len(labels) == 4 * 2 + 2 + 1
    assert [label for label in labels if "AttnScore" in label] == labels[0:8:2]
    assert "A low p-value marks a head that separates the classes; bright cells carry no signal." in page.text
    for name in ("p-value", "q-value (Benjamini-Hochberg)", "AUROC", "Each head's own probe", "Heads that are read"):
        assert name in page.texts, name


def test_nothing_of_a_heatmap_is_cut(full: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    beyond: list[float] = []

    def looked_at(figure: Figure, format: str) -> bytes:
        boxes = [ax.get_tightbbox(FigureCanvasAgg(figure).get_renderer()) for ax in figure.axes]
        beyond.append(max(max(box.x1 - figure.bbox.x1, figure.bbox.x0 - box.x0) for box in boxes if box is not None))
        return figure_bytes(figure, format)

    monkeypatch.setattr("lapwing_training.report.svg.figure_bytes", looked_at)
    pictures = [picture for row in heatmaps(full) for picture in row.pictures]
    assert [drawn(picture)[:4] for picture in pictures] == ["<svg"] * 10
    assert max(beyond) <= 0
    drawn(replace(pictures[0], margins=(0.5, 0.0, 0.45, 0.1)))
    assert beyond[-1] > 0, "control"


def examples_page(**changes: Any) -> Page:
    """Only the examples, the first of which is changed."""
    metrics = full_metrics(tokens="tokens" in changes)
    metrics["examples"] = {"missed": [metrics["examples"]["missed"][0] | changes], "false_alarms": []}
    return Page(
        html.page(
            "", "", [section for section in sections.of_probe(fake_probe(metrics)) if section.anchor == "examples"]
        )
    )


def test_tokens_are_coloured_by_their_share() -> None:
    tokens, shares = ["Where", "?", "Pa", "ris\n", " is", " big"], [-0.1, 0.0, 0.5, -0.3, 0.04, 0.2]
    page = examples_page(tokens=tokens, contributions=shares, prompt="Where?", response="Paris\n is big")
    shown = [(one["class"], one["title"]) for one in page.of_class("up") + page.of_class("down") if "title" in one]
    assert shown == [("up5", "+.500"), ("up2", "+.200"), ("down1", "-.100"), ("down3", "-.300")]
    assert "Paris\n is big" in page.text
    assert page.of_class("legend")


def test_tokens_of_the_prompt_stand_apart_from_those_of_the_response() -> None:
    def paragraphs(tokens: list[str], response: str) -> dict[str, list[str]]:
        coloured = _coloured({"tokens": tokens, "contributions": [1.0] * len(tokens), "response": response})
        return {part: [token for _, _, token in row] for part, row in coloured.items()}

    apart = paragraphs(["a", " b", "a", " b"], "a b")
    assert apart == {"prompt": ["a", " b"], "response": ["a", " b"]}
    assert paragraphs(["a", "b", "</s>"], "b")["response"] == ["b", "</s>"]
    assert paragraphs(["a", "\ufffd"], "é")["prompt"] == []  # bytes that spell no letter: all in one
    assert paragraphs(["w"] * 500, "w" * 500) == {"prompt": [], "response": ["… ", *["w"] * MOST_TOKENS]}
    long = paragraphs(["w"] * 500 + ["z"], "z")
    assert long["response"] == ["z"]
    assert long["prompt"] == ["… ", *["w"] * (MOST_TOKENS - 1)]


def test_without_tokens_the_response_is_shown_as_it_is() -> None:
    page = examples_page(response="Paris <b>is</b> big")
    assert "Paris <b>is</b> big" in page.text
    assert not page.of_class("up")
    assert not page.of_class("legend")
