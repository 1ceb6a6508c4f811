"""The laws of over-optimisation and the arithmetic of best-of-n, after Gao, Schulman and Hilton 2022 ("G"). Pure functions."""

import math

import numpy as np


def fit(d, R, law):
    """Least squares of R = d (a - b g(d)) with g(d) = d for "bon", log d for "rl" (G, section 3.1) -> a, b, R^2.

    d = sqrt(KL) in sqrt(nats), all > 0; R = reward minus that of the SFT model.
    """
    d, R = np.asarray(d, float), np.asarray(R, float)
    X = np.stack([d, -d * (d if law == "bon" else np.log(d))], axis=1)             # (points, 2)
    (a, b), *_ = np.linalg.lstsq(X, R, rcond=None)
    spread = ((R - R.mean()) ** 2).sum()
    return float(a), float(b), float(1 - ((R - X @ (a, b)) ** 2).sum() / spread) if spread else math.nan


def turnover(a, b, law, farthest):
    """The d beyond which the law says that more optimisation makes it worse, or None if no such d was reached."""
    if b <= 0:
        return None
    d = a / (2 * b) if law == "bon" else math.exp(min(a / b - 1, 700))              # where the derivative of d (a - b g(d)) is 0
    return max(d, 0.0) if d <= farthest else None


def fitted(d, R, law, resampled):
    """The law's parameters, their 95 % intervals from resampled curves [(d, R), ...], and its turnover, as a dict."""
    a, b, r2 = fit(d, R, law)
    low, high = np.quantile([fit(*curve, law)[:2] for curve in resampled], [0.025, 0.975], axis=0)
    return {"a": a, "a_ci": [low[0], high[0]], "b": b, "b_ci": [low[1], high[1]], "r2": r2, "n": len(d),
            "turnover": turnover(a, b, law, max(d))}


def highest(d, R, window=1):
    """The highest mean of R over `window` points that are neighbours in d -> (their mean d, that mean)."""
    order, ones = np.argsort(d), np.full(window, 1 / window)
    means = [np.convolve(np.asarray(values)[order], ones, mode="valid") for values in (d, R)]
    return tuple(float(mean[means[1].argmax()]) for mean in means)


def best_of_n_kl(n):
    """KL of the best of n samples to the model that they are from, nats (G, section 2)."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy, values, n):
    """proxy, values (N, S): of S samples for each of N prompts -> (N,) the expected value of the sample with the highest
    proxy among n drawn without replacement. The i-th worst of S (from 0) is that one with probability C(i, n-1) / C(S, n)."""
    S = proxy.shape[1]
    chance = np.array([math.comb(i, n - 1) / math.comb(S, n) for i in range(S)])
    return np.take_along_axis(values, proxy.argsort(axis=1), axis=1) @ chance
