"""What self-instruct is worth in the embedded world, where the true preference is known.

    python data/tiny/self_instruct.py [--out out/self_instruct] [--originals 200 1000] [--seeds 1 2 3] [--writers same]

For each number of original demonstrations and each seed, a writer is trained: a small model that continues numbered
lists of tasks. It sees the originals only ("same"), or all 5,000 demonstrations ("stronger", the case of Stanford
Alpaca, where a much stronger model wrote). minirlhf.tools.self_instruct lets it write new demonstrations from the
originals. Then SFT is trained on the originals, and on originals and new ones, with the same number of steps.

Prints what was generated, and what SFT made of it, and writes both to tables.md. Started again, it goes on.
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import bpe
import train_sft
from gold import PROMPTS, measure
from minirlhf.data import read_demonstrations, read_prompts
from minirlhf.files.json_files import read_json, write_json
from minirlhf.files.tokenizer import load_tokenizer, save_tokenizer
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.files.errors import run_main
from minirlhf.tools import self_instruct
from minirlhf.assess import Sampling, answer
from minirlhf.tools.self_instruct import HEADER, SHOWN, Task, encode_list
from minirlhf.weights import from_pretrained, save_pretrained

PER_REQUEST, REQUESTS = 3, 400
LISTS = {"same": 2400, "stronger": 8000}        # how many lists a writer learns from, each once
LISTS_PER_STEP = 8
READ = 8000                             # demonstrations that each SFT reads in all, so all take as many steps
WRITERS = ("none", "same", "stronger")
SHOWN_NUMBERS = ("gold", "attributes_right", "grammatical")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}     # Student's t, 95 %, for the mean of so many seeds


def write_rows(path, rows):
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def train(out, *words, **flags):
    """One run of train_sft.py, unless it is there already."""
    if not (out / "report.json").exists():
        train_sft.main([*words, *(f"--{name}={value}" for name, value in {**flags, "heldout": "", "out": out}.items())])
    return out


def train_writer(out, rows, n_lists, seed):
    """A new model that learns to write lists of tasks made of these demonstrations."""
    rng, n = random.Random(seed), SHOWN + PER_REQUEST
    tasks = [Task(row["prompt"], "", row["response"].strip()) for row in rows]
    head = HEADER.format(last=n) + "###\n1. Instruction:"
    lists = [HEADER.format(last=n) + encode_list(rng.sample(tasks, n)) + "###" for _ in range(n_lists)]
    out.mkdir(parents=True, exist_ok=True)
    data = write_rows(out / "lists.jsonl", [{"prompt": head, "response": text.removeprefix(head)} for text in lists])
    bpe.save(bpe.train(lists[:200], 767), out / "vocab.tiktoken")       # its own, in which the list is short
    tokenizer = load_tokenizer(out)
    torch.manual_seed(seed)
    positions = 8 + max(len(tokenizer.encode_ordinary(text)) for text in lists) * 5 // 4
    save_pretrained(GPT2(GPT2Config(tokenizer.n_vocab, **{**train_sft.TINY, "n_positions": positions})), out / "new")
    save_tokenizer(tokenizer, out / "new")
    return train(out / "model", model=out / "new", data=data, epochs=1, batch_size=LISTS_PER_STEP,
                 micro_batch=LISTS_PER_STEP, seed=seed)


def generate(out, writer, seeds_file, seed):
    """The new demonstrations of a writer, without those whose request is in the test set, and what is known of them."""
    if not (out / "demonstrations.jsonl").exists():
        positions = from_pretrained(str(writer)).config.n_positions
        self_instruct.main(["--seed_tasks", str(seeds_file), "--model", str(writer), "--requests", str(REQUESTS),
                            "--per_request", str(PER_REQUEST), "--max_tokens", str(positions // 2), "--batch_size",
                            "100", "--banned", "", "--most_similar", "0.99", "--seed", str(seed), "--out", str(out)])
    rows = [{"prompt": row.prompt, "response": row.responses[0]}
            for row in read_demonstrations(out / "demonstrations.jsonl")]
    tested = {row.prompt for row in read_prompts(HERE / "prompts_test.jsonl")}
    return [row for row in rows if row["prompt"] not in tested], read_json(out / "meta.json")["counts"]


def quality(rows):
    """Of generated demonstrations: how many requests are of this world, and the means over their stories."""
    valid = [row for row in rows if row["prompt"] in PROMPTS]
    prompts, stories = [row["prompt"] for row in valid], [row["response"] for row in valid]
    return {"new": len(rows), "valid": len(valid) / len(rows), **(measure(prompts, stories) if valid else {})}


def assess(model):
    """Means over the answers of a model to the held-out prompts."""
    found = answer(from_pretrained(str(model)), load_tokenizer(model), read_prompts(HERE / "prompts_test.jsonl"),
                   Sampling())
    return measure(found.prompts, found.texts)


def interval(values):
    """mean ± half of the 95 % interval of Student's t over seeds."""
    n = len(values)
    half = T95.get(n, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def one(out, n, seed, writer, rows):
    """One cell of the tables: n originals, with or without new demonstrations -> its numbers, kept in result.json."""
    folder = out / f"{n}_{writer}_{seed}"
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    folder.mkdir(parents=True, exist_ok=True)
    originals = random.Random(seed).sample(rows, n)
    seeds_file = write_rows(folder / "originals.jsonl", originals)
    new, result = [], {}
    if writer != "none":
        source, known = ("stronger", rows) if writer == "stronger" else (f"writer_{n}", originals)
        model = train_writer(out / f"{source}_{seed}", known, LISTS[writer], seed)
        new, counts = generate(folder / "new", model, seeds_file, seed)
        result = {"counts": counts, "generated": quality(new)}
    data = write_rows(folder / "demonstrations.jsonl", originals + new)
    model = train(folder / "sft", "--drop_long", data=data, epochs=max(1, round(READ / (n + len(new)))), seed=seed)
    result["sft"] = assess(model)
    write_json(folder / "result.json", result)
    return result


def tables(found, sizes, seeds, writers=WRITERS):
    """Markdown: what the writers wrote, and SFT without and with it. found: {(n, writer, seed): result}."""
    def column(n, writer, *path):
        values = []
        for seed in seeds:
            value = found[n, writer, seed]
            for name in path:
                value = value[name]
            values.append(value)
        return values

    lines = ["| originals | writer | parsed / tasks begun | kept | requests of this world | gold | all three right | "
             "grammatical |", "|---" * 8 + "|"]
    for n in sizes:
        for writer in writers[1:]:
            begun, parsed, kept = (statistics.mean(column(n, writer, "counts", name))
                                   for name in ("blocks", "parsed", "kept"))
            cells = [interval(column(n, writer, "generated", name)) for name in ("valid", *SHOWN_NUMBERS)]
            lines.append(f"| {n:,} | {writer} | {parsed:,.0f} / {begun:,.0f} | {kept:,.0f} | {' | '.join(cells)} |")
    lines += ["", "| originals | new ones from | gold | all three right | grammatical | gold, change |",
              "|---" * 6 + "|"]
    for n in sizes:
        before = column(n, "none", "sft", "gold")
        for writer in writers:
            cells = [interval(column(n, writer, "sft", name)) for name in SHOWN_NUMBERS]
            change = [after - own for after, own in zip(column(n, writer, "sft", "gold"), before)]
            cells.append("" if writer == "none" else interval(change))
            lines.append(f"| {n:,} | {writer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/self_instruct"))
    parser.add_argument("--originals", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--writers", nargs="+", choices=WRITERS[1:], default=WRITERS[1:])
    args = parser.parse_args()
    writers = ("none", *args.writers)
    rows = [{"prompt": row.prompt, "response": row.responses[0]}
            for row in read_demonstrations(HERE / "demonstrations.jsonl")]
    found = {(n, writer, seed): one(args.out, n, seed, writer, rows)
             for n in args.originals for seed in args.seeds for writer in writers}
    text = tables(found, args.originals, args.seeds, writers)
    (args.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_main(main)
