"""Demonstrations, comparisons and prompts: reading them, encoding them, holding some out.

The files are JSONL, one object a line. Extra fields are ignored.

    demonstrations   {"prompt", "response"}
    comparisons      {"prompt", "chosen", "rejected"}                      a pair
                     {"prompt", "responses": [K], "ranks": [2, 1, 3, 3]}   1 is best, ties allowed
                     {"prompt", "responses": [K], "best": 2}               only the best, from 0
    prompts          {"prompt"}

A comparison has one of three forms. With "best", nothing is known about the order of the others.
It may also have "finished": [true, ...]. An unfinished response, one that was cut off, has no EOS.

`python -m minirlhf.data FILE ...` checks and describes files, and counts the prompts they share.
"""

import hashlib
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from minirlhf.files.errors import UserError, require, run_main
from minirlhf.files.formats import kind_of_row
from minirlhf.files.json_files import read_json
from minirlhf.files.jsonl import (begins_with_prompt, check_one_verdict, finished_field,
                                  glue_warning, glued, ranks_field, read_jsonl, responses_field,
                                  text_field)
from minirlhf.files.tokenizer import load_tokenizer, token_texts
from minirlhf.generate import generator
from minirlhf.running.config import Parser


TINY = Path(__file__).resolve().parent.parent / "data/tiny"
HELDOUT = ("rows never trained on, for the assessment. 'auto': NAME_test.jsonl beside the data "
           "NAME.jsonl, else a tenth of its prompts. Empty: none")


class Row(NamedTuple):
    """One line of a file. Demonstrations have one response, comparisons K, prompts none."""
    where: str                      # "file:line", for error messages
    prompt: str
    responses: tuple = ()           # K texts
    ranks: tuple = ()               # K ints, 1 is best, equal is a tie
    finished: tuple = ()            # K bools

    def fields(self):
        """The row as its format has it, a dict."""
        if not self.responses:
            return {"prompt": self.prompt}
        if len(self.responses) == 1:
            return {"prompt": self.prompt, "response": self.responses[0]}
        return {"prompt": self.prompt, "responses": self.responses, "ranks": self.ranks,
                "finished": self.finished}


class Example(NamedTuple):
    """A row as token ids."""
    row: Row
    prompt: list                    # token ids
    responses: list                 # K lists of token ids; finished ones end in EOS


# ---- reading: one function for a line of each format ---------------------------------------------

def prompt_only(value, where):
    return Row(where, text_field(value, "prompt", where, allow_empty=False))


def demonstration(value, where):
    prompt, response = (text_field(value, name, where, allow_empty=False)
                        for name in ("prompt", "response"))
    return Row(where, prompt, (response,), ranks=(1,), finished=(True,))


def comparison(value, where):
    """Any of the three forms -> Row. A response may be empty, since a model can sample that."""
    prompt = text_field(value, "prompt", where, allow_empty=False)
    check_one_verdict(value, where)
    if "chosen" in value or "rejected" in value:
        responses = tuple(text_field(value, name, where) for name in ("chosen", "rejected"))
        ranks = (1, 2)
    else:
        responses = responses_field(value, where)
        ranks = ranks_field(value, len(responses), where)
    return Row(where, prompt, responses, ranks, finished_field(value, len(responses), where))


def read_rows(path, to_row):
    rows = [to_row(value, where) for where, value in read_jsonl(path)]
    require(rows, f"{path}: the file is empty")
    return rows


def read_prompts(path):
    return read_rows(path, prompt_only)


def read_demonstrations(path):
    return read_rows(path, demonstration)


def read_comparisons(path):
    return read_rows(path, comparison)


def read_any(path):
    """Reads a file in the format that its first line shows -> (format's name, rows)."""
    _, first = next(read_jsonl(path), ("", {}))
    if "response" in first or kind_of_row(first):       # reading the latter says how to convert it
        return "demonstrations", read_demonstrations(path)
    if {"responses", "chosen", "rejected"} & set(first):
        return "comparisons", read_comparisons(path)
    return "prompts", read_prompts(path)


# ---- token ids -----------------------------------------------------------------------------------

def encode_prompt(tokenizer, prompt):
    """A prompt's ids, in the template of a chat model if it has one.

    Special tokens are those of the template only. What a person typed stays ordinary text, so
    nobody can end a turn with it.
    """
    if tokenizer.template is None:
        return tokenizer.encode_ordinary(prompt)
    before, after = (tokenizer.encode(text, allowed_special="all")
                     for text in tokenizer.template.split("{instruction}"))
    return before + tokenizer.encode_ordinary(prompt) + after


def follow_template(tokenizer, path):
    """Drops the model's template if meta.json beside the prompts has one: they are exact text."""
    meta = Path(path).with_name("meta.json")
    exact = meta.exists() and "template" in read_json(meta)
    if tokenizer.template:
        print(f"the prompts are exact text, because {meta} has a template: the model's is not used"
              if exact else f"each prompt is asked as {tokenizer.template!r}")
    tokenizer.template = None if exact else tokenizer.template


def encode(tokenizer, prompt, response, finished=True):
    """Prompt ids and response ids. A finished response ends in exactly one EOS.

    The two are tokenized separately, so that a prompt's ids do not depend on its response. The
    response's leading space is part of the response. encode_ordinary reads "<|endoftext|>" in a
    text as seven tokens of text, so no text can contain an EOS.
    """
    eos = [tokenizer.eot_token] if finished else []
    return encode_prompt(tokenizer, prompt), tokenizer.encode_ordinary(response) + eos


def encode_rows(rows, tokenizer, positions, max_prompt=0, max_response=0, reserve=0,
                drop_long=False):
    """Rows -> Examples. A row that does not fit is an error, or dropped and counted if drop_long.

    positions: how many tokens the model can read; reserve: how many of them are kept free for a
    response to be sampled; max_prompt, max_response: further limits in tokens, 0 for none.
    """
    for flag, limit in (("--max_prompt", max_prompt), ("--max_response", max_response)):
        require(limit <= positions,
                f"{flag} {limit}: this model has {positions} positions. Lower it")
    limits = max_prompt or positions, max_response or positions, positions
    examples, too_long = [], []
    for row in rows:
        prompt = encode_prompt(tokenizer, row.prompt)
        responses = [encode(tokenizer, row.prompt, *each)[1]
                     for each in zip(row.responses, row.finished)]
        example = Example(row, prompt, responses)
        problem = over_limit(example, limits, reserve)
        if problem:
            too_long.append(problem)
        else:
            examples.append(example)
    if too_long and not drop_long:
        raise UserError(f"{too_long[0]}. {len(too_long):,} of {len(rows):,} rows are too long: "
                        "shorten them, raise the limit, or drop them with --drop_long")
    require(examples, f"{rows[0].where}: no row is left after dropping the long ones")
    if too_long:
        print(f"dropped {len(too_long):,} of {len(rows):,} rows as too long, "
              f"the first: {too_long[0]}")
    return examples


def over_limit(example, limits, reserve):
    """Says which length of an example is above its limit; None if the example fits."""
    prompt, response = len(example.prompt), max(map(len, example.responses), default=0)
    names = "prompt", "response", "prompt and response"
    for name, length, limit in zip(names, (prompt, response, prompt + response + reserve), limits):
        if length > limit:
            return f"{example.row.where}: {name} of {length} tokens, more than {limit}"
    return None


def batch_at(items, size, step, *numbers):
    """The batch of this step: `size` items from an endless stream of permutations, one per pass.

    numbers: the seed and the purpose of the draw. A step's batch does not depend on those before.
    """
    rows = range(step * size, (step + 1) * size)
    order = {epoch: torch.randperm(len(items), generator=generator(*numbers, epoch))
             for epoch in {row // len(items) for row in rows}}
    return [items[order[row // len(items)][row % len(items)]] for row in rows]


# ---- a script's data -----------------------------------------------------------------------------

def load_examples(cfg, read, tokenizer, positions, reserve=0):
    """The rows of --data to train on, and those held out, as Examples. Resolves cfg.heldout."""
    rows, heldout = split(cfg, read(cfg.data), read)
    follow_template(tokenizer, cfg.data)
    cfg.model_template = tokenizer.template             # for run.json
    if tokenizer.template is None and (warning := glue_warning(rows)):
        print(f"warning: {warning}")
    limits = dict(positions=positions, max_prompt=cfg.max_prompt, max_response=cfg.max_response,
                  reserve=reserve, drop_long=cfg.drop_long)
    examples = encode_rows(rows, tokenizer, **limits)
    return examples, encode_rows(heldout, tokenizer, **limits) if heldout else []


def split(cfg, rows, read):
    """(rows to train on, held-out rows), as --heldout says.

    Which prompts "auto" holds out depends only on their text. So the reward model and PPO hold out
    the same ones, and no prompt that the reward model has seen is assessed.
    """
    if cfg.heldout != "auto":
        return rows, read(cfg.heldout) if cfg.heldout else []
    test_file = Path(cfg.data).with_name(f"{Path(cfg.data).stem}_test.jsonl")
    if test_file.is_file():
        print(f"held-out rows: {test_file}")
        cfg.heldout = str(test_file)
        return rows, read(test_file)
    prompts = {row.prompt for row in rows}
    chosen = held_out_prompts(prompts)
    if chosen == prompts:
        print(f"{cfg.data}: too few different prompts to hold any out")
        cfg.heldout = ""
        return rows, []
    cfg.heldout = str(Path(cfg.out) / "heldout.jsonl")
    few = ". So few say little: --heldout FILE names more" if len(chosen) < 10 else ""
    print(f"{len(chosen):,} of {len(prompts):,} prompts are held out, kept in {cfg.heldout}{few}")
    return ([row for row in rows if row.prompt not in chosen],
            [row for row in rows if row.prompt in chosen])


def held_out_prompts(prompts, one_in=10):
    """About one prompt in ten, at least one. Which ones they are depends only on their text."""
    digests = {prompt: int(hashlib.sha256(prompt.encode()).hexdigest(), 16) for prompt in prompts}
    chosen = {prompt for prompt in prompts if digests[prompt] % one_in == 0}
    return chosen or {min(prompts, key=digests.get)}


# ---- python -m minirlhf.data FILE ... ------------------------------------------------------------

def describe(path, tokenizer):
    """Prints the size, lengths and oddities of a file, and its first row. Returns its prompts."""
    schema, rows = read_any(path)
    examples = encode_rows(rows, tokenizer, positions=10**9)
    prompts = {row.prompt for row in rows}
    print(f"{path}: {len(rows):,} {schema}, {len(prompts):,} different prompts")
    print_lengths("prompt", [len(example.prompt) for example in examples])
    print_lengths("response", [len(ids) for example in examples for ids in example.responses])
    notes = [f"{len(rows) - len({row[1:] for row in rows})} rows repeat an earlier one"]
    if schema == "comparisons":
        ties = sum(len(set(row.ranks)) == 1 for row in rows)
        same = sum(len(set(row.responses)) < len(row.responses) for row in rows)
        empty = sum("" in map(str.strip, row.responses) for row in rows)
        notes.append(f"{ties} rows are all ties, {same} have identical answers, "
                     f"{empty} an empty answer")
    copies = [row for row in rows
              if any(begins_with_prompt(text, row.prompt) for text in row.responses)]
    if copies:
        notes.append(f"warning: {len(copies):,} rows have a response that begins with its prompt "
                     f"(the first: {copies[0].where}). The model would read the prompt twice")
    if schema != "prompts":
        notes.append(glue_warning(rows) or f"{len(glued(rows))} rows have no space between prompt "
                     "and response")
    for sentence in notes:
        print(f"{'':>10} {sentence}")
    print(f"{'prompt':>10} {pieces(examples[0].prompt, tokenizer)}")
    for ids in examples[0].responses:
        print(f"{'response':>10} {pieces(ids, tokenizer)}")
    return prompts


def print_lengths(name, lengths):
    if lengths:
        percents = (10, 50, 90, 95, 99)
        cuts = zip(percents, numpy.percentile(lengths, percents))
        said = ", ".join(f"{percent} % up to {length:.0f}" for percent, length in cuts)
        print(f"{name:>10} tokens: {said}, longest {max(lengths)}")


def pieces(ids, tokenizer, most=60):
    """Token ids as text with a bar between them."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return repr("|".join(token_texts(tokenizer, ids[:most]))) + more


def main():
    parser = Parser(prog="python -m minirlhf.data", description="Checks and describes JSONL files. "
                    "Given several, it counts the prompts that each two of them share.")
    parser.add_argument("file", nargs="+")
    parser.add_argument("--tokenizer", default="data/tiny",
                        help="a model's name or folder [%(default)s]")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    prompts = {file: describe(file, tokenizer) for file in args.file}
    for first, second in combinations(prompts, 2):
        shared = len(prompts[first] & prompts[second])
        print(f"{shared:>6,} prompts are in both {first} and {second}")


if __name__ == "__main__":
    run_main(main)
