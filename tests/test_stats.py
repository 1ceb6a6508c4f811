"""Intervals and the sign test against tables, enumeration and simulation."""

import itertools

import numpy as np
import pytest

from minirlhf.assess import distinct_2
from minirlhf.stats import (clustered_rate, difference_of_means, difference_of_rates, rate, ratio, sign_test, t_limit,
                            t_probability, wilson, wins_of)


# Newcombe 1998, Statistics in Medicine 17, table I, method 3.
@pytest.mark.parametrize("wins, n, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                                (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_is_that_of_newcombe(wins, n, low, high):
    assert wilson(wins, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0, 1) and wilson(5, 5)[1] == pytest.approx(1) and wilson(0, 5)[0] == pytest.approx(0)
    assert wilson(7, 10) == pytest.approx(tuple(1 - x for x in reversed(wilson(3, 10))))


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (3, 3), (9, 1), (2, 7), (0, 10)])
def test_sign_test_is_the_count_of_all_coin_sequences(wins, losses):
    n = wins + losses
    as_uneven = sum(abs(2 * sum(flips) - n) >= abs(wins - losses) for flips in itertools.product((0, 1), repeat=n))
    assert sign_test(wins, losses) == pytest.approx(as_uneven / 2 ** n)


def test_sign_test_of_large_counts():
    assert sign_test(600, 400) == pytest.approx(2.7e-10, rel=0.05) and sign_test(500, 500) == 1


# ---- intervals: each covers the truth in 93-97 % of 1,000 simulated repeats ------------------------------------------

def share(seed):
    return rate(np.random.default_rng(seed).random(150) < 0.3), 0.3


def small_share(seed):
    return rate(np.random.default_rng(seed).random(544) < 0.02), 0.02


def gap(seed):
    rng = np.random.default_rng(seed)
    return difference_of_rates(rng.random(150) < 0.3, rng.random(120) < 0.1), 0.2


def gap_of_small_groups(seed):
    """Four persons against four, as in the bias probe of the embedded world."""
    rng = np.random.default_rng(seed)
    return difference_of_means(rng.normal(1.5, 0.5, size=4), rng.normal(0.5, 0.8, size=4)), 1.0


def mean_of_skewed(seed):
    return ratio(np.random.default_rng(seed).exponential(size=200), resamples=400), 1.0


def accuracy_of_pairs_that_share_a_prompt(seed):
    """A hard prompt is hard for all of its 6 pairs: counting pairs as independent would be far too sure."""
    rng = np.random.default_rng(seed)
    right = rng.binomial(6, rng.beta(2, 1, size=200))
    return clustered_rate(right, np.full(200, 6)), 2 / 3


def accuracy_near_one(seed):
    """30 prompts whose pairs are nearly all judged right, where resampling prompts is too sure."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(1, 7, size=30)
    return clustered_rate(rng.binomial(pairs, rng.beta(8, 0.5, size=30)), pairs), 8 / 8.5


def ratio_of_sums(seed):
    """Nats per token: both vary from response to response, and long ones have more of each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 30, size=200)
    return ratio(rng.gamma(lengths, 0.7), lengths, resamples=400), 0.7


def different_pairs(seed):
    """Responses of 8 tokens out of 30: the truth is the mean over many sets of as many responses."""
    return distinct_2(np.random.default_rng(seed).integers(30, size=(100, 8)).tolist()), DISTINCT


# 700 pairs of 30 x 30 kinds: each kind is missed with probability (1 - 1/900)^700, were the pairs independent
DISTINCT = 900 * (1 - (1 - 1 / 900) ** 700) / 700


def coverage(simulate):
    found = [simulate(seed) for seed in range(1000)]
    return np.mean([low <= truth <= high for (_, low, high, _), truth in found])


@pytest.mark.parametrize("simulate", [share, small_share, gap, gap_of_small_groups, mean_of_skewed,
                                      accuracy_of_pairs_that_share_a_prompt, accuracy_near_one, ratio_of_sums])
def test_intervals_cover_the_truth_in_95_of_100_repeats(simulate):
    assert 0.93 <= coverage(simulate) <= 0.97


def test_the_jackknife_of_different_pairs_is_wide_enough():
    assert coverage(different_pairs) >= 0.95        # Efron and Stein 1981: its variance is never too small in the mean


# The table that every statistics book has.
@pytest.mark.parametrize("df, limit", [(3, 3.182), (4, 2.776), (6, 2.447), (10, 2.228), (30, 2.042), (10_000, 1.960),
                                       (1e9, 1.960)])
def test_the_limits_of_student_are_those_of_the_table(df, limit):
    assert t_limit(df) == pytest.approx(limit, abs=0.002)
    assert t_probability(0, df) == 1 > t_probability(1e-9, df) and t_probability(-limit, df) == pytest.approx(0.05, abs=1e-4)


def test_a_ratio_is_the_ratio_and_carries_its_n():
    found = ratio([1, 2, 3], [2, 2, 8])
    assert found.value == 0.5 and found.n == 3 and found.low <= 0.5 <= found.high
    assert ratio([4.0] * 10)[:3] == (4, 4, 4)


def test_wins_count_ties_half():
    assert wins_of([1, 0, 2, 5], [0, 1, 2, 4]).tolist() == [1, 0, 0.5, 1]
