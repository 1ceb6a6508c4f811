"""Intervals, tests and calibration against tables, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest

from minirlhf.assess import distinct
from minirlhf.stats import (calibration, clustered_rate, difference_of_means, difference_of_rates, flip_test,
                            label_test, length_controlled, rate, ratio, sign_test, t_limit, transformed, wilson,
                            wins_of)


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


@pytest.mark.slow
def test_sign_test_of_large_counts():
    assert sign_test(600, 400) == pytest.approx(2.7e-10, rel=0.05) and sign_test(5000, 5000) == 1


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


def at_equal_length(seed):
    """A model that wins 95 % at equal length, judged on 60 prompts on which it is mostly shorter."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(-4, 6, size=60)
    return length_controlled(rng.random(60) < 1 / (1 + np.exp(-3 - np.tanh(longer / 6))), longer), 1 / (1 + math.exp(-3))


def error_of_a_calibrated_judge(seed):
    return calibration(*simulated_judge(600, seed))[1], 0.0


def ratio_of_sums(seed):
    """Nats per token: both vary from response to response, and long ones have more of each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 30, size=200)
    return ratio(rng.gamma(lengths, 0.7), lengths, resamples=400), 0.7


def different_pairs(seed):
    """Responses of 8 tokens out of 30: the truth is the mean over many sets of as many responses."""
    return distinct(np.random.default_rng(seed).integers(30, size=(100, 8)).tolist(), 2), DISTINCT


# 700 pairs of 30 x 30 kinds: each kind is missed with probability (1 - 1/900)^700, were the pairs independent
DISTINCT = 900 * (1 - (1 - 1 / 900) ** 700) / 700


def coverage(simulate):
    found = [simulate(seed) for seed in range(1000)]
    return np.mean([low <= truth <= high for (_, low, high, _), truth in found])


@pytest.mark.parametrize("simulate", [share, small_share, gap, gap_of_small_groups, mean_of_skewed,
                                      accuracy_of_pairs_that_share_a_prompt, accuracy_near_one,
                                      at_equal_length, ratio_of_sums,
                                      pytest.param(error_of_a_calibrated_judge, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth_in_95_of_100_repeats(simulate):
    assert 0.93 <= coverage(simulate) <= 0.97


def test_the_jackknife_of_different_pairs_is_wide_enough():
    assert coverage(different_pairs) >= 0.95        # Efron and Stein 1981: its variance is never too small in the mean


# The table that every statistics book has.
@pytest.mark.parametrize("df, limit", [(3, 3.182), (4, 2.776), (6, 2.447), (10, 2.228), (30, 2.042), (10_000, 1.960)])
def test_the_limits_of_student_are_those_of_the_table(df, limit):
    assert t_limit(df) == pytest.approx(limit, abs=0.002)


def test_pairs_counted_as_independent_would_be_too_sure():
    def naive(seed):
        right = np.random.default_rng(seed).binomial(6, np.random.default_rng(seed + 10**6).beta(2, 1, size=200)).sum()
        return wilson(right, 1200)
    assert np.mean([low <= 2 / 3 <= high for low, high in map(naive, range(500))]) < 0.85


def test_a_ratio_is_the_ratio_and_carries_its_n():
    found = ratio([1, 2, 3], [2, 2, 8])
    assert found.value == 0.5 and found.n == 3 and found.low <= 0.5 <= found.high
    assert transformed(math.exp, found)[:3] == pytest.approx([math.exp(x) for x in found[:3]])
    assert ratio([4.0] * 10)[:3] == (4, 4, 4)


# ---- tests -----------------------------------------------------------------------------------------------------------

def test_flip_test_is_the_count_of_all_signs():
    differences = np.array([0.9, -0.2, 0.4, 0.3, -0.1, 0.7, 0.25, 0.5])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    assert flip_test(differences, flips=40_000) == pytest.approx(exact, abs=0.005)
    assert flip_test(np.concatenate([differences, np.zeros(50)])) == pytest.approx(flip_test(differences), abs=0.01)
    assert flip_test([0, 0, 0]) == 1


def test_label_test_is_the_count_of_all_groups():
    first, second = np.array([3.0, 2.5, 2.2, 1.0]), np.array([1.5, 0.3, 0.1, -0.2])
    values, found = np.concatenate([first, second]), abs(first.mean() - second.mean())
    gaps = [abs(values[list(rows)].mean() - np.delete(values, rows).mean()) for rows in itertools.combinations(range(8), 4)]
    assert label_test(first, second) == pytest.approx(np.mean(np.array(gaps) >= found - 1e-12), abs=0.01)
    assert label_test(np.zeros(4), np.zeros(4)) == 1


def test_both_tests_reject_a_true_null_in_5_of_100():
    rng = np.random.default_rng(0)
    flips = [flip_test(rng.normal(size=30), flips=500) for _ in range(400)]
    labels = [label_test(rng.normal(size=6), rng.normal(size=6), shuffles=500) for _ in range(400)]
    assert 0.02 < np.mean(np.array(flips) < 0.05) < 0.08 and 0.02 < np.mean(np.array(labels) < 0.05) < 0.08


# ---- win rates -------------------------------------------------------------------------------------------------------

def test_wins_count_ties_half():
    assert wins_of([1, 0, 2, 5], [0, 1, 2, 4]).tolist() == [1, 0, 0.5, 1]


def test_a_copy_wins_half_also_at_equal_length():
    scores = np.random.default_rng(0).normal(size=300)
    assert rate(wins_of(scores, scores)).value == 0.5
    assert length_controlled(wins_of(scores, scores), np.zeros(300)).value == pytest.approx(0.5)


def test_the_length_controlled_rate_recovers_what_length_does_not_explain():
    rng = np.random.default_rng(1)
    longer = rng.normal(8, 6, size=1500)                        # ours are longer, and longer ones win
    for quality in (0.0, 0.8):
        chance = 1 / (1 + np.exp(-quality - 2 * np.tanh(longer / longer.std())))
        wins = rng.random(1500) < chance
        found = length_controlled(wins, longer)
        assert wins.mean() > found.value + 0.1                  # the plain rate is flattered
        assert found.low <= 1 / (1 + math.exp(-quality)) <= found.high and found.high - found.low < 0.2


def test_winning_everything_is_no_infinity():
    found = length_controlled(np.ones(50), np.arange(50.0))
    assert 0.9 < found.value < 1 and found.high < 1


def test_a_win_rate_at_equal_length_is_unknown_where_no_lengths_are_equal():
    found = length_controlled(np.arange(100) < 90, 10 + np.random.default_rng(0).normal(size=100))
    assert found.low < 0.2 and found.high > 0.9


# ---- calibration -----------------------------------------------------------------------------------------------------

def simulated_judge(n, seed, boast=1.0):
    """A judge of pairs of known strengths, who believes in differences `boast` times the true ones."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(0, 2, size=n)
    first_is_better = rng.random(n) < 1 / (1 + np.exp(-difference))
    return 1 / (1 + np.exp(-boast * np.abs(difference))), (difference > 0) == first_is_better, np.arange(n) // 6


def test_a_perfectly_calibrated_judge_has_no_calibration_error():
    rows, ece = calibration(*simulated_judge(18_000, 0))
    assert ece.value < 0.015 and ece.n == 3000
    assert sum(low <= said <= high for said, (_, low, high, _), _ in rows) >= 8 and sum(n for *_, n in rows) == 18_000


def test_a_boastful_judge_is_found_out_and_the_error_is_the_definition():
    confidence, right, group = simulated_judge(6_000, 1, boast=3)
    _, ece = calibration(confidence, right, group)
    by_hand = 0.0
    for b in range(10):
        inside = [k for k in range(6000) if 0.5 + b / 20 <= confidence[k] < 0.5 + (b + 1) / 20 or (b == 9 and confidence[k] == 1)]
        if inside:
            by_hand += len(inside) / 6000 * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
    assert ece.value == pytest.approx(by_hand) and ece.low > 0.08
