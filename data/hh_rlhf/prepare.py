"""Anthropic's HH-RLHF -> comparisons, demonstrations (the chosen answers) and prompts.

    python data/hh_rlhf/prepare.py [--subset harmless-base ...] [--source FILE [--test FILE]] [--out out/data/hh_rlhf]
                                   [--heldout 0.05] [--seed 1] [--last_turn]

Without --source this downloads the train and test file of each subset (MIT): harmless-base, helpful-base,
helpful-online, helpful-rejection-sampled. FILE is one such file, .jsonl or .jsonl.gz, with rows {"chosen", "rejected"}
of two whole dialogues.

A dialogue is split after its last "\\n\\nAssistant:", which ends the prompt. The answer keeps its leading space
and ends where the human speaks again.
The data contain several turns of the same conversation. So that no conversation is in both splits, rows are split by
their opening, the text before the first answer. With Anthropic's own test files, training rows whose opening is also in
a test file are dropped. --last_turn then keeps only the human's last turn of each prompt, which fits small limits.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.common import arguments, fetch, split, write_folder
from minirlhf.files.download import HUB
from minirlhf.files.errors import UserError, run_main
from minirlhf.files.formats import ASSISTANT, HUMAN, last_answer
from minirlhf.files.jsonl import keep, read_objects, text_field

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def comparison(value, where, counts):
    """One comparison, or the reason to drop it."""
    (prompt, chosen, more), (other, rejected, more_of_other) = (last_answer(text_field(value, name, where))
                                                                for name in ("chosen", "rejected"))
    if not prompt.removesuffix(ASSISTANT).strip():
        return "no prompt before the last answer"
    if prompt != other:
        return "the two sides have different prompts"
    counts["kept, without what the human says after the answer"] += bool(more or more_of_other)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read(paths, counts):
    """The comparisons of some files. What is odd about those that are kept is counted."""
    rows = keep((comparison(value, where, counts) for path in paths for where, value in read_objects(path)), counts)
    for row in rows:
        counts["kept, with an empty answer"] += not (row["chosen"].strip() and row["rejected"].strip())
        counts["kept, with two identical answers"] += row["chosen"] == row["rejected"]
    return rows


def demonstrations(rows, counts):
    """The chosen answers, except those that are empty."""
    good = [row for row in rows if row["chosen"].strip()]
    counts["no demonstration: the chosen answer is empty"] += len(rows) - len(good)
    return [{"prompt": row["prompt"], "response": row["chosen"]} for row in good]


def opening(row):
    return row["prompt"].partition(ASSISTANT)[0]


def cut(row):
    """The row without what comes before the human's last turn."""
    return row | {"prompt": HUMAN + row["prompt"].rpartition(HUMAN)[2]}


def sources(args):
    """The training files and the test files. There are no test files for a --source without --test."""
    if args.test and not args.source:
        raise UserError("--test needs --source: name the training file too")
    if args.source:
        return [args.source], [args.test] if args.test else []
    url = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/main"
    return [[fetch(f"{url}/{subset}/{part}.jsonl.gz", f"hh_rlhf/{subset}/{part}.jsonl.gz") for subset in args.subset]
            for part in ("train", "test")]


def main(argv=None):
    parser = arguments(__doc__.splitlines()[0], "out/data/hh_rlhf")
    parser.add_argument("--subset", nargs="+", choices=SUBSETS, default=SUBSETS[:1], help="to download [harmless-base]")
    parser.add_argument("--test", type=Path, metavar="FILE", help="a test file that you have, instead of --heldout")
    parser.add_argument("--last_turn", action="store_true", help="leave out the dialogue before the human's last turn")
    args = parser.parse_args(argv)
    (train_files, test_files), counts = sources(args), Counter()
    train, test = read(train_files, counts), read(test_files, counts)
    if test_files:
        tested, n = set(map(opening, test)), len(train)
        train = [row for row in train if opening(row) not in tested]
        counts["dropped: a training row whose conversation is in the test split"] += n - len(train)
    else:
        train, test = split(train, args.heldout, args.seed, key=opening)
    if args.last_turn:
        test, n = list(map(cut, test)), len(train)
        tested = {row["prompt"] for row in test}
        train = [row for row in map(cut, train) if row["prompt"] not in tested]
        counts["dropped: a training row whose last turn is in the test split"] += n - len(train)
    splits = {"comparisons": (train, test),
              "demonstrations": (demonstrations(train, counts), demonstrations(test, counts))}
    meta = {"template": HUMAN + " {instruction}" + ASSISTANT, "licence": "MIT, Anthropic", "seed": args.seed,
            "heldout": "the test files" if test_files else args.heldout}
    write_folder(args.out, splits, meta, [*train_files, *test_files], counts)


if __name__ == "__main__":
    run_main(main)
