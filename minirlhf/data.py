"""Demonstrations, comparisons and prompts: JSONL, one object a line, read strictly.

    demonstrations   {"prompt", "response"}
    comparisons      {"prompt", "chosen", "rejected"}                       a pair, or
                     {"prompt", "responses": [K], "ranks": [2, 1, 3, 3]}    1 is best, equal is a tie, or
                     {"prompt", "responses": [K], "best": 2}                counted from 0; nothing is said of the others
                     optional "finished": [true, ...]: an unfinished response gets no EOS when it is read back
    prompts          {"prompt"}

Extra fields are kept out of the way and ignored. Every error is a UserError that names file and line.
`python -m minirlhf.data FILE ...` validates and describes files, and counts the prompts that two of them share.
"""

import re
import statistics
from itertools import combinations
from typing import NamedTuple

import torch

from minirlhf.running.config import Parser
from minirlhf.running.errors import UserError, run_main, shown
from minirlhf.files.tensors import strict_json
from minirlhf.files.tokenizer import load_tokenizer


LONG_SPACE = re.compile(r"(?<!\s)\s{100000}")     # tiktoken 0.14 crashes at 999,999 of them with something behind


class Row(NamedTuple):
    """One line of a file: demonstrations have one response, comparisons K, prompts none."""
    where: str                      # "file:line", for error messages
    prompt: str
    responses: tuple = ()           # K texts
    ranks: tuple = ()               # K ints, 1 is best, equal is a tie
    finished: tuple = ()            # K bools


class Example(NamedTuple):
    """A row as token ids."""
    row: Row
    prompt: list                    # token ids
    responses: list                 # K lists of token ids, each with its EOS if it is finished


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_jsonl(path):
    """Yields (where, object) for every line; UserError if the file or a line is not what it should be."""
    try:
        lines = open(path, "rb")
    except (OSError, ValueError) as error:                      # ValueError: a name with NUL in it
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            yield f"{path}:{number}", json_object(line, f"{path}:{number}")


def json_object(line, where):
    """One line of a file, bytes -> dict."""
    try:
        value = strict_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a line must be an object like {{\"prompt\": ...}}, not {line[:40]!r}")
    return value


def text(value, name, where):
    """A string field that UTF-8 can hold and the tokenizer can cut."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, not {shown(value)}")
    if LONG_SPACE.search(value):
        raise UserError(f"{where}: {name} has 100,000 white-space characters in a row, on which the tokenizer would give up")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is not a character") from None
    return value


def field(value, name, where):
    if name not in value:
        raise UserError(f"{where}: no \"{name}\" (found: {', '.join(value) or 'nothing'})")
    return value[name]


def prompt_of(value, where):
    prompt = text(field(value, "prompt", where), "prompt", where)
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    return prompt


def rows_of(path, row):
    rows = [row(value, where) for where, value in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: the file is empty")
    return rows


def read_prompts(path):
    return rows_of(path, lambda value, where: Row(where, prompt_of(value, where)))


def read_demonstrations(path):
    def row(value, where):
        response = text(field(value, "response", where), "response", where)
        if not response:
            raise UserError(f"{where}: the response is empty; a demonstration must show something")
        return Row(where, prompt_of(value, where), (response,), (1,), (True,))
    return rows_of(path, row)


def read_comparisons(path):
    return rows_of(path, comparison)


def comparison(value, where):
    """One comparison in any of its three forms -> Row with ranks."""
    prompt = prompt_of(value, where)
    forms = [form for form in (("chosen", "rejected"), ("ranks",), ("best",)) if any(name in value for name in form)]
    if len(forms) > 1:
        raise UserError(f"{where}: says twice who is better, with {' and '.join(form[0] for form in forms)}; keep one of them")
    if "chosen" in value or "rejected" in value:
        responses, ranks = [field(value, "chosen", where), field(value, "rejected", where)], [1, 2]
    else:
        responses = field(value, "responses", where)
        if not isinstance(responses, list) or len(responses) < 2:
            raise UserError(f"{where}: responses must be a list of at least two")
        ranks = ranks_of(value, len(responses), where)
    responses = tuple(text(response, "response", where) for response in responses)
    finished = value.get("finished", [True] * len(responses))
    if not is_list_of(bool, finished, len(responses)):
        raise UserError(f"{where}: finished must be a list of {len(responses)} true or false")
    return Row(where, prompt, responses, tuple(ranks), tuple(finished))


def ranks_of(value, K, where):
    if "best" in value:
        best = value["best"]
        if type(best) is not int or not 0 <= best < K:
            raise UserError(f"{where}: best must be a number from 0 to {K - 1}, not {shown(best)}")
        return [1 if k == best else 2 for k in range(K)]
    ranks = field(value, "ranks", where)
    if not is_list_of(int, ranks, K) or min(ranks) != 1 or max(ranks) > K:
        raise UserError(f"{where}: ranks must be a list of {K} whole numbers from 1 (the best) to {K}, not {shown(ranks)}")
    return ranks


def is_list_of(kind, value, length):
    return isinstance(value, list) and len(value) == length and all(type(item) is kind for item in value)


# ---- token ids -------------------------------------------------------------------------------------------------------

def encode(tokenizer, prompt, response, finished=True):
    """Prompt ids and response ids; the response ends in exactly one EOS if it is finished.

    Tokenised apart, so that a prompt's ids do not depend on its response; the response's leading space is part of it.
    encode_ordinary: text that says "<|endoftext|>" is seven tokens of text, never an EOS.
    """
    eos = [tokenizer.eot_token] if finished else []
    return tokenizer.encode_ordinary(prompt), tokenizer.encode_ordinary(response) + eos


def decode(tokenizer, ids):
    """The text of a response; its EOS is no part of it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eot_token else ids)


def encode_rows(rows, tokenizer, positions, max_prompt=0, max_response=0, reserve=0, drop_long=False):
    """Rows -> Examples. What does not fit is an error that names the line, or is dropped and counted if drop_long.

    positions: how many the model has; reserve: how many of them are kept for a response to be sampled.
    max_prompt, max_response: limits in tokens, 0 for none but the model's.
    """
    examples, too_long = [], []
    for row in rows:
        prompt = tokenizer.encode_ordinary(row.prompt)
        responses = [encode(tokenizer, row.prompt, *each)[1] for each in zip(row.responses, row.finished)]
        longest = max(map(len, responses), default=0)
        for what, length, limit in (("prompt", len(prompt), max_prompt or positions),
                                    ("response", longest, max_response or positions),
                                    ("prompt and response", len(prompt) + longest + reserve, positions)):
            if length > limit:
                too_long.append(f"{row.where}: {what} of {length} tokens, more than {limit}")
                break
        else:
            examples.append(Example(row, prompt, responses))
    if too_long and not drop_long:
        raise UserError(f"{too_long[0]} (and {len(too_long) - 1} more rows); shorten them, raise the limit, "
                        "or give --drop_long")
    if too_long:
        print(f"dropped {len(too_long)} of {len(rows)} rows as too long, the first: {too_long[0]}")
    if not examples:
        raise UserError(f"{rows[0].where}: no row is left after dropping the long ones")
    return examples


# ---- batches ---------------------------------------------------------------------------------------------------------
# B sequences, T = the longest of them. Masks come from lengths; the pad id, 0, is never looked at.

def right_pad(sequences, device="cpu"):
    """Lists of ids -> ids (B, T) int64 and mask (B, T) bool."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    T = int(lengths.max())
    ids = torch.tensor([list(ids) + [0] * (T - len(ids)) for ids in sequences], device=device)
    return ids, torch.arange(T, device=device) < lengths[:, None]


def left_pad(sequences, device="cpu"):
    """The same with the pads before the tokens, so that what is sampled next stands in one column."""
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    T = int(lengths.max())
    ids = torch.tensor([[0] * (T - len(ids)) + list(ids) for ids in sequences], device=device)
    return ids, torch.arange(T, device=device) >= T - lengths[:, None]


def response_mask(mask, prompt_lengths):
    """mask (B, T) of right-padded prompt + response -> True at the response's tokens only, the EOS included."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return mask & (columns >= torch.tensor(prompt_lengths, device=mask.device)[:, None])


# ---- python -m minirlhf.data FILE ------------------------------------------------------------------------------------

def read_any(path):
    """Reads a file by the schema that its first line shows -> (schema, rows)."""
    _, first = next(read_jsonl(path), ("", {}))
    if "response" in first:
        return "demonstrations", read_demonstrations(path)
    if {"responses", "chosen", "rejected"} & set(first):
        return "comparisons", read_comparisons(path)
    return "prompts", read_prompts(path)


def describe(path, tokenizer):
    """Prints what a reader wants to know of a file before training on it; returns its prompts, a set."""
    schema, rows = read_any(path)
    examples, prompts = encode_rows(rows, tokenizer, positions=10**9), {row.prompt for row in rows}
    print(f"{path}: {len(rows):,} {schema}, {len(prompts):,} different prompts")
    sizes = {"prompt": [len(example.prompt) for example in examples],
             "response": [len(ids) for example in examples for ids in example.responses]}
    for name, lengths in sizes.items():
        if lengths:
            cuts = statistics.quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else lengths * 99
            shown = ", ".join(f"{percent} % up to {cuts[percent - 1]:.0f}" for percent in (10, 50, 90, 95, 99))
            print(f"{name:>10} tokens: {shown}, longest {max(lengths)}")
    print(f"{'':>10} {len(rows) - len({row[1:] for row in rows})} rows repeat an earlier one")
    if schema == "comparisons":
        ties = sum(len(set(row.ranks)) == 1 for row in rows)
        same = sum(len(set(row.responses)) < len(row.responses) for row in rows)
        empty = sum("" in map(str.strip, row.responses) for row in rows)
        print(f"{'':>10} {ties} rows are all ties, {same} have identical answers, {empty} an empty answer")
    for name, ids in [("prompt", examples[0].prompt)] + [("response", ids) for ids in examples[0].responses]:
        print(f"{name:>10} {pieces(ids, tokenizer)}")
    return prompts


def pieces(ids, tokenizer, most=60):
    """Token ids as text with a bar between them; bytes that are no whole character are shown as \\x.."""
    shown = [tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace") for token in ids[:most]]
    return repr("|".join(shown)).replace("\\\\x", "\\x") + (f" and {len(ids) - most} more" if len(ids) > most else "")


def main():
    parser = Parser(prog="python -m minirlhf.data", description="Validates JSONL files and describes "
                    "them; of several it counts the prompts that they share.")
    parser.add_argument("file", nargs="+")
    parser.add_argument("--tokenizer", default="data/tiny", help="a model's name or folder [data/tiny]")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    prompts = {file: describe(file, tokenizer) for file in args.file}
    for first, second in combinations(prompts, 2):
        print(f"{len(prompts[first] & prompts[second]):>6,} prompts are in both {first} and {second}")


if __name__ == "__main__":
    run_main(main)
