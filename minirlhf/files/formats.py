"""How to recognise the files that people have. `python -m minirlhf.tools.convert` turns them into our JSONL."""

import csv
import shlex
from pathlib import Path

OURS = (("prompt", "response"), ("prompt", "chosen", "rejected"), ("prompt", "responses", "ranks"),
        ("prompt", "responses", "best"), ("prompt",))
OTHERS = (("question", "answer"), ("instruction", "input", "output"), ("instruction", "output"),
          ("instruction", "instances"), ("prompt", "completion"), ("messages",),
          ("chosen", "rejected"), ("prompt", "messages"), ("prompt", "response", "chosen", "rejected"),
          ("prompt", "messages", "chosen", "rejected"))
# Data sets that hold a text twice, and the fields that are used: UltraChat, rm-static, UltraFeedback (binarized).
USED = {("prompt", "messages"): ("messages",),
        ("prompt", "response", "chosen", "rejected"): ("prompt", "chosen", "rejected"),
        ("prompt", "messages", "chosen", "rejected"): ("prompt", "chosen", "rejected")}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"        # how Anthropic's HH-RLHF begins a turn
BOM, UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
STARTS = {b"[": "a JSON array", BOM: "a file with a BOM (byte order mark)", b"\x1f\x8b": "a file compressed with gzip",
          b"sep=": "CSV with a header", **dict.fromkeys(UTF_16, "a file in UTF-16")}


def formats_of(names):
    """The formats whose fields are all among the names. One that is part of another one found does not count."""
    found = [fields for fields in OURS + OTHERS if set(fields) <= set(names)]
    return [fields for fields in found if not any(set(fields) < set(other) for other in found)]


def last_answer(dialogue):
    """A dialogue as text -> (all before its last answer, that answer, what the human says after it)."""
    prompt, mark, rest = dialogue.rpartition(ASSISTANT)
    answer, human, after = rest.partition(HUMAN)
    return prompt + mark, answer, human + after


def header_of(line, delimiter=None):
    """The first line of a CSV file, as bytes -> (delimiter, names in lower case)."""
    first = (line[:10_000].decode("utf-8-sig", "replace").splitlines() or [""])[0]
    delimiter = delimiter or max(",;\t", key=first.count)
    first = first.rstrip(delimiter)                      # Excel keeps columns that were emptied
    return delimiter, [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]


def kind_of_file(line):
    """What a file is whose first line, as bytes, is not JSONL. None if the line does not tell."""
    if line.removeprefix(BOM).lstrip()[:1] not in (b"{", b"[") and formats_of(header_of(line)[1]):
        return "CSV with a header"
    return next((kind for start, kind in STARTS.items() if line.startswith(start)), None)


def kind_of_row(value):
    """What a row is that is not ours, or None."""
    found = formats_of(value)
    return "rows of " + ", ".join(found[0]) if len(found) == 1 and found[0] in OTHERS else None


def advice(path, kind):
    """The command that converts a file, as one sentence."""
    new = Path(path.removesuffix(".gz")).with_suffix(".converted.jsonl" if path.endswith(".jsonl") else ".jsonl")
    return (f"this looks like {kind}; convert it with: "
            f"python -m minirlhf.tools.convert {shlex.quote(path)} --out {shlex.quote(str(new))}")
