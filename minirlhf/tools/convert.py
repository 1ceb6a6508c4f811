"""Converts the files that people have into this project's JSONL: demonstrations, comparisons or prompts.

    python -m minirlhf.tools.convert FILE --out FILE [--split 0.1] [--columns prompt=Question,response=Answer]
                                     [--encoding cp1252] [--format trl]

It reads CSV with a header, as Excel writes it too, a JSON array, and JSONL, also compressed with gzip. The fields of
the first row decide the format (minirlhf/files/formats.py lists them), and all rows must have these fields. It prints
what it took for what. A row that breaks the format is an error. A row that cannot be used is dropped and counted.

Lists of messages become text as in Anthropic's HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant: ...". The last answer is the
response, and everything before it is the prompt. Rows with an instruction use Stanford's template (data/alpaca).
"""

import csv
import io
import re
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path

from minirlhf.data import comparison, demonstration, held_out_prompts, prompt_only
from minirlhf.files import instructions
from minirlhf.files.errors import UserError, require, run_main, shown
from minirlhf.files.formats import ASSISTANT, HUMAN, OTHERS, OURS, USED, UTF_16, formats_of, header_of, last_answer
from minirlhf.files.json_files import read_json, write_json, write_whole
from minirlhf.files.jsonl import begins_with_prompt, is_dialogue, keep, read_bytes, read_objects, text_field
from minirlhf.running.config import Parser
from minirlhf.tools.feedback.votes import to_line

TEXTS = ("prompt", "response", "chosen", "rejected")
RENAMED = {"question": "prompt", "answer": "response", "completion": "response", "messages": "response"}
MADE_OF = {"messages": "messages -> prompt, response",
           "chosen": "chosen, rejected -> prompt, chosen, rejected",
           "instruction": "instruction and input -> prompt in Stanford's template, output -> response, without a space "
                          "in front"}
CUT = "answers are followed by more messages, which are left out"
COPIES = "responses begin with a copy of their prompt, which is left out"
# Each begins where a word begins, and repeats are bounded, so that a million characters take no time.
PERSONAL = {"an e-mail address": r"(?<![\w.+-])[\w.+-]+@[\w-]+\.\w",
            "a phone number": r"(?<![\w.])(\+|\(?0\d|\(\d)[\d ()/-]{6,16}\d(?!\w)"
                              r"|(?<!\w)\d{3}[-. ]\d{3}[-. ]\d{4}(?!\w)"}


class Dropped(Exception):
    """The reason why a row cannot be used."""


# ---- reading ---------------------------------------------------------------------------------------------------------

def load(path, columns=None, encoding=None):
    """A file -> (what kind it is, [(where, row)]). columns: {our name: theirs}; the others are then left out."""
    data = read_bytes(path)
    encoding = encoding or ("utf-16" if data.startswith(UTF_16) else None)
    if encoding:
        data = decoded(data, encoding, path).encode()
    start = data.lstrip()[:1]
    if start in b"[{":
        kind, rows = "a JSON array" if start == b"[" else "JSONL", list(read_objects(path, data))
    else:
        kind, rows = csv_rows(path, data, columns)
    return kind, [(where, pick(row, columns, where)) for where, row in rows] if columns else rows


def pick(row, columns, where):
    """The columns that were asked for, under our names. Capitals do not count."""
    found = {name.lower(): value for name, value in row.items()}
    for name in columns.values():
        require(name.lower() in found, f"{where}: no column {name!r}, which --columns names (found: {', '.join(row)})")
    return {ours: found[name.lower()] for ours, name in columns.items()}


def decoded(data, encoding, path):
    """Bytes -> text. What is not in this encoding is an error with its line."""
    try:
        return data.decode(encoding)
    except LookupError:
        raise UserError(f"--encoding {encoding}: there is no such encoding. Try cp1252, mac_roman or utf-16") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{1 + data.count(10, 0, error.start)}: not {encoding} ({error.reason}). "
                        "--encoding names another one") from None


def csv_text(data, path):
    """(text, a note). What is not UTF-8 is taken for Windows' cp1252, unless it does not look like it."""
    text, guess = (data.decode(encoding, "replace") for encoding in ("utf-8", "cp1252"))
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    # Mostly good UTF-8, bytes that cp1252 lacks, or words of accented letters only (as Cyrillic looks): no guess.
    if not broken or sum(map("\x7f".__lt__, text)) > 2 * broken or re.search("\ufffd|[À-ÿ]{4}", guess):
        return decoded(data, "utf-8", path), ""
    word = re.search(r"\S{0,20}[^\x00-\x7f]\S{0,20}", guess)[0]
    return guess, f", read as cp1252, which is a guess: the first word to check is {word!r}. --encoding overrules it"


def csv_rows(path, data, columns):
    """The bytes of a CSV file -> (what kind it is, [(where, row)])."""
    text, note = csv_text(data, path)
    text = text.replace("\r\n", "\n")                           # also within cells
    says = re.match("(?:sep=(.)\n)?", text)                     # a line for Excel alone
    text, line = text[says.end():], 1 + bool(says[1])
    delimiter, names = header_of(text.partition("\n")[0].encode(), says[1])
    if not columns:
        check_format(names, f"{path}:{line}")
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    rows, where, n = [], f"{path}:{line}", len(set(names))
    try:
        for cells in filter(any, reader):                       # an empty line is no row
            require(len(cells) >= n and not any(cells[n:]),
                    f"{where}: {len(cells)} fields for the {n} different names of the header. "
                    "A text that contains the delimiter must be in double quotes")
            rows.append((where, dict(zip(names, cells))))
            where = f"{path}:{reader.line_num + line}"          # a text in quotes may have several lines
    except csv.Error as error:
        raise UserError(f"{where}: the row that begins here is not CSV ({error})") from None
    return f"CSV with a header, separated by {delimiter!r}{note}", rows[1:]


def check_format(names, where):
    """The fields of the one format that a row has."""
    found = formats_of(names)
    require(len(found) == 1, f"{where}: the fields found ({', '.join(names) or 'none'}) fit {len(found)} of the known "
            f"formats, and must fit exactly one. The known formats: {'; '.join(map(', '.join, OURS + OTHERS))}. "
            "--columns prompt=NAME,response=NAME chooses columns")
    return USED.get(found[0], found[0])


# ---- one row ---------------------------------------------------------------------------------------------------------

def convert(fields, value, where, counts, repeated):
    """One row -> a row of ours. Raises Dropped, but for instructions it returns the reason as a string.

    repeated: whether every response of the file begins with its prompt.
    """
    if value.get("label") is False and "completion" in fields:      # TRL's unpaired preferences
        raise Dropped("label is false: people rejected this completion")
    if "instruction" in fields:
        return instructions.demonstration(value, where, Counter())
    row = renamed(fields, value)
    if any(map(is_dialogue, sides_of(row).values())) and isinstance(row.get("prompt"), str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    row |= {name: as_text(part, where, counts, name == "prompt") for name, part in row.items() if is_dialogue(part)}
    row |= {name: text_field(row, name, where) for name in TEXTS if name in row}
    prompt, sides = row.get("prompt", ASSISTANT), sides_of(row)
    if prompt.endswith(ASSISTANT) or sides and all(side.startswith(HUMAN) for side in sides.values()):
        counts["rows hold dialogues: the last answer is the response, and all before it is the prompt"] += 1
        row = {"prompt": "", **row}
        row |= split_dialogues(row["prompt"], sides, counts)
    else:
        start, end = prompt.strip(), prompt[len(prompt.rstrip()):]      # the copy may lack the white space around it
        row |= {name: side.lstrip().removeprefix(start).removeprefix(end) for name, side in sides.items() if repeated}
        counts[COPIES] += len(sides) * repeated
    return useful(row, where, counts)


def renamed(fields, value):
    """The fields that are used, under our names."""
    kept = (*fields, "finished") if fields in OURS[1:4] else fields
    return {RENAMED.get(name, name): value[name] for name in kept if name in value}


def sides_of(row):
    """{name: response}, of a demonstration or a pair."""
    return {name: row[name] for name in TEXTS[1:] if name in row}


def repeats_prompt(row):
    """Whether the prompt and all its responses are texts, and all of them begin with the prompt."""
    prompt, sides = row.get("prompt"), sides_of(row).values()
    return (isinstance(prompt, str) and bool(sides)
            and all(isinstance(side, str) and begins_with_prompt(side, prompt) for side in sides))


def as_text(messages, where, counts, is_prompt):
    """Messages as a dialogue in HH-RLHF's form, which ends before the answer (a prompt) or with the last answer."""
    # OpenAI's fine-tuning format marks with a weight of 0 what must not be learned.
    roles = [message["role"].lower() for message in messages]
    answers = [i for i, role in enumerate(roles) if role == "assistant" and messages[i].get("weight") != 0]
    if is_prompt and roles[-1] == "assistant":
        raise Dropped("a prompt that ends with the beginning of an answer")
    if not is_prompt and not answers:
        raise Dropped("no answer in a list of messages")
    used = messages if is_prompt else messages[:answers[-1] + 1]
    counts[CUT] += len(used) < len(messages)
    texts = [text_field(message, "content", where) for message in used]
    if any(mark in text for mark in (HUMAN, ASSISTANT) for text in texts):
        raise Dropped("a message holds a dialogue itself")
    names = [{"user": "Human"}.get(role, role.capitalize()) for role in roles]
    turns = [f"\n\n{name}: {text}" for name, text in zip(names, texts)]
    return "".join(turns) + ASSISTANT if is_prompt else "".join(turns[:-1]) + ASSISTANT + texts[-1]


def split_dialogues(prompt, sides, counts):
    """Dialogues as texts -> {"prompt", and the last answer of each side}. A side continues the prompt or repeats it."""
    found = {name: last_answer(whole_dialogue(prompt, side, counts)) for name, side in sides.items()}
    counts[CUT] += sum(bool(after) for _, _, after in found.values())
    prompts = {before for before, _, _ in found.values()} or {prompt}
    if len(prompts) > 1:
        raise Dropped("the two sides have different prompts")
    return {"prompt": prompts.pop(), **{name: answer for name, (_, answer, _) in found.items()}}


def whole_dialogue(prompt, side, counts):
    """The prompt and a side as one text, in which nothing is said twice."""
    before, answer, after = last_answer(side)
    if not before or side.startswith(ASSISTANT) or not side.startswith("\n\n"):
        return prompt + side.removeprefix(ASSISTANT)
    counts[COPIES] += bool(prompt)
    if prompt.endswith(before):                                 # the side repeats only the prompt's last turns
        return prompt + answer + after
    if prompt.strip() not in before:
        raise Dropped("a side is a dialogue that does not hold its prompt")
    return side


def useful(row, where, counts):
    """The row with a space before a response that would run into its prompt. Dropped if it teaches nothing."""
    reasons = {"empty prompt": not row["prompt"].removesuffix(ASSISTANT).strip(),
               "empty response": not row.get("response", "none").strip(),
               "identical sides": "chosen" in row and row["chosen"].strip() == row["rejected"].strip()}
    for reason in filter(reasons.get, reasons):
        raise Dropped(reason)
    bare = [name for name in TEXTS[1:] if row.get(name) and not row[name][0].isspace()]
    space = "" if row["prompt"][-1].isspace() else " "
    row |= {name: space + row[name] for name in bare}
    counts["responses got a space in front, since neither they nor their prompt have one"] += len(bare) * len(space)
    read = demonstration if "response" in row else comparison if len(row) > 1 else prompt_only
    responses = read(row, where).responses
    counts["responses begin with their prompt and are kept"] += sum(
        begins_with_prompt(text, row["prompt"]) for text in responses)
    counts["responses hold a turn of a human and are kept"] += sum(
        bool(re.search(r"\n\n(human|user):", text, re.IGNORECASE)) for text in responses)
    return row


# ---- the whole file --------------------------------------------------------------------------------------------------

def convert_all(rows, fields, counts):
    """Yields each row of ours, or the reason to drop it."""
    repeated = all(repeats_prompt(renamed(fields, value)) for _, value in rows)
    for where, value in rows:
        require(set(fields) <= set(value),
                f"{where}: has the fields {', '.join(value)}, but the first row has {', '.join(fields)}")
        require(fields != ("prompt",) or not {"completion", *TEXTS[1:], "responses", "answer"} & set(value),
                f"{where}: has the fields {', '.join(value)}, but the first row fits prompts only. "
                "--columns prompt=prompt takes these")
        for part in instructions.instances(value, where) if "instances" in fields else [value]:
            try:
                yield convert(fields, part, where, counts, repeated)
            except Dropped as reason:
                yield str(reason)


def warnings(rows):
    """What a person should look at before training, a sentence each."""
    given, texts = defaultdict(set), [" ".join(map(str, row.values())) for row in rows]
    for row in rows:
        given[row["prompt"]].add(tuple(sides_of(row).values()))
    # A pair contradicts another that has its sides exchanged. A demonstration is its own mirror image.
    odd = [prompt for prompt, sides in given.items() if len(sides) > 1 and any(side[::-1] in sides for side in sides)]
    if odd:
        yield f"{len(odd):,} prompts are there again with another answer or verdict: {', '.join(map(shown, odd[:3]))}"
    for what, pattern in PERSONAL.items():
        if n := sum(bool(re.search(pattern, text)) for text in texts):
            yield f"{n:,} rows hold what looks like {what}. Remove it unless its owner agreed"


def trl_rows(row):
    """A row -> rows with TRL's names. A ranking gives a pair for every two responses that differ in rank."""
    if not {"chosen", "responses"} & set(row):
        return [{"completion" if name == "response" else name: text for name, text in row.items()}]
    read = comparison(row, "row")
    pairs = permutations(zip(read.ranks, read.responses), 2)
    return [{"prompt": read.prompt, "chosen": better, "rejected": worse}
            for (rank, better), (other, worse) in pairs if rank < other and better != worse]


CARD = """# {name}

| | |
|---|---|
| rows | {rows:,} on {prompts:,} prompts, made of {read:,} that were read |
| people | {people} |
| dates | {dates} |
| agreement | TO FILL IN: what `python -m minirlhf.tools.feedback stats FILE` prints |
| guidelines | TO FILL IN: what the people were asked to do, word for word |
| licence | TO FILL IN: who may use this for what, and whether the people agreed |
"""


def card(name, kept, values):
    """What others need to know about the data, in Markdown. Names of people are not in it."""
    people = {str(value["annotator"]) for value in values if value.get("annotator")}
    dates = sorted(value["time"][:10] for value in values if isinstance(value.get("time"), str)) or ["unknown"]
    return CARD.format(name=name, rows=len(kept), read=len(values), prompts=len({row["prompt"] for row in kept}),
                       people=len(people) or "unknown", dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))))


def templates_of(fields, rows):
    """What meta.json says, so that the tools can find the instruction in a prompt."""
    if "instruction" in fields:
        return {"template": instructions.TEMPLATE, "template_with_input": instructions.TEMPLATE_WITH_INPUT}
    in_dialogue = any(row["prompt"].endswith(ASSISTANT) for row in rows)
    return {"template": f"{HUMAN} {{instruction}}{ASSISTANT}"} if in_dialogue else {}


def write(files, rows, heldout, templates):
    """Writes the rows, those with a held-out prompt to the second file, and the folder's templates."""
    meta = files[0].with_name("meta.json")
    require(not meta.exists() or read_json(meta).get("template") == templates.get("template"),
            f"{meta}: other data here have another template. Choose an --out in another folder")
    meta.parent.mkdir(parents=True, exist_ok=True)
    if templates and not meta.exists():
        write_json(meta, templates)
    for file, is_test in zip(files, (False, True)):
        own = [row for row in rows if (row["prompt"] in heldout) == is_test]
        write_whole(file, map(to_line, own))
        print(f"{len(own):>8,}  rows written to {file}")


def columns_of(text):
    """"prompt=Question,response=Answer" -> {"prompt": "Question", "response": "Answer"}. Else ValueError."""
    return dict(part.split("=", 1) for part in re.split(r",(?=\w+=)", text))


def main(argv=None):
    parser = Parser(prog="python -m minirlhf.tools.convert", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="CSV, a JSON array or JSONL, also compressed with gzip")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--split", type=float, choices=(0.5, 0.25, 0.2, 0.1, 0.05, 0.02, 0.01), help="share of "
                        "the prompts for a second file, FILE_test. 0.1 takes those that --heldout auto holds out")
    parser.add_argument("--columns", type=columns_of, metavar="OURS=THEIRS,...", help="use only these columns, under "
                        "these names, as in prompt=Question,response=Answer")
    parser.add_argument("--encoding", help="of the file, where the guess is wrong [UTF-8, UTF-16 or cp1252]")
    parser.add_argument("--format", choices=("minirlhf", "trl"), default="minirlhf", help="trl: the names that TRL "
                        "reads (prompt, chosen, rejected; prompt, completion), and a data card [%(default)s]")
    args = parser.parse_args(argv)
    one_in = round(1 / args.split) if args.split else 0
    files = [args.out, args.out.with_name(f"{args.out.stem}_test{args.out.suffix}")][:2 if one_in else 1]
    card_file = args.out.with_suffix(".card.md")
    for file in files + [card_file] * (args.format == "trl"):
        require(not file.exists(), f"{file} exists and is not overwritten. Choose another --out")
    kind, rows = load(args.file, args.columns, args.encoding)
    where, first = rows[0] if rows else (args.file, {})
    fields, counts = check_format(first, where), Counter(read=0)
    foreign = ", ".join(set(args.columns or ()) - set(fields))
    require(not foreign, f"--columns: {foreign} is no name of ours that goes with {', '.join(fields)}")
    print(f"{kind}: {MADE_OF.get(fields[0]) or ', '.join(f'{name} -> {RENAMED.get(name, name)}' for name in fields)}")
    print(f"not used: {', '.join(name for name in first if name not in (*fields, 'finished')) or 'nothing'}")
    kept = keep(convert_all(rows, fields, counts), counts)
    print("\n".join(f"{n:>8,}  {what}" for what, n in counts.items() if n or what == "read"))
    for sentence in warnings(kept):
        print(f"warning: {sentence}")
    kept = [new for row in kept for new in trl_rows(row)] if args.format == "trl" else kept
    prompts = {row["prompt"] for row in kept}
    heldout = held_out_prompts(prompts, one_in) if one_in and prompts else set()
    require(heldout != prompts, f"{args.file}: nothing is written, {len(prompts)} usable prompts are too few")
    write(files, kept, heldout, templates_of(fields, kept))
    if args.format == "trl":
        write_whole(card_file, [card(args.out.name, kept, [value for _, value in rows]).encode()])
        print(f"{card_file} describes them. Fill in its gaps before you give the data away")


if __name__ == "__main__":
    run_main(main)
