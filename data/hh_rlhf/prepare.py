"""Anthropic's HH-RLHF -> comparisons, demonstrations (the chosen side) and prompts.

    python data/hh_rlhf/prepare.py [--subset harmless-base ...] [--source FILE [--test FILE]] [--out out/data/hh_rlhf]
                                   [--heldout 0.05] [--seed 1]

Without --source this downloads the train and test file of each subset (MIT): harmless-base, helpful-base,
helpful-online, helpful-rejection-sampled. FILE is one such file, .jsonl or .jsonl.gz: {"chosen", "rejected"}, two whole
dialogues.

A dialogue is split at its last "\\n\\nAssistant:", which ends the prompt; the leading space belongs to the answer.
One conversation may be there at several of its turns, so the splits part conversations, known by their opening: the
text before the first answer. With Anthropic's own test file, training rows that share an opening with it are dropped.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import json_object
from minirlhf.files.download import HUB
from data.common import arguments, fetch, prompts_of, raw_lines, split, text_field, write_folder

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def comparison(value, where):
    """One comparison, or the reason why there is none."""
    (prompt, mark, chosen), (other, _, rejected) = (text_field(value, name, where).rpartition(ASSISTANT)
                                                    for name in ("chosen", "rejected"))
    if not mark or not prompt.strip():
        return "no prompt before the last answer"
    if prompt != other:
        return "the two sides have different prompts"
    return {"prompt": prompt + ASSISTANT, "chosen": chosen, "rejected": rejected}


def read(paths, counts):
    """The comparisons of some files; what is dropped, and what is kept but odd, is counted."""
    rows = []
    for path in paths:
        for where, line in raw_lines(path):
            row = comparison(json_object(line, where), where)
            counts["read"] += 1
            if isinstance(row, str):
                counts[f"dropped: {row}"] += 1
                continue
            answers = row["chosen"], row["rejected"]
            counts["kept, with an empty answer"] += any(not answer.strip() for answer in answers)
            counts["kept, with two identical answers"] += answers[0] == answers[1]
            rows.append(row)
    return rows


def demonstrations(rows, counts):
    """The chosen answers, unless they are empty or go on to speak for the human."""
    good = [row for row in rows if row["chosen"].strip() and HUMAN not in row["chosen"]]
    counts["no demonstration: the chosen answer is empty or holds a human's turn"] += len(rows) - len(good)
    return [{"prompt": row["prompt"], "response": row["chosen"]} for row in good]


def opening(row):
    return row["prompt"].partition(ASSISTANT)[0]


def sources(args):
    """The files of the training split, and those of the test split if it is given as such."""
    if args.test and not args.source:
        raise UserError("--test goes with --source: name the training file too")
    if args.source:
        return [args.source], [args.test] if args.test else []
    url = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/main"
    return [[fetch(f"{url}/{subset}/{part}.jsonl.gz", f"hh_rlhf/{subset}/{part}.jsonl.gz") for subset in args.subset]
            for part in ("train", "test")]


def main(argv=None):
    parser = arguments(__doc__.splitlines()[0], "out/data/hh_rlhf")
    parser.add_argument("--subset", nargs="+", choices=SUBSETS, default=SUBSETS[:1], help="to download [harmless-base]")
    parser.add_argument("--test", type=Path, metavar="FILE", help="a test split you have, instead of --heldout")
    args = parser.parse_args(argv)
    (train_files, test_files), counts = sources(args), Counter()
    train, test = read(train_files, counts), read(test_files, counts)
    if test_files:
        tested, n = {opening(row) for row in test}, len(train)
        train = [row for row in train if opening(row) not in tested]
        counts["dropped: a training row whose conversation is in the test split"] += n - len(train)
    else:
        train, test = split(train, args.heldout, args.seed, key=opening)
    files = {"comparisons": train, "comparisons_test": test,
             "demonstrations": demonstrations(train, counts), "demonstrations_test": demonstrations(test, counts),
             "prompts": prompts_of(train), "prompts_test": prompts_of(test)}
    meta = {"template": HUMAN + " {instruction}" + ASSISTANT, "licence": "MIT, Anthropic", "seed": args.seed,
            "heldout": "the test files" if test_files else args.heldout}
    write_folder(args.out, files, meta, [*train_files, *test_files], counts)


if __name__ == "__main__":
    run_main(main)
