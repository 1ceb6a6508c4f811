"""How good a reward model is: accuracy and what it hides, calibration, and the ceiling that people set.

Pairs of one prompt share their answers, so in every interval a prompt is the unit.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np

from minirlhf.running.errors import UserError
from minirlhf.data import encode_rows, read_comparisons
from minirlhf.tools.feedback.stats import read_votes, verdicts
from minirlhf.tools.evaluate.measure import rewards_of
from minirlhf.tools.evaluate.stats import calibration, clustered_rate, flip_test, wins_of

CONFIDENT = ((0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 1.01))         # bins of the margin in gold, which is in 0..1


class Pairs(NamedTuple):
    """Pairs of answers to one prompt, the better one first; all arrays (pairs,)."""
    prompt: np.ndarray      # index of the prompt
    margin: np.ndarray      # how much better it is: ranks, or gold
    score: np.ndarray       # raw score of the better one minus that of the other
    longer: np.ndarray      # tokens of the better one minus those of the other

    def of(self, chosen):
        return Pairs(*(column[chosen] for column in self))


def pairs_of(goodness, scores, lengths):
    """Three lists, a list of K numbers per prompt in each -> Pairs of all answers that differ in goodness."""
    found = []
    for n, (good, score, length) in enumerate(zip(goodness, scores, lengths)):
        for i, j in combinations(range(len(good)), 2):
            if good[i] != good[j]:
                better, other = (i, j) if good[i] > good[j] else (j, i)
                margin = round(good[better] - good[other], 6)   # 0.1 and not 0.09999: it decides on a bin
                found.append((n, margin, score[better] - score[other], length[better] - length[other]))
    columns = np.array(found, dtype=float).reshape(-1, 4).T
    return Pairs(columns[0].astype(int), *columns[1:])


def per_prompt(values, prompt):
    """Sums of values over the pairs of each prompt that has any, and the number of those pairs."""
    _, at = np.unique(prompt, return_inverse=True)
    return np.bincount(at, weights=values), np.bincount(at)


def accuracy(pairs):
    """The share of pairs in which the better one has the higher score, equal scores half; n counts prompts."""
    return clustered_rate(*per_prompt(wins_of(pairs.score, 0), pairs.prompt))


def by_margin(pairs, bins):
    """[(low, high, accuracy, pairs)] of the bins low <= margin < high that have pairs."""
    found = [(low, high, pairs.of((low <= pairs.margin) & (pairs.margin < high))) for low, high in bins]
    return [(low, high, accuracy(some), len(some.prompt)) for low, high, some in found if len(some.prompt)]


def by_length(pairs):
    """The same by length: is the model right where the better answer is the shorter one?"""
    much = float(np.median(np.abs(pairs.longer[pairs.longer != 0]))) if pairs.longer.any() else 0.0
    groups = {f"preferred is shorter by more than {much:.0f} tokens": pairs.longer < -much,
              f"shorter by up to {much:.0f}": (-much <= pairs.longer) & (pairs.longer < 0), "equally long": pairs.longer == 0,
              f"longer by up to {much:.0f}": (0 < pairs.longer) & (pairs.longer <= much),
              f"longer by more than {much:.0f}": pairs.longer > much}
    return [(name, accuracy(pairs.of(chosen)), int(chosen.sum())) for name, chosen in groups.items() if chosen.any()]


def length_baseline(pairs):
    """What length alone would score, whichever direction is better: (direction, accuracy, p that the model is no better)."""
    longer = wins_of(pairs.longer, 0)
    direction = "longer is better" if longer.mean() >= 0.5 else "shorter is better"
    length = longer if longer.mean() >= 0.5 else 1 - longer
    p = flip_test(per_prompt(wins_of(pairs.score, 0) - length, pairs.prompt)[0])
    return direction, clustered_rate(*per_prompt(length, pairs.prompt)), p


def reliability(pairs):
    """Rows of the reliability diagram and the ECE: the model says sigmoid(|difference of the raw scores|), as its loss does."""
    confidence = 1 / (1 + np.exp(-np.abs(pairs.score)))
    return calibration(confidence, wins_of(pairs.score, 0), np.unique(pairs.prompt, return_inverse=True)[1])


# ---- people ----------------------------------------------------------------------------------------------------------

def ceiling(votes, scores):
    """Annotators against each other, and the model against the same single annotators, on pairs that they order.

    votes: feedback_stats.read_votes; scores: {(prompt, responses): K scores}. Returns (agreement of two annotators, accuracy
    against one annotator), each None if there is nothing to count.
    """
    by_item = {}
    for vote in votes:
        by_item.setdefault((vote["prompt"], vote["responses"]), []).append(verdicts(vote["ranks"]))
    same, model = [], []
    for item, given in by_item.items():
        both = [a * b for first, second in combinations(given, 2) for a, b in zip(first, second) if a and b]
        same.append((sum(product > 0 for product in both), len(both)))
        if item in scores:
            said = [np.sign(a - b) for a, b in combinations(scores[item], 2)]
            right = [(1 + a * b) / 2 for own in given for a, b in zip(own, said) if a]
            model.append((sum(right), len(right)))
    several = sum(n for _, n in same) > 0
    return clustered_rate(*zip(*same)) if several else None, clustered_rate(*zip(*model)) if several and model else None


# ---- all of it -------------------------------------------------------------------------------------------------------

def assess_reward(reward, tokenizer, path, gold=None, drop_long=False):
    """Everything about a reward model on a file of comparisons that it was not trained on, as a dict of figures."""
    examples = encode_rows(read_comparisons(path), tokenizer, reward.config.n_positions, drop_long=drop_long)
    flat = rewards_of(reward, [e.prompt for e in examples for _ in e.responses], [ids for e in examples for ids in e.responses])
    flat, cuts = flat * reward.reward_std, np.cumsum([len(e.responses) for e in examples])[:-1]     # raw scores but for the mean
    scores, lengths = np.split(flat, cuts), [list(map(len, e.responses)) for e in examples]
    pairs = pairs_of([[-rank for rank in e.row.ranks] for e in examples], scores, lengths)
    if not len(pairs.prompt):
        raise UserError(f"{path}: no comparison in this file prefers anything")
    rows, ece = reliability(pairs)
    steps = sorted(set(pairs.margin))
    agreement, single = ceiling(read_votes(path), {(e.row.prompt, e.row.responses): own for e, own in zip(examples, scores)})
    direction, baseline, p = length_baseline(pairs)
    report = {"prompts": len(examples), "pairs": len(pairs.prompt), "accuracy": accuracy(pairs),
              "by_margin_in_ranks": by_margin(pairs, [(step, step + 1) for step in steps]), "by_length": by_length(pairs),
              "length_only": {"direction": direction, "accuracy": baseline, "p_of_the_difference": p},
              "annotators_agree": agreement, "accuracy_against_one_annotator": single, "ece": ece, "reliability": rows}
    if gold:
        true = pairs_of([gold([e.row.prompt] * len(e.responses), list(e.row.responses)) for e in examples], scores, lengths)
        report |= {"accuracy_gold": accuracy(true), "by_margin_in_gold": by_margin(true, CONFIDENT)}
    return report
