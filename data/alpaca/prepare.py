"""Instructions and answers in the format of Stanford Alpaca -> demonstrations and prompts.

    python data/alpaca/prepare.py [--source FILE] [--out out/data/alpaca] [--heldout 0.05] [--seed 1]

Without --source this downloads alpaca_data.json: 52,002 instructions, with answers that text-davinci-003 wrote (CC
BY-NC 4.0). FILE is any file in that format, a JSON array or JSON lines of {"instruction", "input", "output"}, or in
that of the 175 seed tasks, {"instruction", "instances": [{"input", "output"}, ...]}: each instance is a demonstration.
The answer is used as it stands: it follows "### Response:" without a space, as in Stanford's own training.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minirlhf.running.errors import UserError, run_main
from minirlhf.data import field
from data.common import arguments, fetch, prompts_of, read_objects, split, text_field, write_folder

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
# From stanford_alpaca/train.py, to the letter.
TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n{instruction}\n\n### Response:")
TEMPLATE_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       "context. Write a response that appropriately completes the request."
                       "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def instances(value, where):
    """The {"instruction", "input", "output"} of a row: itself, or those of a seed task."""
    if "instances" not in value:
        return [value]
    found = value["instances"]
    if not isinstance(found, list) or not found or not all(isinstance(instance, dict) for instance in found):
        raise UserError(f"{where}: instances must be a list of objects with input and output")
    return [{**instance, "instruction": field(value, "instruction", where)} for instance in found]


def demonstration(value, where):
    """One demonstration, and the reason to drop it, or None."""
    instruction, input, output = (text_field(value, name, where) for name in ("instruction", "input", "output"))
    template = TEMPLATE_WITH_INPUT if input else TEMPLATE
    row = {"prompt": template.format(instruction=instruction, input=input), "response": output}
    reason = "no instruction" if not instruction.strip() else "no output" if not output.strip() else None
    return row, reason


def main(argv=None):
    args = arguments(__doc__.splitlines()[0], "out/data/alpaca").parse_args(argv)
    source = args.source or fetch(URL, "alpaca/alpaca_data.json")
    rows, counts = [], Counter()
    for where, value in read_objects(source):
        for instance in instances(value, where):
            row, reason = demonstration(instance, where)
            counts["read"] += 1
            counts["read, with an input"] += bool(instance["input"])
            if reason:
                counts[f"dropped: {reason}"] += 1
            else:
                rows.append(row)
    train, test = split(rows, args.heldout, args.seed, key=lambda row: row["prompt"])
    files = {"demonstrations": train, "demonstrations_test": test,
             "prompts": prompts_of(train), "prompts_test": prompts_of(test)}
    meta = {"template": TEMPLATE, "template_with_input": TEMPLATE_WITH_INPUT,
            "heldout": args.heldout, "seed": args.seed,
            "licence": "alpaca_data.json: CC BY-NC 4.0; seed tasks: Apache 2.0"}
    write_folder(args.out, files, meta, [source], counts)


if __name__ == "__main__":
    run_main(main)
