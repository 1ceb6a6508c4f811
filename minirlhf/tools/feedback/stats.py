"""What votes say: counts, agreement, position bias, pace, and who wins. The statistics are pure functions.

    python -m minirlhf.tools.feedback stats FILE
"""

import math
import statistics
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np

from minirlhf.data import comparison, is_list_of, read_jsonl
from minirlhf.tools.feedback.votes import item_id, sidecar
from minirlhf.tools.evaluate.stats import sign_test, wilson


# ---- statistics ------------------------------------------------------------------------------------------------------

def cohen_kappa(first, second):
    """Agreement of two lists of categories beyond chance: 1 is full, 0 is what chance gives. nan if chance gives 1."""
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts_a, counts_b = Counter(first), Counter(second)
    chance = sum(counts_a[c] * counts_b[c] for c in counts_a) / n ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def bradley_terry(wins, tolerance=1e-10):
    """Strengths s with P(i beats j) = sigmoid(s_i - s_j), most likely given wins[i][j], times i beat j; mean 0.

    The minorise-maximise steps of Hunter 2004 (Annals of Statistics 32), equation 3. None where no finite strengths are
    the most likely: some group of models has never lost to, or never met, the others (Ford 1957).
    """
    wins = np.asarray(wins, dtype=float)
    M = len(wins)
    reach = np.linalg.matrix_power((wins > 0) + np.eye(M), M) > 0       # [i, j]: i beat one who beat ... j
    if not reach.all():
        return None
    games, p = wins + wins.T, np.ones(M)
    for _ in range(100_000):
        new = wins.sum(axis=1) / (games / (p[:, None] + p[None, :])).sum(axis=1)
        new /= np.exp(np.log(new).mean())
        done = np.abs(np.log(new / p)).max() < tolerance
        p = new
        if done:
            break
    return np.log(p).tolist()


# ---- votes -----------------------------------------------------------------------------------------------------------

def read_votes(path):
    """The votes of a comparisons file: dicts with item, annotator, ranks, responses, and order, models, seconds where
    known. A row with several annotators' rankings (data/tiny/annotate.py) becomes a vote of each."""
    votes = []
    for where, value in read_jsonl(path):
        row = comparison(value, where)
        base = {**value, "item": item_id(row.prompt, row.responses), "prompt": row.prompt, "responses": row.responses,
                "ranks": row.ranks, "annotator": value.get("annotator", "")}
        rankings = value.get("annotators", [])
        names = value.get("names") or [f"annotator {i}" for i in range(1, len(rankings) + 1)]
        several = [{**base, "annotator": name, "ranks": tuple(ranks)} for name, ranks in zip(names, rankings)
                   if is_list_of(int, ranks, len(row.ranks))]
        votes += several or [base]
    return votes


def verdicts(ranks):
    """Every pair of answers i < j: 1 if i is better, -1 if j is, 0 for a tie."""
    return [(a < b) - (a > b) for a, b in combinations(ranks, 2)]


def agreements(votes):
    """{(name, name): (verdicts of one, verdicts of the other)} on all pairs of answers both have judged."""
    by_item = defaultdict(dict)
    for vote in votes:
        by_item[vote["item"]][vote["annotator"]] = verdicts(vote["ranks"])
    both = defaultdict(lambda: ([], []))
    for given in by_item.values():
        for a, b in combinations(sorted(given), 2):
            both[a, b][0].extend(given[a])
            both[a, b][1].extend(given[b])
    return dict(both)


def first_places(votes):
    """How often the best answer stood at each shown position (a shared first place is split), and of how many votes."""
    places = defaultdict(float)
    known = [vote for vote in votes
             if len(vote.get("order", [])) == len(vote["ranks"]) and len(set(vote["ranks"])) > 1]
    for vote in known:
        best = [position for position, k in enumerate(vote["order"]) if vote["ranks"][k] == 1]
        for position in best:
            places[position] += 1 / len(best)
    return dict(sorted(places.items())), known


def model_names(votes):
    return sorted({model for vote in votes for model in vote.get("models", [])})


def win_matrix(votes, names):
    """wins[i][j]: how often an answer of model i was preferred to one of model j; a tie is half a win for each."""
    wins = np.zeros((len(names), len(names)))
    for vote in votes:
        models = [names.index(model) for model in vote.get("models", [])]
        for (i, j), verdict in zip(combinations(models, 2), verdicts(vote["ranks"])):
            if i != j:
                wins[i, j] += (1 + verdict) / 2
                wins[j, i] += (1 - verdict) / 2
    return wins


def duel(votes, ours, theirs):
    """(wins, ties, losses) of one model against another, in prompts and not in votes: several people who judge one
    prompt, or several answers to it, are not independent, so their verdicts are added up first."""
    by_prompt = defaultdict(list)
    for vote in votes:
        for (a, b), verdict in zip(combinations(vote.get("models", []), 2), verdicts(vote["ranks"])):
            if {a, b} == {ours, theirs}:
                by_prompt[vote["prompt"]].append(verdict if a == ours else -verdict)
    totals = [sum(given) for given in by_prompt.values()]
    return sum(t > 0 for t in totals), sum(t == 0 for t in totals), sum(t < 0 for t in totals)


# ---- python -m minirlhf.tools.feedback stats FILE --------------------------------------------------------------------

def print_stats(path):
    votes, skips = read_votes(path), sidecar(path, "skips")
    said = [verdict for vote in votes for verdict in verdicts(vote["ranks"])]
    print(f"{path}: {len(votes)} votes on {len({vote['item'] for vote in votes})} items, {len(said)} pairs of answers")
    all_ties = sum(len(set(vote["ranks"])) == 1 for vote in votes)
    print(f"  ties       {said.count(0)} of {len(said)} pairs; {all_ties} votes are all ties")
    print(f"  skips      {sum(1 for _ in read_jsonl(skips)) if skips.exists() else 0}")
    print_annotators(votes)
    print_agreement(votes)
    print_positions(votes)
    print_models(votes)


def print_annotators(votes):
    for name in sorted({vote["annotator"] for vote in votes}):
        own = [vote for vote in votes if vote["annotator"] == name]
        seconds = [vote["seconds"] for vote in own if isinstance(vote.get("seconds"), (int, float))]
        pace = ""
        if seconds and statistics.median(seconds) > 0:
            pace = f", half within {statistics.median(seconds):.1f} s, {3600 / statistics.median(seconds):.0f} an hour"
        print(f"  annotator  {name or '(no name)'}: {len(own)} votes{pace}")


def print_agreement(votes):
    for (a, b), (first, second) in agreements(votes).items():
        same, n = sum(x == y for x, y in zip(first, second)), len(first)
        low, high = wilson(same, n)
        print(f"  agreement  {a} and {b}: {same / n:.3f} of {n} pairs [{low:.3f}, {high:.3f}], "
              f"kappa {cohen_kappa(first, second):.3f}")


def print_positions(votes):
    places, known = first_places(votes)
    for position in range(max((len(vote["ranks"]) for vote in known), default=0)):
        sizes = [len(vote["ranks"]) for vote in known if len(vote["ranks"]) > position]
        best, n, expected = places.get(position, 0), len(sizes), statistics.mean(1 / K for K in sizes)
        low, high = wilson(best, n)
        print(f"  position   {position + 1}: best in {best / n:.3f} of {n} votes [{low:.3f}, {high:.3f}]; "
              f"{expected:.3f} without bias")


def print_models(votes):
    names = model_names(votes)
    for ours, theirs in combinations(names, 2):
        print_duel(votes, ours, theirs)
    if len(names) > 2:
        strengths = bradley_terry(win_matrix(votes, names))
        if strengths is None:
            print("  strength   not determined: a model won, or lost, all its comparisons, or two were never compared")
        for strength, name in sorted(zip(strengths or [], names), reverse=True):
            print(f"  strength   {name}: {strength:+.3f} (Bradley-Terry, mean 0)")


def print_duel(votes, ours, theirs):
    wins, ties, losses = duel(votes, ours, theirs)
    n = wins + ties + losses
    if n:
        rate, (low, high) = (wins + ties / 2) / n, wilson(wins + ties / 2, n)
        print(f"  {ours} against {theirs}: {wins} wins, {ties} ties, {losses} losses on {n} prompts\n"
              f"    win rate {rate:.3f}, 95 % interval [{low:.3f}, {high:.3f}] (Wilson, a tie is half a win); "
              f"sign test p = {sign_test(wins, losses):.2g}")
