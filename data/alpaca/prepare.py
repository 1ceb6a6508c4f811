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
from data.common import arguments, fetch, keep, read_objects, split, text_field, write_folder
from minirlhf.files.jsonl import field
from minirlhf.running.errors import UserError, run_main

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
# Copied exactly from stanford_alpaca/train.py.
TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n{instruction}\n\n### Response:")
TEMPLATE_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       "context. Write a response that appropriately completes the request."
                       "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def instances(value, where):
    """A row as a list of {"instruction", "input", "output"}: a seed task has several."""
    if "instances" not in value:
        return [value]
    found = value["instances"]
    if not isinstance(found, list) or not found or not all(isinstance(instance, dict) for instance in found):
        raise UserError(f"{where}: instances must be a list of objects with input and output")
    return [{**instance, "instruction": field(value, "instruction", where)} for instance in found]


def demonstration(value, where, counts):
    """One demonstration, or the reason to drop it."""
    instruction, input, output = (text_field(value, name, where) for name in ("instruction", "input", "output"))
    counts["read, with an input"] += bool(input)
    if not instruction.strip():
        return "no instruction"
    if not output.strip():
        return "no output"
    template = TEMPLATE_WITH_INPUT if input else TEMPLATE
    return {"prompt": template.format(instruction=instruction, input=input), "response": output}


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
