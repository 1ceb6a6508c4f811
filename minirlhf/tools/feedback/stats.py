"""What votes say: counts, agreement, bias to a length, pace, and which model wins.

    python -m minirlhf.tools.feedback stats FILE
"""

import math
import statistics
from collections import Counter, defaultdict
from itertools import combinations

from minirlhf.data import comparison, read_jsonl
from minirlhf.files.jsonl import is_list_of
from minirlhf.stats import clustered_rate, units, win_rate, wins_of
from minirlhf.tools.feedback.votes import item_id, sidecar

READABLE = 10       # words a second. People read 4 (Brysbaert 2019); at 10 nobody has compared the answers


# ---- statistics ------------------------------------------------------------------------------------------------------

def cohen_kappa(first, second, observed=None):
    """Agreement of two lists of categories beyond chance: 1 is full, 0 is what chance gives. nan if chance gives 1.

    observed: another agreement, as an end of its interval, with chance taken as known (Cohen 1960).
    """
    n = len(first)
    if observed is None:
        observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts_a, counts_b = Counter(first), Counter(second)
    chance = sum(counts_a[c] * counts_b[c] for c in counts_a) / n ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


# ---- votes -----------------------------------------------------------------------------------------------------------

def read_votes(path):
    """The votes of a comparisons file: dicts with item, annotator, prompt, responses, ranks and models ([] if unknown),
    and with seconds where known. A row with the rankings of several annotators, as data/tiny/annotate.py writes them,
    becomes a vote of each."""
    votes = []
    for where, value in read_jsonl(path):
        row = comparison(value, where)
        models = value.get("models")
        base = {**value, "item": item_id(row.prompt, row.responses), "prompt": row.prompt, "responses": row.responses,
                "ranks": row.ranks, "annotator": "" if value.get("annotator") is None else str(value["annotator"]),
                "models": models if is_list_of(str, models, len(row.ranks)) else []}
        rankings = value["annotators"] if isinstance(value.get("annotators"), list) else []
        several = [{**base, "annotator": f"annotator {i}", "ranks": tuple(ranks)}
                   for i, ranks in enumerate(rankings, start=1) if is_list_of(int, ranks, len(row.ranks))]
        votes += several or [base]
    return votes


def verdicts(ranks):
    """Every pair of answers i < j: 1 if i is better, -1 if j is, 0 for a tie."""
    return [(a < b) - (a > b) for a, b in combinations(ranks, 2)]


def agreements(votes):
    """{(name, name): [(verdict of one, verdict of the other), ...]} on all pairs of answers that both have judged.

    Votes without a name on one item are those of different people.
    """
    by_item = defaultdict(dict)
    for n, vote in enumerate(votes):
        by_item[vote["item"]][vote["annotator"], 0 if vote["annotator"] else n] = verdicts(vote["ranks"])
    both = defaultdict(list)
    for given in by_item.values():
        for a, b in combinations(sorted(given), 2):
            both[a[0], b[0]] += zip(given[a], given[b])
    return dict(both)


def longer_preferred(votes):
    """Whether the longer answer, in characters, was preferred: one for each pair of different lengths and no tie."""
    found = []
    for vote in votes:
        lengths = combinations(map(len, vote["responses"]), 2)
        found += [verdict == (a > b) - (a < b) for verdict, (a, b) in zip(verdicts(vote["ranks"]), lengths)
                  if verdict and a != b]
    return found


def by_prompt(votes):
    """Lists of the votes on one prompt each: what people said of one prompt is not independent."""
    groups = defaultdict(list)
    for unit, vote in zip(units([vote["prompt"] for vote in votes], [vote["responses"] for vote in votes]), votes):
        groups[unit].append(vote)
    return list(groups.values())


def remarks(rows):
    """{flag: items that carry it}, with the notes under "with a note"."""
    items = defaultdict(set)
    for row in rows:
        flags = row["flags"] if isinstance(row.get("flags"), list) else []
        for flag in [*map(str, flags), *(["with a note"] if row.get("note") else [])]:
            items[flag].add(str(row.get("item")))
    return {flag: len(items[flag]) for flag in sorted(items)}


def duel(votes, ours, theirs):
    """One model against another: 1, 0.5 or 0 for each prompt. Several people's votes on a prompt, and several answers
    to it, are not independent, so their verdicts are added up first."""
    totals = defaultdict(int)
    for vote in votes:
        for (a, b), verdict in zip(combinations(vote["models"], 2), verdicts(vote["ranks"])):
            if {a, b} == {ours, theirs}:
                totals[vote["prompt"]] += verdict if a == ours else -verdict
    return wins_of(list(totals.values()), 0).tolist()


# ---- one person, and two ---------------------------------------------------------------------------------------------

def pace(votes):
    """(median seconds of a vote, 0 if none is known; how many votes took less than reading the answers takes)."""
    timed = [(n, vote) for vote in votes if isinstance(n := vote.get("seconds"), (int, float)) and 0 <= n < 1e9]
    fast = sum(len(" ".join(vote.get("responses", [])).split()) > n * READABLE for n, vote in timed)
    return statistics.median([n for n, _ in timed] or [0]), fast


def gold_right(votes, gold):
    """How many of the pairs whose better answer is known were told right, of how many. gold: see read_gold."""
    said = [verdict == known for vote in votes if vote["item"] in gold
            for verdict, known in zip(verdicts(vote["ranks"]), verdicts(gold[vote["item"]]["gold"])) if known]
    return sum(said), len(said)


def kappas(votes):
    """{(name, name): (the share of pairs they agree on, of how many pairs, kappa, low, high)}, with 95 % intervals."""
    both, groups, found = agreements(votes), list(map(agreements, by_prompt(votes))), {}
    for names, said in both.items():
        own = [group.get(names, []) for group in groups]
        same = clustered_rate([sum(x == y for x, y in pairs) for pairs in own], list(map(len, own)))
        found[names] = same, len(said), *(cohen_kappa(*zip(*said), end) for end in same[:3])
    return found


# ---- python -m minirlhf.tools.feedback stats FILE --------------------------------------------------------------------

def print_stats(path, gold={}):
    votes, skips_file = read_votes(path), sidecar(path, "skips")
    skips = [row for _, row in read_jsonl(skips_file)] if skips_file.exists() else []
    pairs = [verdict for vote in votes for verdict in verdicts(vote["ranks"])]
    all_ties = sum(len(set(vote["ranks"])) == 1 for vote in votes)
    print(f"{path}: {len(votes)} votes on {len({vote['item'] for vote in votes})} items, {len(pairs)} pairs of answers")
    print(f"  ties       {pairs.count(0)} of {len(pairs)} pairs; {all_ties} votes are all ties")
    print(f"  skips      {len(skips)}")
    for flag, n in remarks(votes + skips).items():
        print(f"  flag       {flag}: {n} items")

    for name in sorted({vote["annotator"] for vote in votes}):
        own = [vote for vote in votes if vote["annotator"] == name]
        (median, fast), (right, n) = pace(own), gold_right(own, gold)
        speed = f", half within {median:.1f} s, {3600 / median:.0f} an hour" if median > 0 else ""
        print(f"  annotator  {name or '(no name)'}: {len(own)} votes{speed}")
        if fast:
            print(f"  too fast   {name or '(no name)'}: {fast} votes, at more than {READABLE} words a second")
        if n:
            print(f"  gold       {name or '(no name)'}: {right} of {n} known pairs")
        longer = list(map(longer_preferred, by_prompt(own)))
        if any(longer):
            best = clustered_rate(list(map(sum, longer)), list(map(len, longer)))
            print(f"  length     {name or '(no name)'}: prefers the longer answer in {best.value:.3f} of "
                  f"{sum(map(len, longer))} pairs [{best.low:.3f}, {best.high:.3f}], {best.n} prompts")

    for (a, b), (same, n, kappa, low, high) in kappas(votes).items():
        print(f"  agreement  {a or '(no name)'} "
              f"and {b or '(no name)'}: {same.value:.3f} of {n} pairs [{same.low:.3f}, "
              f"{same.high:.3f}], kappa {kappa:.3f} [{low:.3f}, {high:.3f}], {same.n} prompts")

    for ours, theirs in combinations(sorted({model for vote in votes for model in vote["models"]}), 2):
        print_duel(votes, ours, theirs)


def print_duel(votes, ours, theirs):
    if wins := duel(votes, ours, theirs):
        (share, low, high, n), ties, p = win_rate(wins).values()
        print(f"  {ours} against {theirs}: {wins.count(1)} wins, {ties} ties, {wins.count(0)} losses on {n} prompts\n"
              f"    win rate {share:.3f}, 95 % interval [{low:.3f}, {high:.3f}] (Wilson, a tie is half a win); sign "
              f"test p = {p:.2g}")
