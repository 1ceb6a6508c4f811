"""The human labels of "Fine-Tuning Language Models from Human Preferences" (2019) -> comparisons and prompts.

    python data/openai_2019/prepare.py [--task sentiment|descriptiveness] [--source FILE]
                                       [--out out/data/openai_2019/TASK] [--heldout 0.05] [--seed 1]

Without --source this downloads offline_5k.json of the task: rows {"query", "sample0", ..., "sample3", "best"} of GPT-2
token ids, where best is the preferred of four continuations of a passage from a book. The padding id 50259 is removed
from both ends. Samples were cut off at a fixed length, so none is "finished" and none gets an EOS. The books can no
longer be downloaded, so the queries of the labels serve as prompts.

Our files hold text, and encoding a text does not always give back the original ids: a sample may split a word into
other tokens than the encoder would, or end within a character, which then reads U+FFFD. Such rows are kept and counted.
This needs GPT-2's vocabulary, which is downloaded, or read from the folder $MINIRLHF_GPT2_VOCAB.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.common import arguments, fetch, split, write_folder
from minirlhf.files.jsonl import LONGEST, field, index_field, keep, read_objects
from minirlhf.files.tokenizer import gpt2_encoding
from minirlhf.files.errors import UserError, run_main

URL = "https://openaipublic.blob.core.windows.net/lm-human-preferences/labels/{task}/offline_5k.json"
PADDING = 50259                 # not in GPT-2's vocabulary, which ends with the EOS, 50256
SAMPLES = ("sample0", "sample1", "sample2", "sample3")


def token_ids(value, name, where, n_vocab):
    """A list of token ids without the padding at its ends."""
    ids = field(value, name, where)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids) or len(ids) > LONGEST:
        raise UserError(f"{where}: {name} must be a list of token ids")
    real = [i for i, token in enumerate(ids) if token != PADDING]
    ids = ids[real[0]:real[-1] + 1] if real else []
    wrong = next((token for token in ids if not 0 <= token < n_vocab), None)
    if wrong is not None:
        raise UserError(f"{where}: {name} holds the id {wrong}, but GPT-2's ids are 0 to {n_vocab - 1} "
                        f"(the padding {PADDING} is allowed at the ends only)")
    return ids


def comparison(value, where, tokenizer, counts):
    """A row of token ids -> a row of texts. What is odd about it is counted."""
    ids = [token_ids(value, name, where, tokenizer.n_vocab) for name in ("query", *SAMPLES)]
    best = index_field(value, "best", len(SAMPLES), where)
    if not ids[0]:
        raise UserError(f"{where}: the query is empty")
    prompt, *responses = texts = [tokenizer.decode(each) for each in ids]
    again = [tokenizer.encode_ordinary(text) for text in texts]
    counts["kept, with text that does not lead back to its ids"] += again != ids
    counts["  of these, with a character cut in two"] += any(
        tokenizer.decode_bytes(each) != text.encode() for text, each in zip(texts, ids))
    counts["  of these, with a query of more tokens than before"] += len(again[0]) > len(ids[0])
    counts["kept, with an empty sample"] += "" in responses
    counts["kept, with four identical samples"] += len(set(responses)) == 1
    return {"prompt": prompt, "responses": responses, "best": best, "finished": [False] * len(responses)}


def main(argv=None):
    parser = arguments(__doc__.splitlines()[0], "out/data/openai_2019/TASK")
    parser.add_argument("--task", choices=("sentiment", "descriptiveness"), default="sentiment", help="[sentiment]")
    args = parser.parse_args(argv)
    out = Path(str(args.out).replace("TASK", args.task))
    source = args.source or fetch(URL.format(task=args.task), f"openai_2019/{args.task}/offline_5k.json")
    tokenizer, counts = gpt2_encoding(), Counter(read=0)
    rows = keep((comparison(value, where, tokenizer, counts) for where, value in read_objects(source)), counts)
    meta = {"task": args.task, "heldout": args.heldout, "seed": args.seed,
            "licence": "MIT for the code of lm-human-preferences; the labels carry no notice of their own"}
    write_folder(out, {"comparisons": split(rows, args.heldout, args.seed)}, meta, [source], counts)


if __name__ == "__main__":
    run_main(main)
