"""Instructions and answers in the format of Stanford Alpaca -> demonstrations and prompts.

    python data/alpaca/prepare.py [--source FILE] [--out out/data/alpaca] [--heldout 0.05] [--seed 1]

Without --source this downloads alpaca_data.json (CC BY-NC 4.0): 52,002 instructions with answers by text-davinci-003.
FILE holds a JSON array or JSON lines of {"instruction", "input", "output"}, or tasks like the 175 seed tasks,
{"instruction", "instances": [{"input", "output"}, ...]}. Each instance becomes one demonstration.
The answer follows "### Response:" directly, without a space, as in Stanford's own training.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.common import arguments, fetch, split, write_folder
from minirlhf.files.errors import run_main
from minirlhf.files.instructions import TEMPLATE, TEMPLATE_WITH_INPUT, demonstration, instances
from minirlhf.files.jsonl import keep, read_objects

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


def main(argv=None):
    args = arguments(__doc__.splitlines()[0], "out/data/alpaca").parse_args(argv)
    source, counts = args.source or fetch(URL, "alpaca/alpaca_data.json"), Counter(read=0)
    rows = keep((demonstration(instance, where, counts) for where, value in read_objects(source)
                 for instance in instances(value, where)), counts)
    meta = {"template": TEMPLATE, "template_with_input": TEMPLATE_WITH_INPUT,
            "heldout": args.heldout, "seed": args.seed,
            "licence": "alpaca_data.json: CC BY-NC 4.0; seed tasks: Apache 2.0"}
    write_folder(args.out, {"demonstrations": split(rows, args.heldout, args.seed)}, meta, [source], counts)


if __name__ == "__main__":
    run_main(main)
