"""`python -m minirlhf.data FILE ...`: checks JSONL files and prints what to know before training on them."""

from itertools import combinations

import numpy

from minirlhf.data import encode_rows, read_any
from minirlhf.files.jsonl import glue_warning, glued
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.config import Parser

PERCENTS = (10, 50, 90, 95, 99)


def describe(path, tokenizer):
    """Prints the size, lengths and oddities of a file, and its first row; returns the set of its prompts."""
    schema, rows = read_any(path)
    examples, prompts = encode_rows(rows, tokenizer, positions=10**9), {row.prompt for row in rows}
    print(f"{path}: {len(rows):,} {schema}, {len(prompts):,} different prompts")
    print_lengths("prompt", [len(example.prompt) for example in examples])
    print_lengths("response", [len(ids) for example in examples for ids in example.responses])
    note(f"{len(rows) - len({row[1:] for row in rows})} rows repeat an earlier one")
    if schema == "comparisons":
        ties = sum(len(set(row.ranks)) == 1 for row in rows)
        same = sum(len(set(row.responses)) < len(row.responses) for row in rows)
        empty = sum("" in map(str.strip, row.responses) for row in rows)
        note(f"{ties} rows are all ties, {same} have identical answers, {empty} an empty answer")
    if schema != "prompts":
        note(glue_warning(rows) or f"{len(glued(rows))} rows have no space between prompt and response")
    for name, ids in [("prompt", examples[0].prompt)] + [("response", ids) for ids in examples[0].responses]:
        print(f"{name:>10} {pieces(ids, tokenizer)}")
    return prompts


def note(sentence):
    print(f"{'':>10} {sentence}")


def print_lengths(name, lengths):
    if lengths:
        cuts = zip(PERCENTS, numpy.percentile(lengths, PERCENTS))
        percentiles = ", ".join(f"{percent} % up to {length:.0f}" for percent, length in cuts)
        print(f"{name:>10} tokens: {percentiles}, longest {max(lengths)}")


def pieces(ids, tokenizer, most=60):
    """Token ids as text with a bar between them. Bytes that are no whole character are shown as \\x.."""
    tokens = [tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace") for token in ids[:most]]
    return repr("|".join(tokens)).replace("\\\\x", "\\x") + (f" and {len(ids) - most} more" if len(ids) > most else "")


def main():
    parser = Parser(prog="python -m minirlhf.data", description="Checks and describes JSONL files. "
                    "Given several, it counts the prompts that each two of them share.")
    parser.add_argument("file", nargs="+")
    parser.add_argument("--tokenizer", default="data/tiny", help="a model's name or folder [data/tiny]")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    prompts = {file: describe(file, tokenizer) for file in args.file}
    for first, second in combinations(prompts, 2):
        print(f"{len(prompts[first] & prompts[second]):>6,} prompts are in both {first} and {second}")
