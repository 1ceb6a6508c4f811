"""Simulated annotators: the careful ones all want the same thing, but each judges with some noise.

    python data/tiny/annotate.py [--model out/sft] [--n 4000] [--n_test 512] [--k 4] [--seed 1] [--out data/tiny]

samples K answers to each prompt from the model, lets the annotators rank them, and writes comparisons.jsonl (training
prompts) and comparisons_test.jsonl (held-out prompts). Other annotators can be asked, and more or fewer of them:

    python data/tiny/annotate.py --annotators careful careful short --noise 0.05 --n 1000 --n_test 0 --out out/short
"""

import argparse
import json
import math
import random
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from gold import gold
from minirlhf.answers import parse_stop, respond
from minirlhf.data import encode_prompt
from minirlhf.files.json_files import write_whole
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.generate import decode, generator
from minirlhf.files.errors import run_main
from minirlhf.tools.feedback.clean import CONSENSUS, consensus, ranking
from minirlhf.weights import from_pretrained

MAX_RESPONSE = 48   # tokens; a story has at most 34
NOISE = 0.115       # standard deviation of one judgement: two annotators then agree on about 80 % of the pairs
KINDS = {
    "careful": "judges by gold, with noise",
    "random": "does not look at the answers",
    "short": "likes short answers, whatever they say",
    "adversarial": "ranks as a careful one does, but the worst first",
}


class Panel(NamedTuple):
    """Who judges, and how the rankings of all annotators become one."""
    annotators: tuple[str, ...] = ("careful", "careful", "careful")
    noise: float = NOISE
    consensus: str = "sum"


def judge(kind: str, truth: list[float], responses: list[str], rng: random.Random, noise: float) -> list[float]:
    """How good one annotator of this kind finds each answer. truth: the gold of each."""
    if kind == "random":
        return [rng.random() for _ in responses]
    if kind == "short":
        return [-len(response) for response in responses]
    sign = {"careful": 1, "adversarial": -1}[kind]
    return [sign * (value + rng.gauss(0, noise)) for value in truth]


def annotate(prompt: str, responses: list[str], rng: random.Random, finished: list[bool] | None = None,
             panel: Panel = Panel()) -> dict:
    """One row of comparisons. `annotators` holds each annotator's ranks, `ranks` their consensus. `finished` says which
    responses ended with EOS, and is written only if one did not."""
    truth = gold([prompt] * len(responses), responses)
    annotators = [ranking(judge(kind, truth, responses, rng, panel.noise)) for kind in panel.annotators]
    row = {"prompt": prompt, "responses": responses, "ranks": consensus(annotators, panel.consensus)}
    if finished and not all(finished):
        row["finished"] = finished
    return row | {"annotators": annotators}


def agreement(rows: list[dict]) -> float:
    """How often two annotators put two answers in the same order: the mean over all pairs of annotators and all pairs
    of answers to the same prompt that differ in gold. nan with a single annotator."""
    same = []
    for row in rows:
        truth = gold([row["prompt"]] * len(row["responses"]), row["responses"])
        for i, j in combinations(range(len(truth)), 2):
            if truth[i] != truth[j]:
                same += [(first[i] < first[j]) == (second[i] < second[j])
                         for first, second in combinations(row["annotators"], 2)]
    return sum(same) / len(same) if same else math.nan


def sample(model_folders: list[str], prompts: list[str], K: int, seed: int) -> list[list[tuple[str, bool]]]:
    """K answers to each prompt, as many of each model, each with whether the model ended it with EOS."""
    each = K // len(model_folders)
    of_models = [sample_one(folder, prompts, each, seed) for folder in model_folders]
    return [[answer for answers in of_prompt for answer in answers] for of_prompt in zip(*of_models)]


def sample_one(model_folder: str, prompts: list[str], K: int, seed: int) -> list[list[tuple[str, bool]]]:
    """K answers of one model to each prompt."""
    tokenizer, model = load_tokenizer(model_folder), from_pretrained(model_folder)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(K)]
    stop = parse_stop("", tokenizer)
    answers = respond(model, ids, limit=MAX_RESPONSE, stop=stop, rng=generator(seed), progress="answers")
    texts = [(decode(tokenizer, tokens), finished) for tokens, finished in answers]
    return [texts[i:i + K] for i in range(0, len(texts), K)]


def read_prompts(path: Path, n: int) -> list[str]:
    """The first n prompts of a file. If it has fewer, they repeat, and a prompt gets several sets of answers."""
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [prompts[i % len(prompts)] for i in range(n)]


def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Lets simulated annotators rank sampled answers.")
    kinds = ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
    rules = ", ".join(f"{rule} ({what})" for rule, what in CONSENSUS.items())
    parser.add_argument("--model", nargs="+", default=["out/sft"],
                        help="the model to sample from; several share the answers to a prompt [out/sft]")
    parser.add_argument("--n", type=int, default=4000, help="number of training prompts")
    parser.add_argument("--n_test", type=int, default=512, help="number of held-out prompts; 0 writes no such file")
    parser.add_argument("--k", type=int, default=4, help="answers per prompt")
    parser.add_argument("--annotators", nargs="+", choices=KINDS, default=Panel().annotators, metavar="KIND",
                        help=f"one or more: {kinds} [careful careful careful]")
    parser.add_argument("--noise", type=float, default=NOISE,
                        help="standard deviation of a judgement, in units of gold [%(default)s]")
    parser.add_argument("--consensus", choices=CONSENSUS, default="sum",
                        help=f"how several rankings become one: {rules} [%(default)s]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args(argv)
    if args.k % len(args.model):
        parser.error(f"--k {args.k}: {len(args.model)} models cannot share that many answers equally")
    return args


def main(argv=None):
    args = arguments(argv)
    panel = Panel(tuple(args.annotators), args.noise, args.consensus)
    splits = (("prompts.jsonl", "comparisons.jsonl", args.n, args.seed),
              ("prompts_test.jsonl", "comparisons_test.jsonl", args.n_test, args.seed + 1))
    for source, target, n, seed in splits:
        if n == 0:
            continue
        rng = random.Random(seed)
        prompts = read_prompts(HERE / source, n)
        rows = []
        for prompt, answers in zip(prompts, sample(args.model, prompts, args.k, seed), strict=True):
            responses, finished = map(list, zip(*answers))
            rows.append(annotate(prompt, responses, rng, finished, panel))
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / target, (line.encode() for line in lines))
        print(f"{args.out / target}: {len(rows)} rows, annotators agree on {agreement(rows):.3f} of the pairs")


if __name__ == "__main__":
    run_main(main)
