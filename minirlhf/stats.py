"""How certain a number is: 95 % intervals, paired tests, calibration. Pure functions of arrays, no model inside.

Every figure of the assessment is an Estimate. Its interval depends on what is estimated:

    a rate of independent prompts                 Wilson
    a rate of pairs that share prompts            Wilson, for the effective number of pairs
    a mean, or a ratio of sums over prompts       percentile bootstrap over prompts, 2,000 resamples
    a difference of two rates                     Newcombe
    a difference of the means of two small groups Welch
    a win rate at equal length                    Wald
    a count of different n-grams                  jackknife
"""

import math
from typing import NamedTuple

import numpy as np


Z = 1.959964                        # a normal number lies within Z standard deviations in 95 % of the cases


class Estimate(NamedTuple):
    """A figure, its 95 % interval, and the number of independent units (usually prompts) behind it."""
    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        size = abs(self.value)
        digits = 4 if 0 < size < 0.1 else 3 if size < 10 else 1
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def plain(value):
    """Estimates, tuples and numpy numbers, however nested -> what JSON has."""
    if isinstance(value, Estimate):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


# ---- intervals -------------------------------------------------------------------------------------------------------

def wilson(right, n, z=Z):
    """Wilson's 95 % interval of a rate of `right` in n: (low, high), (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    rate, shrink = right / n, 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(yes):
    """The share of True in n independent cases. 0.5 is half a case."""
    right, n = float(sum(yes)), len(yes)
    return Estimate(right / n, *wilson(right, n), n)


def clustered_rate(hits, counts):
    """sum(hits) / sum(counts), one entry per prompt, for pairs that share a prompt and so are not independent.

    Wilson's interval for Kish's effective number: as many independent pairs as would vary this much. (A bootstrap over
    prompts is too narrow near 0 and 1.) Prompts without a pair do not count.
    """
    hits, counts = np.asarray(hits, dtype=float), np.asarray(counts, dtype=float)
    hits, counts = hits[counts > 0], counts[counts > 0]
    N, total = len(counts), counts.sum()
    share = float(hits.sum() / total)
    variance = N / max(N - 1, 1) * ((hits - share * counts) ** 2).sum() / total ** 2
    n = min(share * (1 - share) / variance, total) if variance > 0 else N
    return Estimate(share, *wilson(share * n, n), N)


def difference_of_rates(first, second):
    """rate(first) - rate(second) of two independent groups (Newcombe 1998, method 10, from Wilson's intervals)."""
    a, b = rate(first), rate(second)
    gap = a.value - b.value
    return Estimate(gap, gap - math.hypot(a.value - a.low, b.high - b.value),
                    gap + math.hypot(a.high - a.value, b.value - b.low), a.n + b.n)


def student(df):
    """Student's t with df degrees of freedom: limits from 0 up, and P(|T| <= limit) of each (arrays).

    With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1), which is summed numerically.
    """
    edges = np.linspace(0, math.pi / 2, 20_001)
    within = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (df - 1))
    return math.sqrt(df) * np.tan(edges[1:-1]), within[:-1] / within[-1]


def t_limit(df):
    """The two-sided 95 % limit."""
    limits, within = student(df)
    return float(np.interp(0.95, within, limits))


def t_probability(t, df):
    """The two-sided probability of a t at least this far from 0."""
    limits, within = student(df)
    return float(1 - np.interp(abs(t), limits, within))


def difference_of_means(first, second):
    """mean(first) - mean(second) of two small independent groups (Welch 1947)."""
    gap, n = float(np.mean(first) - np.mean(second)), (len(first), len(second))
    variances = [float(np.var(group, ddof=1)) / len(group) for group in (first, second)]
    total = sum(variances)
    df = total**2 / sum(v**2 / (k - 1) for v, k in zip(variances, n)) if total else 1.0
    half = t_limit(df) * math.sqrt(total)
    return Estimate(gap, gap - half, gap + half, sum(n))


def resampled_sums(columns, seed=0, resamples=2000):
    """A bootstrap: columns (n, F) -> (resamples, F), the sums over n rows drawn with replacement."""
    chosen = np.random.default_rng(seed).integers(len(columns), size=(resamples, len(columns)))
    return np.stack([column[chosen].sum(axis=1) for column in columns.T], axis=1)


def ratio(tops, bottoms=None, seed=0, resamples=2000):
    """sum(tops) / sum(bottoms), or the mean of tops. The bootstrap draws units, so tokens of a prompt stay together."""
    tops = np.asarray(tops, dtype=float)
    both = np.stack([tops, np.ones_like(tops) if bottoms is None else np.asarray(bottoms, dtype=float)], axis=1)
    top, bottom = resampled_sums(both, seed, resamples).T
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return Estimate(float(both[:, 0].sum() / both[:, 1].sum()), float(low), float(high), len(tops))


def transformed(function, estimate):
    """An increasing function of an estimate, such as exp, applied to its interval too."""
    return Estimate(*map(function, estimate[:3]), estimate.n)


# ---- tests -----------------------------------------------------------------------------------------------------------

def sign_test(wins, losses):
    """Exact two-sided probability of a split at least this uneven if both sides are equally good. Ties are left out."""
    n, most = wins + losses, max(wins, losses)
    tail = sum(math.comb(n, k) for k in range(most, n + 1))
    return min(1.0, 2 * tail / 2 ** n)


def as_far(observed, by_chance):
    """The share of chance values at least as far from 0 as the observed one, which counts as one of them."""
    farther = np.abs(by_chance) >= abs(observed) * (1 - 1e-9)                   # equal but for rounding is as far
    return float((1 + farther.sum()) / (1 + len(by_chance)))


def flip_test(differences, seed=0, flips=10_000):
    """Two-sided probability of a mean this far from 0 if each paired difference could as well have the other sign."""
    differences, rng = np.asarray(differences, dtype=float), np.random.default_rng(seed)
    differences = differences[differences != 0]
    signs = (rng.integers(2, size=len(differences)) * 2 - 1 for _ in range(flips))
    return as_far(differences.sum(), np.array([own @ differences for own in signs]))


def label_test(first, second, seed=0, shuffles=10_000):
    """Two-sided probability of two means this far apart if the cases were assigned to the two groups at random."""
    values, n, rng = np.concatenate([first, second]), len(first), np.random.default_rng(seed)
    groups = np.concatenate([[values], rng.permuted(np.tile(values, (shuffles, 1)), axis=1)])
    gaps = groups[:, :n].mean(axis=1) - groups[:, n:].mean(axis=1)              # (1 + shuffles,)
    return as_far(gaps[0], gaps[1:])


# ---- one model against another on the same prompts -------------------------------------------------------------------

def wins_of(ours, theirs):
    """1 where our number is greater, 0 where it is smaller, 0.5 where they are equal."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours > theirs) + 0.5 * (ours == theirs)


def length_controlled(wins, longer):
    """The win rate at equal length: sigmoid(c) of the fit P(win) = sigmoid(c + w tanh(longer / its deviation)).

    longer: our length minus theirs, per prompt. As in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), without its
    term for the difficulty of a prompt. Two additions keep the fit finite where every comparison was won: half a win
    and half a loss at equal length, and a ridge of 0.1 on w. The interval is Wald's for c. It is wide where hardly any
    lengths are alike.
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


def win_rate(wins):
    """How often one of two answers to the same prompt is the better one, from 1, 0.5 or 0 per prompt."""
    wins = list(wins)
    return {"win_rate": rate(wins), "ties": wins.count(0.5), "p": sign_test(wins.count(1), wins.count(0))}


# ---- calibration -----------------------------------------------------------------------------------------------------

def calibration(confidence, right, group, bins=10):
    """Is a judge right as often as it claims to be? -> (rows of the reliability diagram, expected calibration error).

    confidence (n,) in 0.5..1, right (n,) in 0..1, group (n,): the prompt that each pair belongs to. A row is (mean
    confidence, accuracy, number of pairs) of one of the equal bins of 0.5..1. The error (ECE) is the sum over bins of
    their share of the pairs times |accuracy - confidence| (Guo et al. 2017, equation 3).

    Chance alone makes the ECE greater than 0, and that of a resample greater still. So the interval is the reflected
    bootstrap's. It starts at 0 unless fewer than 5 % of random signs of each prompt's errors give an ECE this great.
    """
    confidence, right, group = np.asarray(confidence, float), np.asarray(right, float), np.asarray(group)
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    N = int(group.max()) + 1

    def sums(x):                                                # over the pairs of each prompt and bin
        return np.bincount(group * bins + bin_of, weights=x, minlength=N * bins).reshape(N, bins)

    claimed, hit, count = sums(confidence), sums(right), sums(np.ones_like(right))              # (N, bins)
    pairs = count.sum(axis=0)                                                                   # (bins,)
    rows = [(float(claimed[:, b].sum() / pairs[b]), clustered_rate(hit[:, b], count[:, b]), int(pairs[b]))
            for b in range(bins) if pairs[b]]
    errors, total = hit - claimed, len(right)
    ece = float(np.abs(errors.sum(axis=0)).sum() / total)
    resampled = resampled_sums(np.concatenate([errors, count.sum(axis=1, keepdims=True)], axis=1))
    low, high = 2 * ece - np.quantile(np.abs(resampled[:, :-1]).sum(axis=1) / resampled[:, -1], [0.975, 0.025])
    signs = np.random.default_rng(0).integers(2, size=(2000, N), dtype=np.int8) * 2 - 1
    by_chance = np.abs(signs @ errors).sum(axis=1) / total
    low = max(low, 0.0) if np.mean(by_chance >= ece * (1 - 1e-9)) < 0.05 else 0.0
    return rows, Estimate(ece, float(low), float(max(high, ece)), N)
