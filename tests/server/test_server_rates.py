"""How often somebody may call."""

from __future__ import annotations

import math
import random

import pytest
from door_fakes import Clock

from lapwing_server.security.principals import Principal
from lapwing_server.security.rates import MOST_BUCKETS, Rates
from lapwing_server.security.scopes import USERS


def test_the_wait_is_exact() -> None:
    """After the wait the call comes through; a little earlier it would not have."""
    dice = random.Random(1)
    for _ in range(2000):
        clock = Clock(dice.uniform(0, 1e6))
        rate, burst = 10 ** dice.uniform(-2, 3), dice.randint(1, 20)
        rates, principal = Rates(rate, burst, clock), Principal("a", USERS)
        waits = [rates.take(principal) for _ in range(burst + 1)]
        assert waits[:-1] == [0.0] * burst
        assert math.isclose(waits[-1], math.ceil(1000 / rate - 1e-6) / 1000)
        begun = clock.now
        if waits[-1] > 0.0011:
            clock.now = begun + waits[-1] - 0.0011
            assert rates.take(principal) > 0
        clock.now = begun + waits[-1]
        assert rates.take(principal) == 0.0


def test_in_the_long_run_nobody_gets_more_than_the_rate() -> None:
    dice, clock = random.Random(2), Clock()
    rates, principal = Rates(5.0, 10, clock), Principal("a", USERS)
    admitted = 0
    for _ in range(20_000):
        clock.now += dice.expovariate(20.0)
        admitted += rates.take(principal) == 0.0
    assert 0.99 * 5 * clock.now < admitted <= 10 + 5 * clock.now


def test_each_has_a_bucket_and_some_have_their_own_rate() -> None:
    clock = Clock()
    rates = Rates(1.0, None, clock)
    few, many = Principal("few", USERS), Principal("many", USERS, requests_per_second=3.5)
    assert [rates.take(few) == 0.0 for _ in range(3)] == [True, False, False]
    assert [rates.take(many) == 0.0 for _ in range(4)] == [True, True, True, False], "as many as in one second"
    assert rates.take(Principal("other", USERS)) == 0.0
    assert Rates().take(few) == 0.0, "unlimited"


@pytest.mark.parametrize("seed", range(20))
def test_tokens_of_one_name_share_one_bucket_whatever_their_rates(seed: int) -> None:
    """Whoever shows several tokens by turns gets no more than the largest of their grants gives."""
    dice, clock = random.Random(seed), Clock()
    kinds = [(10 ** dice.uniform(-1, 1), dice.randint(1, 9)) for _ in range(3)]
    tokens = [Principal("ci", USERS, requests_per_second=rate, burst=burst) for rate, burst in kinds]
    rates, admitted = Rates(clock=clock), 0
    for _ in range(2000):
        clock.now += dice.expovariate(50.0)
        admitted += rates.take(dice.choice(tokens)) == 0.0
    assert admitted <= max(burst for _, burst in kinds) + max(rate for rate, _ in kinds) * clock.now
    assert admitted >= min(rate for rate, _ in kinds) * clock.now - 2, "control: nor does it starve"


def test_another_rate_is_no_full_bucket() -> None:
    rates = Rates(5.0, None, Clock())
    plain, own = Principal("ci", USERS), Principal("ci", USERS, requests_per_second=6.0)
    assert [rates.take(plain) == 0.0 for _ in range(6)] == [True] * 5 + [False]
    assert [rates.take(one) > 0 for one in (own, plain) * 5] == [True] * 10
    assert rates.take(Principal("another", USERS)) == 0.0, "control"


def test_a_smaller_bucket_spills_what_has_no_room() -> None:
    rates = Rates(clock=Clock())
    many = Principal("ci", USERS, requests_per_second=1.0, burst=100)
    few = Principal("ci", USERS, requests_per_second=1.0, burst=2)
    assert rates.take(many) == 0.0
    assert [rates.take(few) == 0.0 for _ in range(3)] == [True, True, False]
    assert rates.take(many) > 0


def test_there_are_never_more_buckets_than_fit_and_the_longest_unused_goes_first() -> None:
    clock = Clock()
    rates, busy = Rates(0.001, 1, clock), Principal("busy", USERS)
    rates.take(busy)
    for i in range(2 * MOST_BUCKETS):
        rates.take(Principal(str(i), USERS))
        assert len(rates) <= MOST_BUCKETS
        if i % 5000 == 0:
            assert rates.take(busy) > 0, "it is used, and so not forgotten"
    assert rates.take(Principal(str(2 * MOST_BUCKETS - 1), USERS)) > 0, "control"
    assert rates.take(Principal("0", USERS)) == 0.0, "the longest unused one was"
