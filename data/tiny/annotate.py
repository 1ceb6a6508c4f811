"""Simulated annotators: they all want the same thing, but each judges with some noise.

    python data/tiny/annotate.py [--model out/sft] [--n 4000] [--n_test 512] [--k 4] [--seed 1] [--out data/tiny]

samples K answers to each prompt from the model, lets the annotators rank them, and writes comparisons.jsonl (training
prompts) and comparisons_test.jsonl (held-out prompts).
"""

import argparse
import json
import random
import sys
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from gold import gold
from minirlhf.data import stop_of
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.generate import decode, respond
from minirlhf.running.compute import generator
from minirlhf.weights import from_pretrained

N_ANNOTATORS = 3
MAX_RESPONSE = 48   # tokens; a story has at most 34
NOISE = 0.115       # standard deviation of one judgement: two annotators then agree on about 80 % of the pairs


def ranking(values: list[float]) -> list[int]:
    """The rank of each value. The largest gets 1, and equal values share a rank."""
    order = sorted(set(values), reverse=True)
    return [1 + order.index(value) for value in values]


def annotate(prompt: str, responses: list[str], rng: random.Random, finished: list[bool] | None = None) -> dict:
    """One row of comparisons. `annotators` holds each annotator's ranks. `ranks` is their consensus: the sums of those
    ranks, ranked again. `finished` says which responses ended with EOS, and is written only if one did not."""
    truth = gold([prompt] * len(responses), responses)
    annotators = [ranking([value + rng.gauss(0, NOISE) for value in truth]) for _ in range(N_ANNOTATORS)]
    row = {"prompt": prompt, "responses": responses, "ranks": ranking([-sum(ranks) for ranks in zip(*annotators)])}
    if finished and not all(finished):
        row["finished"] = finished
    return row | {"annotators": annotators}


def agreement(rows: list[dict]) -> float:
    """How often two annotators put two answers in the same order: the mean over all pairs of annotators and all pairs
    of answers to the same prompt that differ in gold."""
    same = []
    for row in rows:
        truth = gold([row["prompt"]] * len(row["responses"]), row["responses"])
        for i, j in combinations(range(len(truth)), 2):
            if truth[i] != truth[j]:
                same += [(first[i] < first[j]) == (second[i] < second[j])
                         for first, second in combinations(row["annotators"], 2)]
    return sum(same) / len(same)


def sample(model_folder: str, prompts: list[str], K: int, seed: int) -> list[list[tuple[str, bool]]]:
    """K answers of the model to each prompt, each with whether the model ended it with EOS."""
    tokenizer, model = load_tokenizer(model_folder), from_pretrained(model_folder)
    ids = [tokenizer.encode_ordinary(prompt) for prompt in prompts for _ in range(K)]
    stop = stop_of("", tokenizer)
    answers = respond(model, ids, R=MAX_RESPONSE, stop=stop, rng=generator(seed), progress="answers")
    texts = [(decode(tokenizer, tokens), finished) for tokens, finished in answers]
    return [texts[i:i + K] for i in range(0, len(texts), K)]


def read_prompts(path: Path, n: int) -> list[str]:
    """The first n prompts of a file. If it has fewer, they repeat, and a prompt gets several sets of answers."""
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [prompts[i % len(prompts)] for i in range(n)]


def main():
    parser = argparse.ArgumentParser(description="Lets simulated annotators rank sampled answers.")
    parser.add_argument("--model", default="out/sft", help="the model to sample from")
    parser.add_argument("--n", type=int, default=4000, help="number of training prompts")
    parser.add_argument("--n_test", type=int, default=512, help="number of held-out prompts")
    parser.add_argument("--k", type=int, default=4, help="answers per prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    splits = (("prompts.jsonl", "comparisons.jsonl", args.n, args.seed),
              ("prompts_test.jsonl", "comparisons_test.jsonl", args.n_test, args.seed + 1))
    for source, target, n, seed in splits:
        rng = random.Random(seed)
        prompts = read_prompts(HERE / source, n)
        rows = []
        for prompt, answers in zip(prompts, sample(args.model, prompts, args.k, seed), strict=True):
            responses, finished = map(list, zip(*answers))
            rows.append(annotate(prompt, responses, rng, finished))
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        (args.out / target).write_bytes("".join(lines).encode())
        print(f"{args.out / target}: {len(rows)} rows, annotators agree on {agreement(rows):.3f} of the pairs")


if __name__ == "__main__":
    main()
