"""Labels by rule: 1 means hallucinated, which for a question with known answers means wrong. Knows text and verdicts.

Whoever judges is handed in: nothing here knows an endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import InvalidOption
from lapwing_training.labels.judge import Verdict
from lapwing_training.labels.overlap import exact_match, f1, rouge_l
from lapwing_training.progress import waiting

SCORES: Mapping[str, Callable[[str, Iterable[str]], float]] = {"f1": f1, "rouge-l": rouge_l}
JUDGED = ("judge", "published")
RULES = ("exact", *SCORES, *JUDGED)

AT_LEAST = 0.5
"""Least F1 or ROUGE-L of a right answer, unless another is asked for."""

SURELY_RIGHT = 0.99
"""`published`: F1 or ROUGE-L from which on an answer is right without a judge."""

SURELY_NOT_WRONG = 0.75
"""`published`: ROUGE-L from which on a judge's `incorrect` is not believed."""

NO_REFERENCES = "there are no accepted answers to compare with"


class Judging(Protocol):
    """Who says whether answers are right."""

    @property
    def name(self) -> str:
        """Of the model that judges."""

    @property
    def prompt_digest(self) -> str:
        """Of the question that it is asked."""

    @property
    def compares(self) -> bool:
        """Whether it is shown the accepted answers, and so needs them."""

    def __call__(self, items: Sequence[LabelledGeneration]) -> list[Verdict]:
        """A verdict for each item, in their order."""


def label_generations(
    generations: Iterable[LabelledGeneration],
    rule: str = "exact",
    at_least: float | None = None,
    judge: Judging | None = None,
) -> list[LabelledGeneration]:
    """Every item with a new label: 0 right, 1 wrong, None where there is nothing to compare with or no verdict.

    `labelling` says how each label came about; an exact match, which anyone sees from the line itself, says nothing.

    Args:
        at_least: least score of a right answer under `f1` and `rouge-l`; 0.5 without one.
        judge: needed by `judge` and `published`. `published` asks it only about answers whose F1 and ROUGE-L are both
            below 0.99, and takes no `incorrect` from it where ROUGE-L is at least 0.75.

    Raises:
        InvalidOption: no such rule, a threshold that the rule has no use for or that is not in (0, 1], no judge.
    """
    _require(rule, at_least)
    items = list(generations)
    if rule not in JUDGED:
        threshold = AT_LEAST if at_least is None else at_least
        return [_by_overlap(item, rule, threshold) for item in waiting(items, "label")]
    if judge is None:
        raise InvalidOption(f"rule `{rule}` needs a model that judges; name one with --judge")
    decided = [_without_judge(item, rule, judge) for item in waiting(items, "compare")]
    open_ = [item for item, known in zip(items, decided, strict=True) if known is None]
    verdicts = iter(judge(open_))
    return [
        known if known is not None else _judged(item, next(verdicts), rule, judge)
        for item, known in zip(items, decided, strict=True)
    ]


def _require(rule: str, at_least: float | None) -> None:
    if rule not in RULES:
        raise InvalidOption(f"rule is `{rule}`; known rules: {', '.join(RULES)}")
    if at_least is None:
        return
    if rule not in SCORES:
        raise InvalidOption(f"at-least is {at_least}, but rule `{rule}` takes none; only {' and '.join(SCORES)} do")
    if not 0.0 < at_least <= 1.0:
        raise InvalidOption(f"at-least is {at_least}; expected a score in (0, 1]")


def _by_overlap(item: LabelledGeneration, rule: str, at_least: float) -> LabelledGeneration:
    if not item.references:
        return _labelled(item, None, rule, reason=NO_REFERENCES)
    if rule == "exact":
        return replace(item, label=int(not exact_match(item.response, item.references)), labelling={})
    score = SCORES[rule](item.response, item.references)
    return _labelled(item, int(score < at_least), rule, score=round(score, 4), at_least=at_least)


def _without_judge(item: LabelledGeneration, rule: str, judge: Judging) -> LabelledGeneration | None:
    """The item with its label; None where the judge has the word."""
    if not item.references and (judge.compares or rule == "published"):
        return _labelled(item, None, rule, reason=NO_REFERENCES)
    if rule == "published":
        scores = _overlaps(item)
        if max(scores.values()) >= SURELY_RIGHT:
            return _labelled(item, 0, rule, **_rounded(scores))
    return None


def _judged(item: LabelledGeneration, verdict: Verdict, rule: str, judge: Judging) -> LabelledGeneration:
    label = {"correct": 0, "incorrect": 1}.get(verdict.word)
    scores = _overlaps(item) if rule == "published" else {}
    if verdict.word == "incorrect" and scores.get("rouge_l", 0.0) >= SURELY_NOT_WRONG:
        reason = f"the judge says incorrect, but ROUGE-L is {scores['rouge_l']:.2f} (at least {SURELY_NOT_WRONG})"
        label, verdict = None, Verdict("invalid", reason)
    by = {"judge": judge.name, "prompt": judge.prompt_digest, "verdict": verdict.word, "reason": verdict.reason}
    return _labelled(item, label, rule, **by, **_rounded(scores))


def _overlaps(item: LabelledGeneration) -> dict[str, float]:
    return {"f1": f1(item.response, item.references), "rouge_l": rouge_l(item.response, item.references)}


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(score, 4) for name, score in scores.items()}


def _labelled(item: LabelledGeneration, label: int | None, rule: str, **how: Any) -> LabelledGeneration:
    return replace(
        item, label=label, labelling={"rule": rule, **{key: told for key, told in how.items() if told != ""}}
    )
