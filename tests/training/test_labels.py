from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapwing_training.errors import InvalidOption
from lapwing_training.generations import LabelledGeneration
from lapwing_training.label import exact_match, label_generations


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
    ("response", "reference"),
    [("", "Paris"), ("Paris, France", "Paris"), ("Anne", "nne"), ("The", "A"), ("Niger", "Nigeria"), ("theory", "ory")],
)
def test_wrong_answers_are_not(response: str, reference: str) -> None:
    assert not exact_match(response, [reference])


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_case_and_outer_space_never_matter(text: str) -> None:
    assert exact_match(f" {text.upper()}\n", [text])


def test_labels_say_hallucinated_right_and_unknown() -> None:
    items = [
        LabelledGeneration(id="a", prompt="p", response="paris", references=("Paris",), label=1),
        LabelledGeneration(id="b", prompt="p", response="rome", references=("Paris",)),
        LabelledGeneration(id="c", prompt="p", response="rome", label=0),
    ]
    assert [item.label for item in label_generations(items)] == [0, 1, None]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"`fuzzy`; known rules: exact"):
        label_generations([], rule="fuzzy")
