"""The questions whose answers are labelled, and the few that the demo asks; which they are depends on hashes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lapwing_training.atlas.corpus import asked_phrasing, prompt, question
from lapwing_training.atlas.facts import CITY_RELATIONS, Fact, for_labels, share
from lapwing_training.data.generations import Question

TEST_SHARE = 0.25
"""Share of the labelled subjects whose questions no probe is fitted on."""

SAMPLED_SHARE = 0.2
"""Share of the labelled subjects whose questions are also answered several times at temperature 1.0."""

DEMO_QUESTIONS = 12


def split_of(fact: Fact) -> str:
    """`test` or `train`, the same in every rebuild and for all questions of a group."""
    return "test" if share(fact.group, "split") < TEST_SHARE else "train"


def labelled_questions(facts: Sequence[Fact]) -> list[Question]:
    """One question per fact of the labelled half; groups are subjects, strata are relations."""
    return [
        Question(
            id=f"{fact.subject_id}/{fact.relation}".replace(" ", "-"),
            prompt=prompt(question(fact, asked_phrasing(fact))),
            group=fact.group,
            split=split_of(fact),
            references=fact.accepted,
            meta={
                "relation": fact.relation,
                "subject": fact.subject,
                "truth": fact.answer,
                "seen": fact.seen,
                "exposures": fact.exposures,
                "rank": fact.rank,
            },
        )
        for fact in facts
        if for_labels(fact.subject_id)
    ]


def sampled_questions(facts: Sequence[Fact]) -> list[Question]:
    """Those of the labelled questions that are answered several times: all of some subjects."""
    return [
        question for question in labelled_questions(facts) if share(question.group_or_prompt, "sampled") < SAMPLED_SHARE
    ]


def demo_set(facts: Sequence[Fact]) -> dict[str, Any]:
    """What `lapwing demo` asks and scores: held-out subjects, half of them well known and half never seen.

    The most populous subjects of each kind, their relations in turn, in a phrasing that was not labelled; of those
    never seen, only such as are named in no answer either. Chosen before any answer exists, so nothing is picked for
    its outcome.
    """
    held_out = [
        fact
        for fact in facts
        if fact.relation in CITY_RELATIONS and for_labels(fact.subject_id) and split_of(fact) == "test"
    ]
    named = " ".join({fact.answer.replace("_", " ") for fact in facts if fact.seen})
    known = _in_turn([fact for fact in held_out if fact.seen], DEMO_QUESTIONS // 2)
    unknown = _in_turn([fact for fact in held_out if not fact.seen and fact.subject not in named], DEMO_QUESTIONS // 2)
    wrong = {"country": "Peru", "continent": "Oceania", "timezone": "Pacific/Auckland"}
    texts = [(fact, answer) for fact in known[:2] for answer in (fact.answer, wrong[fact.relation])]
    return {
        "questions": [
            {
                "prompt": prompt(question(fact, asked_phrasing(fact) + 1)),
                "question": question(fact, asked_phrasing(fact) + 1),
                "truth": fact.answer,
                "accepted": list(fact.accepted),
                "seen": fact.seen,
            }
            for fact in (*known, *unknown)
        ],
        "texts": [
            {
                "prompt": prompt(question(fact, asked_phrasing(fact) + 2)),
                "question": question(fact, asked_phrasing(fact) + 2),
                "response": answer,
                "truth": fact.answer,
                "accepted": list(fact.accepted),
            }
            for fact, answer in texts
        ],
    }


def _in_turn(facts: Sequence[Fact], count: int) -> list[Fact]:
    """The first subjects, each with another relation than the one before."""
    subjects = dict.fromkeys(fact.subject_id for fact in facts)
    by_key = {(fact.subject_id, fact.relation): fact for fact in facts}
    wanted = list(subjects)[:count]
    return [by_key[subject, CITY_RELATIONS[turn % len(CITY_RELATIONS)]] for turn, subject in enumerate(wanted)]
