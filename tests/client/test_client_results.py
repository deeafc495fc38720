"""What a caller holds in the end: frozen values that become JSON, and show themselves in a line and in a notebook."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import math
import time
from typing import Any

import pytest

from lapwing.v1 import detection_pb2, probes_pb2
from lapwing_client import (
    Activation,
    Client,
    Deadline,
    Detection,
    GeneratedToken,
    Generation,
    Heatmap,
    InvalidRequest,
    Matrix,
    Probe,
    RejectedRevision,
    ServerInfo,
    replies,
    results,
    values,
)
from lapwing_client.results import HeadContribution, Limits, ModelIdentity, Threshold


def a_detection(**changes: Any) -> Detection:
    message = detection_pb2.Detection(
        state="DETECTION_STATE_SCORED",
        probability=0.75,
        logit=1.25,
        bias=-0.5,
        flagged=True,
        false_positive_rate=0.05,
        flagged_at=[0.05, 0.1],
        probe_name="probe",
        probe_revision="abc",
        prompt_tokens=2,
        response_tokens=3,
        token_ids=range(5),
        heads_contribution=1.5,
        statistic_contributions={"mean": 0.25},
        strongest_heads=[{"layer": 1, "head": 2, "contribution": 0.5}],
    )
    return dataclasses.replace(replies.detection_of(message), **changes)


UNSCORED = {"state": "UNSCORED", "reason": "TOO_SHORT", "message": "2 tokens", "probability": None, "logit": None}


def a_heatmap(image: bytes, **changes: Any) -> Heatmap:
    fields: dict[str, Any] = {"probe_name": "probe", "probe_revision": "abc", "feature": "f.v1", "statistic": "AUROC"}
    axes = {"layers": (0,), "column_label": "head", "row_label": "layer", "value_label": "AUROC"}
    return Heatmap(**fields | axes | {"values": Matrix((1, 2), (0.5, math.nan)), "image": image} | changes)


IDENTITY = ModelIdentity(*[""] * 9, 2, 3)
EVERY_KIND = [
    HeadContribution(1, 2, 0.5),
    a_detection(),
    GeneratedToken(0, 7, "x", -0.5, None, None, (0.25, 0.5)),
    Generation("x", (1,), (7,), "FLAGGED", a_detection()),
    Matrix((1, 2), (1.0, math.nan)),
    a_heatmap(b"\x89PNG"),
    IDENTITY,
    Threshold(0.05, 1.0, None, 0),
    RejectedRevision("abc", "torn"),
    replies.probe_of(probes_pb2.Probe(name="probe", revisions=["b", "a"])),
    Activation(replies.probe_of(probes_pb2.Probe(name="probe")), "before", "a"),
    Limits(*[1] * 13),
    ServerInfo("1", "SERVING", "", IDENTITY, 400, Limits(*[1] * 13), "probe", "abc", {"python": "3"}),
]


def kinds(root: type) -> set[type]:
    return {kind for child in root.__subclasses__() for kind in {child} | kinds(child)}


def test_every_kind_is_looked_at_below() -> None:
    assert {type(one) for one in EVERY_KIND} == kinds(values.Result)
    assert Probe in kinds(values.Result)


@pytest.mark.parametrize("result", EVERY_KIND, ids=lambda one: type(one).__name__)
def test_every_result_is_frozen_and_becomes_json(result: Any) -> None:
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(written) == ({"shape", "rows"} if isinstance(result, Matrix) else set(vars(result)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, next(iter(vars(result))), None)


@pytest.mark.parametrize("result", EVERY_KIND, ids=lambda one: type(one).__name__)
def test_every_result_shows_itself_in_a_line(result: Any) -> None:
    shown = repr(result)
    assert shown.startswith(f"{type(result).__name__}(")
    assert "\n" not in shown
    assert len(shown) < 700


# One line.


def test_a_detection_in_a_line() -> None:
    assert repr(a_detection()) == (
        "Detection(state='SCORED', probability=0.75, logit=1.25, bias=-0.5, flagged=True, false_positive_rate=0.05, "
        "flagged_at=(0.05, 0.1), probe_name='probe', probe_revision='abc', prompt_tokens=2, response_tokens=3, "
        "token_ids=<5 items>, heads_contribution=1.5, statistic_contributions={'mean': 0.25}, "
        "strongest_heads=(HeadContribution(layer=1, head=2, contribution=0.5),))"
    )
    shown = repr(a_detection(**UNSCORED))
    assert "state='UNSCORED', reason='TOO_SHORT', message='2 tokens'" in shown
    assert "probability" not in shown


def test_zero_and_false_are_shown() -> None:
    shown = repr(a_detection(probability=0.0, flagged=False))
    assert "probability=0," in shown
    assert "flagged=False" in shown


def test_what_is_long_is_cut() -> None:
    thousands = a_detection(token_ids=tuple(range(10_000)), message="x" * 10_000)
    assert len(repr(thousands)) < 700
    assert "token_ids=<10000 items>" in repr(thousands)
    assert "image=<4 bytes>" in repr(a_heatmap(b"\x89PNG"))
    assert "image" not in repr(a_heatmap(b""))


# In a notebook.


class Seen(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.open = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open += tag != "img"
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_a_detection_is_a_table() -> None:
    seen = Seen(a_detection()._repr_html_())
    assert set(seen.tags) == {"table", "tr", "th", "td"}
    assert seen.open == 0
    for words in ("made up with probability 0.750", "flagged at 5.0% false alarms yes", "layer 1 head 2 (+0.500)"):
        assert words in seen.text


@pytest.mark.parametrize(("flagged", "words"), [(False, "no"), (None, "the probe has no threshold for it")])
def test_not_flagged_and_no_threshold_are_told_apart(flagged: bool | None, words: str) -> None:
    assert f"flagged at 5.0% false alarms {words} " in Seen(a_detection(flagged=flagged)._repr_html_()).text


def test_an_unscored_detection_is_no_good_one_in_a_notebook_either() -> None:
    seen = Seen(a_detection(**UNSCORED)._repr_html_())
    assert "could not score 2 tokens (TOO_SHORT)" in seen.text
    assert "flagged" not in seen.text


@pytest.mark.parametrize(
    ("image", "kind"), [(b"\x89PNG\r\n", "image/png"), (b"<svg><script>alert(1)</script></svg>", "image/svg+xml")]
)
def test_a_heatmap_is_its_picture(image: bytes, kind: str) -> None:
    shown = a_heatmap(image)._repr_html_()
    assert shown is not None
    seen = Seen(shown)
    assert seen.tags == ["figure", "img", "figcaption"], "what is in a picture is no part of the page"
    assert seen.sources == [f"data:{kind};base64,{base64.b64encode(image).decode()}"]
    assert "AUROC of f.v1, probe probe abc" in seen.text


def test_a_heatmap_without_a_picture_shows_its_line() -> None:
    assert a_heatmap(b"")._repr_html_() is None


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;"])
def test_text_of_others_stays_text(evil: str) -> None:
    pages = [
        a_detection(probe_name=evil)._repr_html_(),
        a_detection(**UNSCORED | {"message": evil})._repr_html_(),
        a_heatmap(b"\x89PNG", probe_name=evil, feature=evil)._repr_html_(),
    ]
    for page in pages:
        assert page is not None
        seen = Seen(page)
        assert set(seen.tags) <= {"table", "tr", "th", "td", "figure", "img", "figcaption"}
        assert seen.tags.count("img") <= 1
        assert evil in seen.text
        assert seen.open == 0


# Time as a value.


def test_a_deadline_counts_down() -> None:
    deadline = Deadline(60)
    first = deadline.left
    assert 59 < first <= 60
    time.sleep(0.001)
    assert deadline.left < first
    assert Deadline.of(deadline) is deadline, "shared, not begun anew"
    assert Deadline.of(5.0).seconds == 5.0
    assert [Deadline(seconds).left < 0.5 for seconds in (-1, 0, 0.5)] == [True] * 3
    assert repr(Deadline(2)) == "Deadline(seconds=2.0)"


@pytest.mark.parametrize("seconds", [math.inf, math.nan, "5", True, None])
def test_a_deadline_is_a_finite_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Deadline(seconds)
    assert caught.value.field == "timeout"


def test_what_the_classes_say_of_themselves() -> None:
    """Every field whose name does not say it all has a docstring, and a notebook's help shows the class's."""
    for kind in kinds(values.Result) | {Client, Deadline}:
        assert kind.__doc__
        assert not kind.__doc__.startswith(f"{kind.__name__}("), "written by hand"
    assert results.__doc__
