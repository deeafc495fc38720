from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from report_fakes import Page, estimate, fake_probe, full_metrics
from training_fakes import LAPLACIAN, SCORE
from typer.testing import CliRunner

from lapwing_detector.probe import Probe
from lapwing_training import transfer
from lapwing_training.cli.evaluate import evaluate
from lapwing_training.report import (
    comparison_table,
    figures,
    html,
    html_report,
    html_transfer_report,
    interval,
    model_card,
    number,
    sections,
    training_report,
    transfer_report,
)
from lapwing_training.report.html import MOST_TOKENS, _coloured
from lapwing_training.report.svg import PALETTE

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
MARKDOWN = "h1 h2 h3 p ul li table thead tbody tr th td strong blockquote pre code img"
ALLOWED = {*HTML.split(), *SVG.split()}


@pytest.fixture(scope="module")
def full() -> Probe:
    return fake_probe(full_metrics())


@pytest.fixture(scope="module")
def source(full: Probe) -> str:
    return html_report(full)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def parsed(markdown: str) -> Page:
    return Page(MarkdownIt("commonmark").enable("table").render(markdown))


def in_ascii(page: Page) -> str:
    return page.text.replace("\xa0", " ").replace("−", "-")


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


def test_heatmaps_say_how_they_are_read(page: Page) -> None:
    labels = [label for label in page.values("aria-label") if label.startswith("Heatmap")]
    assert len(labels) == 4 * 2 + 2  # pairs of p, q, AUROC and head probe; weight and selection of the one it reads
    assert [label for label in labels if "AttnScore" in label] == labels[0:8:2]
    assert "A low p-value marks a head that separates the classes; bright cells carry no signal." in page.text
    for name in ("p-value", "q-value (Benjamini-Hochberg)", "AUROC", "Each head's own probe", "Heads that are read"):
        assert name in page.texts, name


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


def test_the_strongest_tokens_are_named_in_markdown() -> None:
    metrics = full_metrics()
    metrics["examples"]["missed"][0] |= {
        "tokens": ["Pa", "ris\n", " is", " b*"],
        "contributions": [0.5, -0.25, 0.0, 0.05],
    }
    assert "“Pa” +.500, “ris” -.250, “b\\*” +.050" in training_report(fake_probe(metrics))


def drawn(draw: Callable[..., None], *arguments: Any) -> Any:
    figure = Figure()
    draw(figure, *arguments)
    return figure.axes[0]


def test_curves_pass_through_their_points() -> None:
    metrics = full_metrics()
    points = metrics["roc"]
    line = drawn(figures.roc, points, metrics["thresholds"]).lines[0]
    np.testing.assert_allclose(line.get_xydata().T, [points["false_positive_rate"], points["true_positive_rate"]])
    points = metrics["pr"]
    line = drawn(figures.precision_recall, points, 0.4).lines[0]
    np.testing.assert_allclose(line.get_xydata().T[:, ::-1], [points["recall"], points["precision"]])
    backwards = {name: values[::-1] for name, values in points.items()}
    same = drawn(figures.precision_recall, backwards, 0.4).lines[0]
    np.testing.assert_array_equal(same.get_xydata(), line.get_xydata())


def test_each_class_of_a_histogram_is_its_own_whole() -> None:
    stairs = drawn(figures.histogram, full_metrics()["histogram"]).patches
    assert len(stairs) == 4
    for patch in stairs:
        assert patch.get_data().values.sum() == pytest.approx(1.0)
    empty = {"edges": [0.0, 0.5, 1.0], "hallucinated": [0, 0], "other": [1, 2]}
    assert drawn(figures.histogram, empty).patches


def test_a_forest_has_a_line_for_each_that_is_known() -> None:
    rows = [("a", estimate(0.7)), ("b", {"value": None, "low": None, "high": None}), ("$c_", estimate(0.6))]
    ax = drawn(figures.forest, rows, "a")
    spans = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(spans[:2], [(0.67, 0.73), (0.57, 0.63)])
    assert [text.get_text() for text in ax.texts] == ["a", "$c_"]


def test_a_transfer_says_what_changed() -> None:
    metrics = full_metrics()
    result = {
        "probe": "mine",
        "revision": "0" * 12,
        "store": HOSTILE[0],
        "seen_groups_left_out": 3,
        **{key: metrics[key] for key in ("test", "comparison", "strata", "thresholds", "paired")},
        "log_probability_missing": 2,
    }
    assert "What changed" not in transfer_report(result)
    shift = {"slope": 1.0, "intercept": 0.5}
    result["drift"] = {
        "base_rate": {"before": 0.4, "here": 0.2},
        "auroc": {"before": estimate(0.78), "here": estimate(0.7), "change": estimate(-0.08)},
        "length": {"distance": 0.4, "p_value": 1e-9, "median_before": 12.0, "median_here": 30.0},
        "calibration": {"before": shift, "here": shift, "ece_before": estimate(0.1), "ece_here": None},
        "heads": {
            "tested": 5,
            "drifted": 2,
            "list": [
                {"feature": LAPLACIAN, "layer": 3, "head": 1, "distance": 0.5, "p_value": 1e-12, "q_value": 5e-12}
            ],
        },
    }
    page = Page(html_transfer_report(result))
    assert page.tags <= ALLOWED
    for text in (in_ascii(page), parsed(transfer_report(result)).text):
        for finding in (
            "AUROC .780 (.750 to .810) before, .700 (.670 to .730) here: -.080 (-.110 to -.050).",
            "Hallucinated: 40.0% before, 20.0% here.",
            "median 12 tokens before, 30 here",
            "Of 5 numbers that the probe reads of its heads, 2 are distributed otherwise here",
            "layer 3 head 1, Laplacian eigenvalues",
            "2 rows have no log-probability",
            HOSTILE[0],
        ):
            assert finding in text, finding


def transferred(**changes: Any) -> dict[str, Any]:
    """What `evaluate_probe` gives, without drift."""
    metrics = full_metrics()
    kept = {key: metrics[key] for key in ("test", "comparison", "strata", "thresholds", "paired")}
    about = {"probe": "mine", "revision": "0" * 12, "store": "other", "seen_groups_left_out": 3, "notes": []}
    return {**about, **kept, "log_probability_missing": 2} | changes


def test_evaluate_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def judged(*arguments: object, **options: object) -> dict[str, Any]:
        asked.append(arguments)
        return transferred()

    monkeypatch.setattr(transfer, "evaluate_probe", judged)
    app = typer.Typer()
    app.command()(evaluate)
    path = tmp_path / "new" / "page.html"
    plain = CliRunner().invoke(app, ["probe", "store", "--out", str(path)])
    assert (plain.exit_code, plain.stdout.splitlines()[-1]) == (0, f"page in {path}")
    assert path.read_text(encoding="utf-8") == html_transfer_report(transferred())
    told = CliRunner().invoke(app, ["probe", "store", "--out", str(path), "--json"])
    assert json.loads(told.stdout) == transferred()
    assert list(path.parent.iterdir()) == [path]
    refused = CliRunner().invoke(app, ["probe", "store", "--out", str(tmp_path)])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{tmp_path} is a directory" in refused.stderr
    assert len(asked) == 2  # it is refused before anything is judged


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
