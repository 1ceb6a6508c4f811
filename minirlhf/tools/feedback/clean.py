"""Cleaning votes: the disagreements to read, what to leave out, and one consensus row for each item."""

import textwrap
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from minirlhf.files.errors import require
from minirlhf.files.json_files import write_whole
from minirlhf.files.jsonl import read_jsonl
from minirlhf.tools.feedback.stats import read_votes, verdicts
from minirlhf.tools.feedback.votes import comparison_row, sidecar, to_line

CONSENSUS = {
    "sum": "by the sum of the ranks",
    "majority": "by how many other answers most annotators rank below it, less those that most rank above",
}


def ranking(values):
    """The rank of each value. The largest gets 1, and equal values share a rank."""
    order = sorted(set(values), reverse=True)
    return [1 + order.index(value) for value in values]


def consensus(rankings, rule):
    """One ranking out of those of all annotators (see CONSENSUS)."""
    if rule == "sum":
        return ranking([-sum(ranks) for ranks in zip(*rankings)])

    def verdict(i, j):
        votes = sum((ranks[i] < ranks[j]) - (ranks[i] > ranks[j]) for ranks in rankings)
        return (votes > 0) - (votes < 0)

    K = range(len(rankings[0]))
    return ranking([sum(verdict(i, j) for j in K) for i in K])


def items_of(votes):
    """[the votes on one item], in the order of the file."""
    items = defaultdict(list)
    for vote in votes:
        items[vote["item"]].append(vote)
    return list(items.values())


def item_kappas(items):
    """{item: kappa of all its pairs of annotators}, for items with two votes or more.

    Chance is that of two people who say "tie" as often as people do in the whole file, and else toss a coin.
    """
    said = [verdict for votes in items for vote in votes for verdict in verdicts(vote["ranks"])]
    ties = said.count(0) / max(len(said), 1)
    chance, kappas = ties ** 2 + (1 - ties) ** 2 / 2, {}
    for votes in items:
        given = [verdicts(vote["ranks"]) for vote in votes]
        same = [a == b for first, second in combinations(given, 2) for a, b in zip(first, second)]
        if same:
            kappas[votes[0]["item"]] = (sum(same) / len(same) - chance) / (1 - chance) if chance < 1 else 1.0
    return kappas


def flags_of(row):
    flags = row.get("flags") or []
    return list(map(str, flags)) if isinstance(flags, list) else [str(flags)]


def show(votes, kappa):
    """An item as text: a column of ranks for each person beside the answers, and their notes below."""
    names = [vote["annotator"] or "(no name)" for vote in votes]
    print(f"\nkappa {kappa:.2f}   {votes[0]['prompt'].strip()!r}\n  " + "  ".join(names))
    for k, response in enumerate(votes[0]["responses"]):
        ranks = "  ".join(f"{vote['ranks'][k]:^{len(name)}}" for vote, name in zip(votes, names))
        indent = " " * (len(ranks) + 4)
        print(textwrap.fill(response.strip(), 118, initial_indent=f"  {ranks}  ", subsequent_indent=indent))
    for vote, name in zip(votes, names):
        remarks = [*flags_of(vote), *([repr(vote["note"])] if vote.get("note") else [])]
        if remarks:
            print(f"  {name}: {', '.join(remarks)}")


def flagged(votes, path, flags):
    """The items that anybody gave one of these flags, in a vote or in a skip."""
    skips = sidecar(path, "skips")
    rows = votes + ([row for _, row in read_jsonl(skips)] if skips.exists() else [])
    return {row.get("item") for row in rows if set(flags_of(row)) & set(flags)}


def left_over(votes, args):
    """The votes that no flag of the command leaves out. Prints what each step leaves."""
    def step(kept, what):
        pairs = sum(verdict != 0 for vote in kept for verdict in verdicts(vote["ranks"]))
        print(f"{len(kept):6,} votes on {len(items_of(kept)):,} items, {pairs:,} pairs with a winner   {what}")
        return kept
    votes, names = step(votes, args.file), {vote["annotator"] for vote in votes}
    for name in args.drop_annotator:
        require(name in names - {""}, f"{args.file}: there is no annotator {name!r}, only {', '.join(sorted(names))}")
        votes = step([vote for vote in votes if vote["annotator"] != name], f"without {name}")
    if args.drop_flag:
        gone = flagged(votes, args.file, args.drop_flag)
        votes = step([vote for vote in votes if vote["item"] not in gone], f"without items flagged {args.drop_flag}")
    if args.min_kappa is not None:
        kappas = item_kappas(items_of(votes))
        require(kappas, f"{args.file}: no item has two votes, so none has a kappa")
        votes = step([vote for vote in votes if kappas.get(vote["item"], 1) >= args.min_kappa],
                     f"without items of a kappa below {args.min_kappa:g}; items with one vote have none, and stay")
    return votes


def consensus_row(votes, rule):
    """One row for an item, with the names of those whose votes it is."""
    first = votes[0]
    ranks = consensus([vote["ranks"] for vote in votes], rule)
    finished = first.get("finished") or [True] * len(ranks)
    return comparison_row(first["prompt"], first["responses"], ranks, finished, item=first["item"],
                          models=first["models"], votes_of=[vote["annotator"] for vote in votes])


def clean(args):
    """The command: what it leaves out goes to no file, and the votes themselves stay as they are."""
    votes = left_over(read_votes(args.file), args)
    items = items_of(votes)
    kappas = item_kappas(items)
    worst = sorted((own for own in items if kappas.get(own[0]["item"], 1) < 1), key=lambda own: kappas[own[0]["item"]])
    for own in worst[:args.show]:
        show(own, kappas[own[0]["item"]])
    if not args.out:
        return
    require(not Path(args.out).exists(), f"{args.out} is there already: give --out another name")
    rows = [consensus_row(own, args.consensus) for own in items] if args.consensus else votes
    kept = [row for row in rows if not args.consensus or len(set(row["ranks"])) > 1]
    require(kept, f"{args.out}: nothing is left")
    write_whole(Path(args.out), map(to_line, kept))
    ties = len(rows) - len(kept)
    print(f"\n{args.out}: {len(kept):,} rows" + f", without {ties} that tie all answers" * bool(ties))
