"""Statistics of log-probabilities are means over tokens, so every token has an exact share in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import logit

from lapwing_detector.token_statistics import (
    DOUBT_FLOOR,
    TOKEN_STATISTICS,
    log_odds,
    token_contributions,
    token_statistics,
)

MEAN, QUARTER, MINIMUM = TOKEN_STATISTICS


def responses() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [np.maximum(-(random.exponential(size=tokens) ** 2), -27.0) for tokens in (1, 2, 3, 4, 5, 8, 9, 200)]


def test_they_are_what_their_names_say() -> None:
    for values in responses():
        mean, quarter, minimum = token_statistics(values)
        assert mean == pytest.approx(values.mean())
        probabilities = np.minimum(np.exp(values), 1 - DOUBT_FLOOR)
        sure = np.exp(values) > 1 - DOUBT_FLOOR
        odds = np.sort(np.where(sure, values - math.log(DOUBT_FLOOR), logit(probabilities)))
        assert minimum == pytest.approx(odds[0])
        assert quarter == pytest.approx(odds[: math.ceil(len(values) / 4)].mean())
    # Of four tokens and fewer the lowest quarter is the lowest token; of five it is not.
    assert [token_statistics(one)[1] == token_statistics(one)[2] for one in responses()[:5]] == [True] * 4 + [False]


def test_the_log_odds_never_fall_with_the_probability_and_meet_the_logit_where_there_is_doubt() -> None:
    rising = np.linspace(math.log(1e-12), 0.0, 20_001)
    assert (np.diff(log_odds(rising)) >= 0).all()
    doubted = rising[rising < math.log(1 - DOUBT_FLOOR)]
    np.testing.assert_allclose(log_odds(doubted), logit(np.exp(doubted)), atol=1e-9)


def test_shares_of_tokens_and_of_statistics_have_the_score_as_their_sum() -> None:
    weights = {MEAN: -0.7, QUARTER: 0.4, MINIMUM: -1.5}
    for values in responses():
        tokens, statistics = token_contributions(values, weights)
        expected = np.dot(list(weights.values()), token_statistics(values))
        assert tokens.sum() == pytest.approx(expected)
        assert sum(statistics.values()) == pytest.approx(expected)
        assert list(statistics) == list(weights)


@pytest.mark.parametrize("statistic", TOKEN_STATISTICS)
def test_only_tokens_that_are_averaged_have_a_share_and_no_other_token_matters(statistic: str) -> None:
    values = responses()[-1]
    shares, _ = token_contributions(values, {statistic: 1.0})
    place = list(TOKEN_STATISTICS).index(statistic)
    for token in (int(values.argmin()), int(values.argmax())):
        surer = values.copy()
        surer[token] = 0.0
        moved = token_statistics(surer)[place] != token_statistics(values)[place]
        assert moved == (shares[token] != 0)
    assert (shares != 0).sum() == {MEAN: 200, QUARTER: 50, MINIMUM: 1}[statistic]


def test_sure_words_at_the_end_move_the_mean_and_not_the_weakest_word() -> None:
    values = responses()[4]
    longer = np.concatenate([values, np.full(15, -1e-5)])
    before, after = token_statistics(values), token_statistics(longer)
    assert after[0] > before[0] + 0.1
    assert after[2] == before[2]


def test_one_absurd_token_and_one_that_rounding_made_surer_than_sure_are_bounded() -> None:
    assert token_statistics([-math.inf, -1.0])[0] == pytest.approx((math.log(1e-12) - 1.0) / 2)
    assert token_statistics([1e-7]).tolist() == token_statistics([0.0]).tolist()
    assert np.isfinite(token_statistics([0.0, -math.inf])).all()


def test_of_no_tokens_all_are_0_and_a_nan_stays_one() -> None:
    assert token_statistics([]).tolist() == [0.0] * len(TOKEN_STATISTICS)
    tokens, statistics = token_contributions([], {MEAN: 2.0})
    assert (len(tokens), statistics) == (0, {MEAN: 0.0})
    assert np.isnan(token_statistics([math.nan])).all()
    for place in range(3):
        values = [-1.0, -2.0, -3.0]
        values[place] = math.nan
        assert np.isnan(token_statistics(values)).all()


def test_a_rounding_error_of_float32_logits_moves_no_statistic_by_as_much_as_a_score_may_move() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0.0, 4.0, (300, 64)).astype(np.float32)
    logits[:, 0] += np.float32(12.0)  # mostly sure

    def chosen(values: np.ndarray) -> np.ndarray:
        wide = values - values.max(axis=1, keepdims=True)
        return wide[:, 0] - np.log(np.exp(wide).sum(axis=1))

    noisy = logits * (1 + random.normal(0.0, 2**-23, logits.shape)).astype(np.float32)
    before, after = chosen(logits.astype(np.float64)), chosen(noisy)
    assert np.abs(log_odds(np.minimum(before, 0)) - log_odds(np.minimum(after.astype(np.float64), 0))).max() < 3e-4
