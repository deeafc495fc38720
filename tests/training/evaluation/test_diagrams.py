"""What a report draws and a server compares with: few points, of just the rows that there are."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from training_fakes import make_table

from lapwing_training.evaluation.diagrams import LENGTH_BARS, lengths
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.scores import Scores, judge_scores


@pytest.mark.parametrize("longest", [1, 7, 40, 3000])
def test_every_response_is_counted_once_by_its_length(longest: int) -> None:
    tokens = np.random.default_rng(longest).integers(0, longest + 1, 2000)
    found = json.loads(json.dumps(lengths(tokens)))
    edges, counts = found["edges"], found["counts"]
    assert len(counts) == len(edges) - 1 <= LENGTH_BARS
    assert edges == sorted(set(edges))
    assert sum(counts) == 2000
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == ((tokens >= low) & (tokens < high)).sum() > 0
    # About as many in each: no bar of a smooth distribution holds more than a few bars' worth or one length.
    assert max(counts) <= max(3 * 2000 / LENGTH_BARS, np.bincount(tokens).max())


def test_responses_of_one_length_are_one_bar() -> None:
    assert lengths(np.full(9, 4)) == {"edges": [4, 5], "counts": [9]}


def test_the_lengths_of_the_judged_rows_stand_in_the_metrics() -> None:
    table = make_table(rows=80)
    sample, scores = Sample.of(table, 5), Scores(np.arange(80.0), np.linspace(0.0, 1.0, 80), {}, None)
    found = judge_scores(sample, table, scores)
    assert found["lengths"] == lengths(table.response_tokens)
    assert sum(found["histogram"]["hallucinated"]) + sum(found["histogram"]["other"]) == 80
    # A store that does not say how long the responses are has none.
    assert "lengths" not in judge_scores(sample, replace(table, response_tokens=None), scores)
