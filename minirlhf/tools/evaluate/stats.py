"""How sure a number is: 95 % intervals, paired tests, calibration. Pure functions of arrays; nothing here knows a model.

Every figure of the assessment is an Estimate. Which interval it has: a rate of independent prompts Wilson's, of pairs that
share a prompt Wilson's for their effective number; a mean, and a ratio of sums over prompts, the percentile bootstrap over
prompts (2,000 resamples, so tokens of one prompt stay together); a difference of two rates Newcombe's, of two small groups'
means Welch's; a win rate at equal length Wald's; a count of different n-grams the jackknife.
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964                        # a normal number lies within Z deviations in 95 % of the cases


class Estimate(NamedTuple):
    """A figure with its 95 % interval and the number of independent units (prompts, mostly) that it is based on."""
    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        digits = 3 if abs(self.value) >= 0.1 or self.value == 0 else 4
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


# ---- intervals -------------------------------------------------------------------------------------------------------

def wilson(wins, n, z=Z):
    """Wilson's 95 % score interval of a rate of `wins` in n, (low, high). Ties may count half. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    rate, shrink = wins / n, 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(yes):
    """The share of True in n independent cases; 0.5 is half a case."""
    wins, n = float(sum(yes)), len(yes)
    return Estimate(wins / n, *wilson(wins, n), n)


def clustered_rate(hits, counts):
    """sum(hits) / sum(counts) of pairs that share a prompt: Wilson's interval for as many independent pairs as would vary
    as much (Kish's effective number). Prompts without a pair do not count. The bootstrap is too narrow near 0 and 1."""
    hits, counts = np.asarray(hits, dtype=float), np.asarray(counts, dtype=float)
    hits, counts = hits[counts > 0], counts[counts > 0]
    N, total = len(counts), counts.sum()
    share = float(hits.sum() / total)
    variance = N / max(N - 1, 1) * ((hits - share * counts) ** 2).sum() / total ** 2
    n = min(share * (1 - share) / variance, total) if variance > 0 else N
    return Estimate(share, *wilson(share * n, n), N)


def difference_of_rates(first, second):
    """rate(first) - rate(second) of two independent groups (Newcombe 1998, method 10: from Wilson's two intervals)."""
    a, b = rate(first), rate(second)
    gap = a.value - b.value
    return Estimate(gap, gap - math.hypot(a.value - a.low, b.high - b.value),
                    gap + math.hypot(a.high - a.value, b.value - b.low), a.n + b.n)


def t_limit(df, z=Z):
    """The number that Student's t of df degrees of freedom stays below in size in 95 % of the cases: Abramowitz and Stegun
    26.7.5, within 0.03 from df = 3 on."""
    return (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))


def difference_of_means(first, second):
    """mean(first) - mean(second) of two small independent groups (Welch 1947)."""
    gap, n = float(np.mean(first) - np.mean(second)), (len(first), len(second))
    parts = [float(np.var(group, ddof=1)) / len(group) for group in (first, second)]
    spread = sum(parts)
    df = spread**2 / sum(part**2 / (k - 1) for part, k in zip(parts, n)) if spread else math.inf
    half = t_limit(df) * math.sqrt(spread)
    return Estimate(gap, gap - half, gap + half, sum(n))


def resampled_sums(columns, seed=0, resamples=2000):
    """columns (n, F) -> (resamples, F): the sums over n rows drawn with replacement, a bootstrap."""
    n, rng, sums = len(columns), np.random.default_rng(seed), []
    block = max(1, 2_000_000 // n)                              # rows drawn at once: memory stays below 100 MB
    for start in range(0, resamples, block):
        chosen = rng.integers(n, size=(min(block, resamples - start), n))
        sums.append(np.stack([column[chosen].sum(axis=1) for column in columns.T], axis=1))
    return np.concatenate(sums)


def ratio(tops, bottoms=None, seed=0, resamples=2000):
    """sum(tops) / sum(bottoms), the mean if there are no bottoms, with the bootstrap over the units."""
    tops = np.asarray(tops, dtype=float)
    both = np.stack([tops, np.ones_like(tops) if bottoms is None else np.asarray(bottoms, dtype=float)], axis=1)
    top, bottom = resampled_sums(both, seed, resamples).T
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return Estimate(float(both[:, 0].sum() / both[:, 1].sum()), float(low), float(high), len(tops))


def transformed(function, estimate):
    """An increasing function of an estimate, like exp: the interval goes with it."""
    return Estimate(*map(function, estimate[:3]), estimate.n)


# ---- tests -----------------------------------------------------------------------------------------------------------

def sign_test(wins, losses):
    """Exact two-sided probability of a split at least this uneven if both sides were as good. Ties are left out."""
    n, most = wins + losses, max(wins, losses)
    ways = tail = math.comb(n, most)
    for k in range(most, n):
        ways = ways * (n - k) // (k + 1)                    # comb(n, k + 1) from comb(n, k)
        tail += ways
    return min(1.0, 2 * tail / 2 ** n)


def flip_test(differences, seed=0, flips=10_000):
    """Two-sided probability of a mean this far from 0 if each paired difference could as well have had the other sign.
    Not below 1 / (flips + 1)."""
    differences = np.asarray(differences, dtype=float)
    differences = differences[differences != 0]
    n, rng, extreme = len(differences), np.random.default_rng(seed), 0
    block = max(1, 2_000_000 // max(n, 1))
    for start in range(0, flips, block):
        signs = rng.integers(2, size=(min(block, flips - start), n)) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-9)).sum())
    return (1 + extreme) / (1 + flips)


def label_test(first, second, seed=0, shuffles=10_000):
    """Two-sided probability of two means this far apart if the labels `first` and `second` meant nothing."""
    values, n, rng = np.concatenate([first, second]), len(first), np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(values, (shuffles, 1)), axis=1)
    gaps = shuffled[:, :n].mean(axis=1) - shuffled[:, n:].mean(axis=1)
    found = abs(values[:n].mean() - values[n:].mean())
    return (1 + int((np.abs(gaps) >= found * (1 - 1e-9)).sum())) / (1 + shuffles)


# ---- one model against another on the same prompts -------------------------------------------------------------------

def wins_of(ours, theirs):
    """1 where our number is the greater, 0 where it is the smaller, 0.5 where they are equal."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours > theirs) + 0.5 * (ours == theirs)


def length_controlled(wins, longer):
    """The win rate that is left at equal length: sigmoid(c) of P(win) = sigmoid(c + w tanh(longer / its deviation)).

    longer: our length minus theirs, per prompt. As in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), without its
    term for the difficulty of a prompt. Half a win and half a loss at equal length, and a ridge of 0.1 on w, keep both
    finite where every comparison was won. The interval is Wald's for c: wide where hardly any lengths are alike.
    """
    wins, longer = np.asarray(wins, dtype=float), np.asarray(longer, dtype=float)
    X = np.stack([np.ones_like(longer), np.tanh(longer / (longer.std() or 1.0))], axis=1)      # (n, 2)
    X, y = np.concatenate([X, [[1, 0], [1, 0]]]), np.append(wins, [1, 0])
    weights, ridge, theta = np.append(np.ones_like(wins), [0.5, 0.5]), np.diag([0, 0.1]), np.zeros(2)
    for _ in range(50):                                                                         # Newton's method
        p = 1 / (1 + np.exp(-X @ theta))                                                        # (n + 2,)
        hessian = (X * (weights * p * (1 - p))[:, None]).T @ X + ridge
        theta += np.linalg.solve(hessian, X.T @ (weights * (y - p)) - ridge @ theta).clip(-2, 2)
    half = Z * math.sqrt(np.linalg.inv(hessian)[0, 0])
    return Estimate(*(1 / (1 + math.exp(-c)) for c in (theta[0], theta[0] - half, theta[0] + half)), len(wins))


# ---- calibration -----------------------------------------------------------------------------------------------------

def calibration(confidence, right, group, bins=10):
    """How often a judge that says "with probability `confidence`" is right -> (rows of the reliability diagram, ECE).

    confidence (n,) in 0.5..1, right (n,) in 0..1, group (n,): the prompt that each pair belongs to. A row is (mean
    confidence, accuracy, number of pairs) of one of the equal bins of 0.5..1; ECE = sum over bins of their share
    of the pairs times |accuracy - confidence| (Guo et al. 2017, equation 3). Chance alone makes it greater than 0, and a
    resample greater still, so its interval is the reflected bootstrap's, and begins at 0 unless fewer than 5 % of random
    signs of each prompt's errors give one as great.
    """
    confidence, right, group = np.asarray(confidence, float), np.asarray(right, float), np.asarray(group)
    at = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    N = int(group.max()) + 1

    def sums(x):
        return np.bincount(group * bins + at, weights=x, minlength=N * bins).reshape(N, bins)

    said, hit, count = sums(confidence), sums(right), sums(np.ones_like(right))                 # (N, bins)
    rows = [(float(said[:, b].sum() / count[:, b].sum()), clustered_rate(hit[:, b], count[:, b]), int(count[:, b].sum()))
            for b in range(bins) if count[:, b].sum()]
    errors, total = hit - said, len(right)
    ece = float(np.abs(errors.sum(axis=0)).sum() / total)
    resampled = resampled_sums(np.concatenate([errors, count.sum(axis=1, keepdims=True)], axis=1))
    low, high = 2 * ece - np.quantile(np.abs(resampled[:, :-1]).sum(axis=1) / resampled[:, -1], [0.975, 0.025])
    signs = np.random.default_rng(0).integers(2, size=(2000, N), dtype=np.int8) * 2 - 1
    by_chance = np.abs(signs @ errors).sum(axis=1) / total
    low = max(low, 0.0) if np.mean(by_chance >= ece * (1 - 1e-9)) < 0.05 else 0.0
    return rows, Estimate(ece, float(low), float(max(high, ece)), N)
