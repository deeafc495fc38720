from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lapwing_training.cli.label import label
from lapwing_training.data.generations import (
    LabelledGeneration,
    parse_line,
    read_generations,
    to_line,
    write_generations,
)
from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.labels.judge import Verdict
from lapwing_training.labels.label import label_generations
from lapwing_training.labels.overlap import exact_match, f1, rouge_l

WORDS = ["the", "The", "cat", "Cat.", "sat", "an", "on", "U.S.", "mat!", "it's"]
TEXTS = st.lists(st.sampled_from(WORDS)).map(" ".join)
OTHER_SIGNS = st.lists(st.sampled_from([*WORDS, "a-b", "c/a", "née", "d’e"])).map(" ".join)


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("  The  Netherlands.", "netherlands"),
        ("São Tomé", "Sao Tome"),
        ("U.S.", "US"),
        ("Guinea-Bissau", "guinea bissau"),
        ("Côte d’Ivoire", "Cote d'Ivoire"),
        ("Straße", "STRASSE"),
        ("The", "The"),
        ("東京", "東京"),
    ],
)
def test_right_answers_are_recognised(response: str, reference: str) -> None:
    assert exact_match(response, ["something else", reference])


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("  The  Netherlands.", "netherlands", 1.0),
        ("U.S.", "US", 1.0),
        ("The", "The", 1.0),
        ("Asia/Seoul", "Asia/Shanghai", 0.0),  # parted at the slash it would be .5
        ("Guinea-Bissau", "Guinea Bissau", 0.0),
        ("São Tomé", "Sao Tome", 0.0),
        ("the city of Lyon", "Lyon", 0.5),
    ],
)
def test_f1_folds_what_squad_folds_and_no_more(response: str, reference: str, expected: float) -> None:
    assert f1(response, [reference]) == expected


@pytest.mark.parametrize(
    ("response", "reference"),
    [("", "Paris"), ("Paris, France", "Paris"), ("Anne", "nne"), ("The", "A"), ("Niger", "Nigeria"), ("theory", "ory")],
)
def test_wrong_answers_are_not(response: str, reference: str) -> None:
    assert not exact_match(response, [reference])
    assert f1(response, [reference]) < 1.0


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_case_and_outer_space_never_matter(text: str) -> None:
    assert exact_match(f" {text.upper()}\n", [text])


def squad_f1(mine: str, theirs: str) -> float:
    """As SQuAD's evaluation states it: lower case, no punctuation, no articles; precision and recall of the words."""

    def words(text: str) -> list[str]:
        plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", plain).split()

    common = sum((Counter(words(mine)) & Counter(words(theirs))).values())
    if not common:
        return 0.0
    precision, recall = common / len(words(mine)), common / len(words(theirs))
    return 2 * precision * recall / (precision + recall)


@given(OTHER_SIGNS, OTHER_SIGNS)
def test_f1_is_squads(mine: str, theirs: str) -> None:
    if squad_f1(mine, mine) and squad_f1(theirs, theirs):  # nothing but articles: there the two part
        assert f1(mine, [theirs]) == pytest.approx(squad_f1(mine, theirs))


def longest_common(mine: Sequence[str], theirs: Sequence[str]) -> int:
    row = [0] * (len(theirs) + 1)
    for word in mine:
        above = row
        row = [0]
        for place, other in enumerate(theirs):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
    return row[-1]


@given(TEXTS, TEXTS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(mine: str, theirs: str) -> None:
    words = [re.findall("[a-z0-9]+", text.lower()) for text in (mine, theirs)]
    if all(words):
        common = longest_common(*words)
        assert rouge_l(mine, [theirs]) == pytest.approx(2 * common / (len(words[0]) + len(words[1])))
    assert rouge_l(mine, [theirs]) == rouge_l(theirs, [mine])


def test_order_counts_for_rouge_l_alone_and_the_best_reference_for_both() -> None:
    assert rouge_l("b a", ["a b"]) == 0.5
    assert f1("cat dog", ["dog cat"]) == 1.0
    assert rouge_l("the cat sat", ["the cat is on the mat"]) == pytest.approx(4 / 9)
    for score in (f1, rouge_l):
        assert score("red fox", ["blue whale", "red deer", "red fox"]) == 1.0
        assert score("red fox", []) == 0.0
        assert score("", ["red"]) == 0.0


@pytest.mark.parametrize(("mine", "theirs", "score"), [("", "", 1.0), ("-", "+", 0.0), ("", "∞", 0.0), ("+", "+", 1.0)])
def test_texts_without_words_are_compared_by_their_signs(mine: str, theirs: str, score: float) -> None:
    assert rouge_l(mine, [theirs]) == rouge_l(theirs, [mine]) == score


def item(response: str, *references: str, name: str = "a") -> LabelledGeneration:
    return LabelledGeneration(id=name, prompt="p", response=response, references=references)


def test_labels_say_hallucinated_right_and_unknown() -> None:
    items = [replace(item("paris", "Paris"), label=1), item("rome", "Paris"), replace(item("rome"), label=0)]
    labelled = label_generations(items)
    assert [one.label for one in labelled] == [0, 1, None]
    # What anyone sees from the line needs no account of itself.
    reason = "there are no accepted answers to compare with"
    assert [one.labelling for one in labelled] == [{}, {}, {"rule": "exact", "reason": reason}]


@pytest.mark.parametrize(("rule", "score"), [("f1", 0.5), ("rouge-l", 0.5)])
def test_the_threshold_is_the_least_score_of_a_right_answer(rule: str, score: float) -> None:
    answer = item("Paris in spring", "Paris")  # one word of three, all of one: 2/4
    [by_default] = label_generations([answer], rule)
    assert (by_default.label, by_default.labelling) == (0, {"rule": rule, "score": score, "at_least": 0.5})
    assert label_generations([answer], rule, at_least=0.51)[0].label == 1


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_a_threshold_that_nothing_or_everything_reaches_is_refused(threshold: float) -> None:
    with pytest.raises(InvalidOption, match=r"expected a score in \(0, 1\]"):
        label_generations([], "f1", at_least=threshold)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"`fuzzy`; known rules: exact"):
        label_generations([], rule="fuzzy")
    with pytest.raises(InvalidOption, match="`judge` needs a model that judges"):
        label_generations([], rule="judge")


class Oracle:
    """Says the same of everything, and remembers what it was asked."""

    name, prompt_digest, compares = "oracle", "d", True

    def __init__(self, word: str) -> None:
        self.word = word
        self.asked: list[str] = []

    def __call__(self, items: Sequence[LabelledGeneration]) -> list[Verdict]:
        self.asked += [one.response for one in items]
        return [Verdict(self.word) for _ in items]


SIX = "one two three four five six"


@pytest.mark.parametrize(
    ("response", "asked", "label_of"),
    [
        (SIX, False, {"correct": 0, "incorrect": 0}),
        ("six five four three two one", False, {"correct": 0, "incorrect": 0}),  # F1 is 1, whatever the order
        ("one two three four five nine", True, {"correct": 0, "incorrect": None, "refused": None}),  # ROUGE-L is .83
        ("nine two three four five one", True, {"correct": 0, "incorrect": 1, "refused": None}),  # .67, and F1 .83
        ("", True, {"correct": 0, "incorrect": 1, "unreadable": None}),
    ],
)
def test_the_published_rule(response: str, asked: bool, label_of: dict[str, int | None]) -> None:
    for word, expected in label_of.items():
        judge = Oracle(word)
        [labelled] = label_generations([item(response, SIX)], "published", judge=judge)
        assert labelled.label == expected
        assert judge.asked == [response] * asked
        assert ("verdict" in labelled.labelling) == asked


def test_how_a_label_came_about_is_written_and_replaced_by_the_next_rule(tmp_path: Path) -> None:
    [labelled] = label_generations([item("rome", "Paris")], "judge", judge=Oracle("incorrect"))
    assert labelled.labelling == {"rule": "judge", "judge": "oracle", "prompt": "d", "verdict": "incorrect"}
    write_generations(tmp_path / "f", [labelled])
    assert read_generations(tmp_path / "f") == [labelled]
    [again] = label_generations([labelled])
    assert "labelling" not in to_line(again)
    with pytest.raises(InvalidData, match=r"`labelling`.*expected an object"):
        parse_line('{"id": "a", "prompt": "p", "response": "r", "labelling": "mine"}', LabelledGeneration)


def test_the_verb_takes_a_rule_and_its_threshold(tmp_path: Path) -> None:
    write_generations(tmp_path / "in", [item("Paris in spring", "Paris"), item("Rome", "Paris", name="b")])
    app = typer.Typer()
    app.command()(label)
    options = ["--rule", "f1", "--at-least", "0.4", "--json"]
    result = CliRunner().invoke(app, [str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options])
    told = json.loads(result.stdout)
    counted = {"items": 2, "dropped": 0, "hallucinated": 1, "right": 1, "unknown": 0}
    assert told == {"generations": str(tmp_path / "out"), **counted}
