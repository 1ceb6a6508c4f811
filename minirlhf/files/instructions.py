"""Rows of instruction, input and output, as Stanford Alpaca has them -> demonstrations in its template."""

from minirlhf.files.errors import UserError
from minirlhf.files.jsonl import field, text_field

# Copied exactly from stanford_alpaca/train.py.
TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n{instruction}\n\n### Response:")
TEMPLATE_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       "context. Write a response that appropriately completes the request."
                       "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")

# Also as <noinput>, and in capitals.
NO_INPUT = ("", "noinput", "no input", "no input required", "none", "nan", "null", "n/a", "n.a")


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
    value = {**value, "input": ""} if value.get("input") is None else value
    instruction, input, output = (text_field(value, name, where) for name in ("instruction", "input", "output"))
    has_input = input.strip("\u200b\ufeff\u00a0 \n\r\t<>.").lower() not in NO_INPUT
    counts["read, with an input"] += has_input
    if not instruction.strip():
        return "no instruction"
    if not output.strip():
        return "no output"
    template = TEMPLATE_WITH_INPUT if has_input else TEMPLATE
    return {"prompt": template.format(instruction=instruction, input=input), "response": output}
