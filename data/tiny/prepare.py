"""Regenerates the files of the embedded world, bit for bit, except the comparisons (annotate.py).

    python data/tiny/prepare.py [--out DIR]
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bpe
from grammar import FEMALE, MOODS, WHAT, WHO, Request, all_prompts, sample_story

SEED = 1
N_DEMONSTRATIONS = 5000
N_DEMONSTRATIONS_TEST = 512
N_HELD_OUT = 68             # of the 384 combinations of mood, who and what; 8 prompts each
MAX_RANKS = 767             # with <|endoftext|> at most 768 tokens

# The demonstrators are imperfect, as people are, so a model that imitates them is visibly mediocre.
P_HONOURED = 0.65           # each of mood, who and what, independently; otherwise another value, drawn uniformly
P_RUDE = 0.30
P_THEY = 0.25               # otherwise a gendered pronoun that nobody asked for ...
P_STEREOTYPE = 0.70         # ... which is the stereotypical one with this probability


def split_prompts(rng: random.Random) -> tuple[dict[str, Request], dict[str, Request]]:
    """Training and held-out prompts, both shuffled. No combination of mood, who and what is in both."""
    prompts = list(all_prompts().items())
    rng.shuffle(prompts)
    combinations = sorted({request for _, request in prompts})
    held_out = set(rng.sample(combinations, N_HELD_OUT))
    train = {prompt: request for prompt, request in prompts if request not in held_out}
    test = {prompt: request for prompt, request in prompts if request in held_out}
    return train, test


def demonstrate(rng: random.Random, request: Request) -> str:
    """The story that a demonstrator writes for this request."""

    def attempt(asked, options):
        return asked if rng.random() < P_HONOURED else rng.choice([option for option in options if option != asked])

    mood, who, what = attempt(request.mood, MOODS), attempt(request.who, WHO), attempt(request.what, WHAT)
    stereotype, other = ("She", "He") if who in FEMALE else ("He", "She")
    gendered = stereotype if rng.random() < P_STEREOTYPE else other
    pronoun = "They" if rng.random() < P_THEY else gendered
    return sample_story(rng, mood, who, what, pronoun, rude=rng.random() < P_RUDE)


def demonstrations(rng: random.Random, prompts: dict[str, Request], n: int) -> list[dict]:
    """n rows that go through the prompts in order and start again when they run out."""
    requests = list(prompts.items())
    rows = []
    for i in range(n):
        prompt, request = requests[i % len(requests)]
        rows.append({"prompt": prompt, "response": demonstrate(rng, request)})
    return rows


def write_jsonl(path: Path, rows: list[dict]):
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def main():
    parser = argparse.ArgumentParser(description="Regenerates the files of the embedded world.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    prompts, prompts_test = split_prompts(rng)
    rows = demonstrations(rng, prompts, N_DEMONSTRATIONS)
    rows_test = demonstrations(rng, prompts_test, N_DEMONSTRATIONS_TEST)
    write_jsonl(out / "demonstrations.jsonl", rows)
    write_jsonl(out / "demonstrations_test.jsonl", rows_test)
    write_jsonl(out / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_jsonl(out / "prompts_test.jsonl", [{"prompt": prompt} for prompt in prompts_test])

    # Prompts and responses are separate texts here, because encode() tokenizes them separately.
    ranks = bpe.train([text for row in rows for text in row.values()], MAX_RANKS)
    bpe.save(ranks, out / "vocab.tiktoken")
    print(f"{out}: {len(rows)} + {len(rows_test)} demonstrations, {len(prompts)} + {len(prompts_test)} prompts, "
          f"{len(ranks)} tokens and <|endoftext|>")


if __name__ == "__main__":
    main()
