"""How certain a number is: 95 % intervals and an exact test. Functions of arrays, no model inside.

Every figure of the assessment is an Estimate. Its interval depends on what is estimated:

    a rate of independent prompts                  Wilson
    a rate of pairs that share prompts             Wilson, for the effective number of pairs
    a mean, or a ratio of sums over prompts        percentile bootstrap over prompts
    a difference of two rates                      Newcombe
    a difference of the means of two small groups  Welch
    a count of different n-grams                   jackknife (assess.py)
"""

import math
from typing import NamedTuple

import numpy as np


Z = 1.959964        # a normal number lies within Z standard deviations in 95 % of the cases


class Estimate(NamedTuple):
    """A figure, its 95 % interval, and how many independent units (mostly prompts) it has."""
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


# ---- intervals -----------------------------------------------------------------------------------

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


def units(prompts, answers):
    """What is independent, as a name for each row: its prompt, since its rows have that in common.

    Where all rows share one prompt, it says nothing, and rows that share an answer are one unit.
    """
    if len(set(prompts)) > 1:
        return list(prompts)
    above = {answer: answer for row in answers for answer in row}

    def top(answer):
        while above[answer] != answer:
            answer = above[answer]
        return answer

    for row in answers:
        for answer in row:
            above[top(answer)] = top(row[0])
    return [top(row[0]) for row in answers]


def sum_by_prompt(prompts, *columns):
    """Each column's sums over the rows of one prompt: arrays, one number per different prompt."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    rows = np.array([number[prompt] for prompt in prompts], dtype=int)
    return [np.bincount(rows, weights=column) for column in columns]


def clustered_rate(hits, counts):
    """sum(hits) / sum(counts), one entry per prompt: pairs of one prompt are not independent.

    Wilson's interval for Kish's effective number: as many independent pairs as would vary this
    much. (A bootstrap over prompts is too narrow near 0 and 1.) Prompts without pairs do not count.
    """
    hits, counts = np.asarray(hits, dtype=float), np.asarray(counts, dtype=float)
    hits, counts = hits[counts > 0], counts[counts > 0]
    N, total = len(counts), counts.sum()
    share = float(hits.sum() / total)
    variance = N / max(N - 1, 1) * ((hits - share * counts) ** 2).sum() / total ** 2
    n = min(share * (1 - share) / variance, total) if variance > 0 else N
    return Estimate(share, *wilson(share * n, n), N)


def difference_of_rates(first, second):
    """rate(first) - rate(second) of two independent groups (Newcombe 1998, method 10)."""
    a, b = rate(first), rate(second)
    gap = a.value - b.value
    return Estimate(gap, gap - math.hypot(a.value - a.low, b.high - b.value),
                    gap + math.hypot(a.high - a.value, b.value - b.low), a.n + b.n)


def student(df):
    """Student's t with df degrees of freedom: limits from 0 up, P(|T| <= limit) of each (arrays).

    With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1), which is summed numerically. From 10,000 degrees
    of freedom on the sum is too coarse, and T no longer changes by more than 0.0001.
    """
    df = min(df, 10_000)
    edges = np.linspace(0, math.pi / 2, 20_001)
    within = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (df - 1))
    return math.sqrt(df) * np.tan(edges[1:-1]), within[:-1] / within[-1]


def t_limit(df):
    """The two-sided 95 % limit."""
    return float(np.interp(0.95, *reversed(student(df))))


def t_probability(t, df):
    """The two-sided probability of a t at least this far from 0."""
    limits, within = student(df)
    return float(1 - np.interp(abs(t), [0, *limits], [0, *within]))


def difference_of_means(first, second):
    """mean(first) - mean(second) of two small independent groups (Welch 1947)."""
    gap, n = float(np.mean(first) - np.mean(second)), (len(first), len(second))
    variances = [float(np.var(group, ddof=1)) / len(group) for group in (first, second)]
    total = sum(variances)
    df = total**2 / sum(v**2 / (k - 1) for v, k in zip(variances, n)) if total else 1.0
    half = t_limit(df) * math.sqrt(total)
    return Estimate(gap, gap - half, gap + half, sum(n))


def ratio(tops, bottoms=None, seed=0, resamples=2000):
    """sum(tops) / sum(bottoms), or the mean of tops.

    The bootstrap draws units with replacement, so the tokens of a prompt stay together.
    """
    tops = np.asarray(tops, dtype=float)
    bottoms = np.ones_like(tops) if bottoms is None else np.asarray(bottoms, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(tops), size=(resamples, len(tops)))
    top, bottom = tops[chosen].sum(axis=1), bottoms[chosen].sum(axis=1)         # (resamples,)
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return Estimate(float(tops.sum() / bottoms.sum()), float(low), float(high), len(tops))


# ---- one model against another on the same prompts -----------------------------------------------

def wins_of(ours, theirs):
    """1 where our number is greater, 0 where it is smaller, 0.5 where they are equal."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours > theirs) + 0.5 * (ours == theirs)


def sign_test(wins, losses):
    """Exact two-sided probability of a split at least this uneven if both sides are equally good.

    Ties are left out.
    """
    n, most = wins + losses, max(wins, losses)
    tail = sum(math.comb(n, k) for k in range(most, n + 1))
    return min(1.0, 2 * tail / 2 ** n)


def win_rate(wins):
    """How often one of two answers to a prompt is the better one. wins: 1, 0.5 or 0 per prompt."""
    wins = list(wins)
    p = sign_test(wins.count(1), wins.count(0))
    return {"win_rate": rate(wins), "ties": wins.count(0.5), "p": p}
